"""What a vendor's fine-tuning API reports, as one of our errors, and without a word of the users'.

A vendor may quote the line that it does not like, and what it says ends up on screens and in logs. So what stands in
quotation marks or braces is cut from its messages, and so is whatever three words in a row, or whole text, it shares
with the conversations. That may cut more than it has to; the vendor shows the whole message to who may see it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from distill_ray.config.engine import OpenAIEngineConfig
from distill_ray.config.flywheel import OpenAITrainerConfig
from distill_ray.engines.openai_errors import TRANSIENT_STATUS, ErrorTranslator, error_fields, retry_after_s
from distill_ray.errors import ConfigError, DistillError, FlywheelError, TransientEngineError

_CUT = "…"
_MOST_CHARS = 500
_WORD = re.compile(r"\w+")
_TOGETHER = 3  # words; two in a row occur in anything
# To the last closing one, for there may be more of them inside; to the end where the message itself was cut.
_QUOTED = re.compile(r"""\{(?:.*\}|.*)|(?<!\w)["'`“‘«„「](?:.*["'`”’»“」](?!\w)|.*)""", re.DOTALL)
_CODE = re.compile(r"[\w.\[\]-]{1,64}", re.ASCII)
_MODEL_CODES = frozenset({"model_not_available", "model_not_found"})


class VendorErrors:
    """Turns what the client raises into our errors, for one trainer.

    Args:
        config: `flywheel.trainer`.
        key: masked wherever the vendor repeats it; empty for none.
        texts: what the users and the teacher said; none of it is ever shown.
        begun: path of the file that says what was begun there.
    """

    def __init__(self, config: OpenAITrainerConfig, key: str, texts: Collection[str], begun: str) -> None:
        engine = OpenAIEngineConfig(
            model=config.model, base_url=config.base_url, api_key_env=config.api_key_env, timeout_s=config.timeout_s
        )
        self._client_errors = ErrorTranslator(engine, key)
        self._config, self._texts, self._begun = config, texts, begun
        self._shown: dict[str, str] = {}  # a vendor that is away says the same for an hour

    def translate(self, error: Exception) -> DistillError:
        """TransientEngineError for what may pass, ConfigError for a wrong key or model, else FlywheelError."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return self._of_status(error.status_code, error.body, error.response.headers)
        if isinstance(error, openai.OpenAIError):  # nothing came back
            return self._client_errors.translate(error)
        kind = type(error).__name__
        return TransientEngineError(f"{self._config.base_url}: what came back is no fine-tuning API's answer ({kind})")

    def shown(self, said: str) -> str:
        """What the vendor said, as it may be shown: a line without the key and without anything of the users."""
        line = _QUOTED.sub(_CUT, " ".join(self._client_errors.masked(said)[:_MOST_CHARS].split()))
        if line not in self._shown:
            self._shown[line] = without_texts(line, self._texts)
        return self._shown[line]

    def _of_status(self, status: int, body: object, headers: Mapping[str, str]) -> DistillError:
        model, env = self._config.model, self._config.api_key_env
        fields = error_fields(body)
        where = f"{self._config.base_url}: {status} {self.shown(fields['message'])}".rstrip()
        if fields["param"] == "model" or fields["code"] in _MODEL_CODES:
            return ConfigError(
                f"flywheel.trainer.model: {model} cannot be fine-tuned with this account ({where}); take one of those "
                "that the vendor names for fine-tuning"
            )
        if status == 402 or fields["code"] == "insufficient_quota":
            return FlywheelError(
                f"{where}; the account behind {env} has no quota left; then run the same command again"
            )
        if status in TRANSIENT_STATUS or status >= 500:
            return TransientEngineError(where, retry_after_s(headers))
        if status in (401, 403):
            key = f"the key in the environment variable {env} is wrong" if env else "it wants a key: name its variable"
            return ConfigError(f"flywheel.trainer.api_key_env: {where}; {key}, or may not fine-tune")
        if status in (404, 405):
            return ConfigError(
                f"flywheel.trainer.base_url: {where}; is there a fine-tuning API (.../v1)? If a job that was begun is "
                f"gone there, or {env} now holds the key of somebody else, delete {self._begun} to begin anew"
            )
        wrong = codes(fields["param"], fields["code"])
        return FlywheelError(f"{where}{f' ({wrong})' if wrong else ''}; see flywheel.trainer, and the vendor's pages")


def codes(*found: str) -> str:
    """Those that are codes and no text, in a row."""
    return ", ".join(code for code in found if _CODE.fullmatch(code))


def without_texts(message: str, texts: Iterable[str]) -> str:
    """The message with `…` for each run of words that one of the texts has too: three or more, or all of the text."""
    words = list(_WORD.finditer(message))
    places: dict[tuple[str, ...], list[int]] = {}
    for length in range(1, _TOGETHER + 1):
        for start, run in enumerate(_runs([word.group().casefold() for word in words], length)):
            places.setdefault(run, []).append(start)
    cut: set[int] = set()
    for text in texts:
        said = " ".join(_WORD.findall(text)).casefold().split()
        length = min(_TOGETHER, len(said))
        for run in _runs(said, length):
            if run in places:
                cut.update(place + word for place in places[run] for word in range(length))
    shown, end = [], 0
    for index, word in enumerate(words):
        if index in cut:
            if index - 1 not in cut:
                shown += [message[end : word.start()], _CUT]
            end = word.end()
    return "".join([*shown, message[end:]])


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Each so many words in a row."""
    return zip(*(words[start:] for start in range(length)), strict=False)
