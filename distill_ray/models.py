"""Where a model lives, and how a conversation becomes the token ids that every part of the system agrees on.

`ChatTokenizer` is used by the engines that run a model themselves (vLLM, transformers) and by the trainer, so the ids
that a student is trained on are the ids that its engine will see. Text that spells a control token ("<|im_end|>")
stays plain text: vLLM's own chat path would turn it into the real token, which lets a user's query end its own turn.
`PlainPrompts` stands in for an encoder-decoder without a chat template.

Needs transformers (imported on first use), not torch.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from distill_ray.config import HfEngineConfig, StudentConfig, VllmEngineConfig
from distill_ray.config.engine import DEMO_MODEL
from distill_ray.errors import ConfigError, RequestRejected, first_line
from distill_ray.model_files import digest_in_store, digest_on_disk, fetched_model, in_store, sizes
from distill_ray.object_store import reach
from distill_ray.records import Message, RejectReason

_DEMO = Path(__file__).parent / "demo"
DEMO_MODELS = {DEMO_MODEL: _DEMO / "model", "demo-sentiment": _DEMO / "sentiment", "demo-names": _DEMO / "names"}
DEMO_MODEL_PATH = DEMO_MODELS[DEMO_MODEL]


def resolve_model(model: str, *, key: str = "model", with_weights: bool = True) -> str:
    """Return what transformers and vLLM load: a folder on this node, or a hub id unchanged.

    Args:
        model: `demo`, a folder, the URL of one in a store (s3://...), or a hub id ("org/name").
        key: the dotted config key, for the message.
        with_weights: False: configuration and tokenizer are enough, where it has to be fetched from a store.

    Raises:
        ConfigError: it looks like a path and nothing is there.
    """
    if model in DEMO_MODELS:
        return str(DEMO_MODELS[model])
    path = fetched_model(model, key=key, with_weights=with_weights) if in_store(model) else Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{key}: {model} has no config.json; give the folder of a model in Hugging Face format")
        return str(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not model.startswith("."):
        return model
    raise ConfigError(
        f"{key}: no model at {model}; give an existing folder, the URL of one (s3://...), a hub id (org/name) or `demo`"
    )


def resolve_adapter(adapter: str, *, key: str) -> str:
    """Return a folder of LoRA adapters on this node, fetched from a store if need be. Raises ConfigError: it cannot."""
    return str(fetched_model(adapter, key=key)) if in_store(adapter) else adapter


def require_safetensors(model: str, *, key: str) -> None:
    """Refuse a folder whose weights are only in a format that runs code when it is read.

    Raises:
        ConfigError: no safetensors there, or a file of them that is cut off. (What a hub id has is seen when it is
            loaded, what a store has when it is fetched.)
    """
    if in_store(model):
        names = list(sizes(model, key=key))
    else:
        path = Path(resolve_model(model, key=key))
        names = [file.name for file in path.iterdir()] if path.is_dir() else None
        for file in sorted(path.glob("*.safetensors")):
            _require_whole(file, key)
    if names is not None and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"{key}: {model} has no weights in safetensors; other formats run code when they are read. Convert it: "
            "load it with transformers where you trust it, then save_pretrained(folder)"
        )


def _require_whole(weights: Path, key: str) -> None:
    """Look at the head alone, which says how long the file is. Raises ConfigError: it is not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{key}: {weights}: damaged ({first_line(error)}); fetch the model again") from error


def model_identity(model: str, revision: str | None = None) -> str:
    """Name a model so that other weights never pass for it: `demo@1f3a...`, `org/name@revision`.

    A folder's mark is a hash of its small files and of the size, head and tail of its weights: cheap even at 100 GB,
    and another training run changes it. In a store it is the same for the same files.
    """
    if in_store(model):
        return f"{model}@{digest_in_store(model)}"
    path = DEMO_MODELS.get(model) or Path(model).expanduser()
    if not path.is_dir():
        return f"{model}@{revision or 'main'}"
    return f"{model}@{digest_on_disk(path)}"


def short_name(identity: str) -> str:
    """An engine's identity for people: `vllm:demo` of `vllm:demo@1f3a...:{...}`. A folder's last part stands for it."""
    kind, _, rest = identity.partition(":")
    model = re.split(r"@|:\{", rest, maxsplit=1)[0]
    return f"{kind}:{Path(model).name if model.startswith(('/', '.', '~')) else model}" if model else identity


ModelSection = StudentConfig | VllmEngineConfig | HfEngineConfig


class ChatTokenizer:
    """A model's tokenizer and chat template.

    Args:
        model: as in the config (`demo`, folder or hub id).
        revision: commit or tag of a hub model.
        chat_template: a Jinja file, for a model without a template of its own.
        chat_template_kwargs: passed to the template.
        trust_remote_code: runs code that ships with the model.
        key: the dotted config key, for messages.

    Raises:
        ConfigError: no tokenizer there, or no chat template that works.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        key: str = "model",
    ) -> None:
        self.tokenizer = _load_tokenizer(model, revision, trust_remote_code, key)
        if chat_template is not None:
            try:
                fs, path = reach(chat_template)
                self.tokenizer.chat_template = fs.cat_file(path).decode("utf-8")
            except (ImportError, OSError, ValueError) as error:
                raise ConfigError(
                    f"{key}: cannot read chat_template {chat_template} ({error}); give a Jinja file"
                ) from error
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{key}: {model} has no chat template; take an instruction-tuned model, or give `chat_template: FILE`"
            )
        self._kwargs = dict(chat_template_kwargs or {})
        self._require_template(model, key)

    def _require_template(self, model: str, key: str) -> None:
        try:
            self._render([{"role": "user", "content": "x"}])
        except Exception as error:  # the template's own code may raise anything
            why = error.__cause__ if isinstance(error, RequestRejected) else error
            if isinstance(why, TemplateSyntaxError) or not isinstance(why, TemplateError):  # else it refuses just this
                raise ConfigError(
                    f"{key}: {model}: its chat template does not work ({_said(why)}); mend it, or give "
                    "`chat_template: FILE`"
                ) from error

    @classmethod
    def of(cls, config: ModelSection, *, key: str) -> ChatTokenizer:
        """The tokenizer of the model that a section of the config names. `key` is its dotted key, for messages."""
        return cls(
            config.model,
            revision=config.revision,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
            trust_remote_code=config.trust_remote_code,
            key=key,
        )

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        tokens = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special and t.content]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def end_id(self) -> int:
        """Id of the token that ends an assistant turn: what the template puts there, else the tokenizer's eos."""
        sentinel = _sentinel()
        conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": sentinel}]
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, **self._kwargs)
        after = text.rpartition(sentinel)[2]
        ids = self.tokenizer.encode(after, add_special_tokens=False)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return ids[0] if ids and ids[0] in special else self.tokenizer.eos_token_id

    def spells_control_tokens(self, text: str) -> bool:
        """Whether `text` contains the spelling of one of this model's control tokens."""
        return self._control_tokens.search(text) is not None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins. [T]

        Equal to what vLLM's chat path makes of the same messages, except where content spells a control token.

        Raises:
            RequestRejected: the chat template refuses the conversation (roles that it does not know).
        """
        rendered = self._render(messages)
        if not any(self.spells_control_tokens(m["content"]) for m in messages):
            return self.tokenizer.encode(rendered, add_special_tokens=False)
        # Render with random sentinels in place of the content, then tokenise the template's pieces with control
        # tokens and the content's pieces without.
        sentinels = [_sentinel() for _ in messages]
        template = self._render([{"role": m["role"], "content": s} for m, s in zip(messages, sentinels, strict=True)])
        content = dict(zip(sentinels, (m["content"] for m in messages), strict=True))
        trimmed = {s: text.strip() for s, text in content.items()}
        if _fill(template, content) != rendered and _fill(template, trimmed) == rendered:
            content = trimmed  # the template trims what it is given
        ids: list[int] = []
        for piece in re.split("(" + "|".join(sentinels) + ")", template):
            if piece in content:
                ids += self.text_ids(content[piece])
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def completion_ids(self, completion: str) -> list[int]:
        """Token ids of an assistant's answer, the end token included. [T]"""
        return [*self.text_ids(completion), self.end_id]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text; a control token's spelling stays text. [T]"""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _render(self, messages: Sequence[Mapping[str, object]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True, **self._kwargs
            )
        except TemplateError as error:  # as Gemma's does for a system message
            raise RequestRejected(
                RejectReason.BAD_REQUEST, f"the model's chat template refuses this conversation ({error})"
            ) from error


class PlainPrompts:
    """Token ids for an encoder-decoder without a chat template: the messages' contents, joined by blank lines.

    Around a text stands what the model's tokenizer puts there (T5: an end; BART: a start and an end). It has the part
    of `ChatTokenizer` that engines and the trainer use, and like there a control token's spelling stays text.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that the encoder reads. [T]"""
        start, end = self._around
        return [*start, *self.text_ids("\n\n".join(message["content"] for message in messages)), *end]

    def completion_ids(self, completion: str) -> list[int]:
        """Token ids that the decoder is to predict, the end token included. [T]"""
        start, _ = self._around
        return [*start, *self.text_ids(completion), self.end_id]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text; a control token's spelling stays text. [T]"""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        ids = self.tokenizer.encode("")  # what the tokenizer puts around a text
        return (ids[:-1], ids[-1:]) if ids and ids[-1] == self.end_id else (ids, [])


Prompts = ChatTokenizer | PlainPrompts


def prompts_of(config: ModelSection, *, key: str) -> Prompts:
    """What makes token ids for the model that a section of the config names: its chat template where it has one.

    Raises:
        ConfigError: no tokenizer there, or a causal model without a chat template.
    """
    if config.chat_template is None and is_encoder_decoder(config, key=key):
        tokenizer = _load_tokenizer(config.model, config.revision, config.trust_remote_code, key)
        if not tokenizer.chat_template:
            return PlainPrompts(tokenizer)
    return ChatTokenizer.of(config, key=key)


def is_encoder_decoder(config: ModelSection, *, key: str) -> bool:
    """Whether a section of the config names a model like T5. Raises ConfigError: it cannot be loaded."""
    return bool(load_model_config(config, key=key).is_encoder_decoder)


def load_model_config(config: Any, *, key: str) -> Any:
    """The config.json of the model that a section (`model`, `revision`, `trust_remote_code`) names.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoConfig

    path = resolve_model(config.model, key=key, with_weights=False)
    try:
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # as varied as what may be wrong with a file
        raise _cannot_load(config.model, path, key, error) from error


def load_tokenizer(config: Any, *, key: str) -> Any:
    """The tokenizer of the model that a section names. Raises ConfigError: there is none."""
    return _load_tokenizer(config.model, config.revision, config.trust_remote_code, key)


def _load_tokenizer(model: str, revision: str | None, trust_remote_code: bool, key: str) -> Any:
    from transformers import AutoTokenizer  # heavy: only where a model is used

    path = resolve_model(model, key=key, with_weights=False)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as varied as what may be wrong with a file
        raise _cannot_load(model, path, key, error, "a tokenizer from ") from error


def _sentinel() -> str:
    return f"sentinel{secrets.token_hex(16)}"


def _fill(template: str, content: Mapping[str, str]) -> str:
    for sentinel, text in content.items():
        template = template.replace(sentinel, text)
    return template


def _cannot_load(model: str, path: str, key: str, error: Exception, what: str = "") -> ConfigError:
    advice = "; mend that file, or fetch the model again"
    if not Path(path).is_dir():  # a hub id
        advice = (
            f"; is {model} spelt right, and does HF_TOKEN open it if it is gated? Where there is no network: give a "
            "folder, name a mirror with HF_ENDPOINT, set HF_HUB_OFFLINE=1 for what is in the cache, or try `demo`"
        )
    return ConfigError(f"{key}: cannot load {what}{model} ({_said(error)}){advice}")


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if error is not None else ""
