"""A vendor trains the student (`flywheel.trainer: {type: openai}`): upload, job, wait, the resulting model's name.

    train.jsonl  validation.jsonl   the conversations, as they are uploaded
    state.json                      fingerprint, ids of files and job, result; each written before the next step

It may be killed at any point and called again: it goes on, and pays for nothing twice. An id that the vendor has given
and that was not written here yet is found again there, for files and job carry the fingerprint of conversations and
settings. Where that is another one, what was begun is left alone and a new job is made.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distill_ray.config.flywheel import OpenAITrainerConfig
from distill_ray.engines.openai import read_key
from distill_ray.errors import DistillError, FlywheelError, TrainingError, TransientEngineError
from distill_ray.flywheel.vendor_api import ENDED_BADLY, Job, VendorApi
from distill_ray.flywheel.vendor_errors import VendorErrors
from distill_ray.pipeline.folder import RunFolder
from distill_ray.records import Message

Conversation = Sequence[Message]
"""The last turn is the assistant's: what is learnt."""

MIN_EXAMPLES = 10  # https://platform.openai.com/docs/guides/supervised-fine-tuning
WAITS_S = (2.0, 5.0, 15.0, 30.0)  # between tries to make something; a vendor may need a moment to list what it has made
LONGEST_WAIT_S = 120.0
PATIENCE_S = 3600.0  # with a vendor that says nothing of a job


@dataclass(frozen=True)
class FineTuned:
    """What the vendor's job came to."""

    model: str
    """Its name at the vendor."""

    job: str
    trained_tokens: int | None
    """Billed, where the vendor says how many."""


def fine_tune(
    config: OpenAITrainerConfig,
    train: Sequence[Conversation],
    validation: Sequence[Conversation],
    folder: RunFolder,
    name: str,
    say: Callable[[str], None],
) -> FineTuned:
    """Have the vendor train on conversations, and wait for it. See the module docstring.

    Args:
        config: `flywheel.trainer`.
        train: what is learnt.
        validation: what the vendor measures its loss on; may be empty.
        folder: of the run; locked by the caller.
        name: of a folder in it, of this job's own.
        say: is told each time that something is new.

    Raises:
        ConfigError: no key, a wrong one, or a model that cannot be fine-tuned.
        TrainingError: too few conversations, or the job failed or was cancelled.
        FlywheelError: the vendor refuses, or does not answer.
    """
    if len(train) < MIN_EXAMPLES:
        raise TrainingError(
            f"flywheel.trainer: {len(train)} conversations to train on, and a vendor takes {MIN_EXAMPLES} or more; "
            "wait until more are collected"
        )
    contents = {"train": _lines(train), "validation": _lines(validation)}
    state = _State(folder, name, _fingerprint(config, contents), say)
    if state.result is not None:
        return state.result
    for part, content in contents.items():
        folder.write_bytes(content, name, f"{part}.jsonl")
    key = read_key(config.api_key_env, "flywheel.trainer.api_key_env")
    texts = {message["content"] for conversation in [*train, *validation] for message in conversation}
    api = VendorApi(config, key, VendorErrors(config, key, texts, state.path))
    try:
        return _FineTuning(config, api, state, say).run({part: c for part, c in contents.items() if c})
    except TransientEngineError as error:
        raise FlywheelError(f"{error}; run the same command again later: it goes on from here") from None
    except KeyboardInterrupt:
        if state.job is not None:
            say(f"the job {state.job} goes on at the vendor; the same command waits for it (end it there, if you like)")
        raise
    finally:
        api.close()


class _State:
    """`state.json`: what was begun. One of another fingerprint is as good as none."""

    def __init__(self, folder: RunFolder, name: str, fingerprint: str, say: Callable[[str], None]) -> None:
        self._folder, self._name = folder, name
        self.path = folder.path(name, "state.json")
        found = folder.read_json(name, "state.json") if folder.exists(name, "state.json") else {}
        if found.get("fingerprint") != fingerprint:
            if found.get("job") and not found.get("result"):
                say(f"conversations or settings have changed: the job {found['job']} is left alone at the vendor")
            found = {"fingerprint": fingerprint}
        self._content: dict[str, Any] = {"files": {}, "job": None, "result": None, **found}

    @property
    def fingerprint(self) -> str:
        """Of conversations and settings."""
        return self._content["fingerprint"]

    @property
    def files(self) -> dict[str, str]:
        """Ids by part."""
        return self._content["files"]

    @property
    def job(self) -> str | None:
        """Its id."""
        return self._content["job"]

    @property
    def result(self) -> FineTuned | None:
        """When all is done."""
        found = self._content["result"]
        return FineTuned(**found) if found is not None else None

    def note(self, **changes: Any) -> None:
        """Change it on disk."""
        self._content |= changes
        self._folder.write_json(self._content, self._name, "state.json")


class _FineTuning:
    """One job, from wherever it stands."""

    def __init__(self, config: OpenAITrainerConfig, api: VendorApi, state: _State, say: Callable[[str], None]) -> None:
        self._config, self._api, self._state, self._say = config, api, state, say

    def run(self, contents: dict[str, bytes]) -> FineTuned:
        if self._state.job is None:
            for part, content in contents.items():
                if part not in self._state.files:
                    self._upload(part, content)
            self._create()
        return self._wait()

    def _upload(self, part: str, content: bytes) -> None:
        name = f"distill-ray-{self._state.fingerprint}-{part}.jsonl"
        file = once(lambda: self._api.find_file(name), lambda: self._api.upload(name, content))
        self._state.note(files={**self._state.files, part: file})
        self._say(f"uploaded {part}.jsonl ({len(content) / 2**20:.2f} MiB): {file}")

    def _create(self) -> None:
        files, fingerprint = self._state.files, self._state.fingerprint
        try:
            job = once(
                lambda: self._api.find_job(fingerprint, files["train"]),
                lambda: self._api.create_job(fingerprint, files["train"], files.get("validation")),
            )
        except TransientEngineError:
            raise
        except DistillError:
            self._state.note(files={})  # perhaps they are gone there: the next run looks
            raise
        self._state.note(job=job)
        self._say(f"job {job}: {self._config.model} at {self._config.base_url}")

    def _wait(self) -> FineTuned:
        """Look at the job until it has ended."""
        said, heard = "", time.monotonic()
        while True:
            try:
                found = self._look()
                heard = time.monotonic()
            except TransientEngineError as error:
                if time.monotonic() - heard > PATIENCE_S:
                    raise
                found = f"no news of the job ({error}); it is asked for again every {self._config.poll_s:g} s"
            if isinstance(found, FineTuned):
                return found
            if found != said:
                self._say(found)
                said = found
            time.sleep(self._config.poll_s)

    def _look(self) -> FineTuned | str:
        """The result, or how it stands. Raises TrainingError: it ended badly."""
        assert self._state.job is not None
        job = self._api.job(self._state.job)
        if job.status == "succeeded":
            return self._succeeded(job)
        if job.status in ENDED_BADLY:
            self._state.note(job=None)  # so that the next run makes another
            why = "was cancelled there"
            if job.status == "failed":
                why = f"failed: {job.reason or 'the vendor gives no reason'}"
            raise TrainingError(
                f"the vendor's job {job.id} {why}. What was uploaded is beside {self._state.path}; the same command "
                "makes a new job"
            )
        progress = self._progress(job.id) if job.status == "running" else ""
        if job.status == "paused":
            progress = "it goes on when it is resumed at the vendor"
        return f"job {job.id}: {job.status}" + (f", {progress}" if progress else "")

    def _progress(self, job_id: str) -> str:
        """Only for people to see: without it the job goes on as well."""
        try:
            return self._api.progress(job_id)
        except DistillError:
            return ""

    def _succeeded(self, job: Job) -> FineTuned:
        if job.model is None:
            raise FlywheelError(
                f"the vendor's job {job.id} succeeded and names no model yet; run the same command again later"
            )
        result = FineTuned(job.model, job.id, job.trained_tokens)
        self._state.note(result=asdict(result))
        tokens = f", {result.trained_tokens:,} tokens trained" if result.trained_tokens is not None else ""
        self._say(f"job {result.job}: succeeded, {result.model}{tokens}")
        return result


def once(find: Callable[[], str | None], make: Callable[[], str]) -> str:
    """Id of what is there once: found, or made. A try to make it that failed may have made it, so each looks first.

    Raises:
        DistillError: it is refused; TransientEngineError: it may be made later.
    """
    waits = iter(WAITS_S)
    while True:
        found = find()
        if found is not None:
            return found
        try:
            return make()
        except TransientEngineError as error:
            wait_s, asked_s = next(waits, None), error.retry_after or 0.0
            if wait_s is None or asked_s > LONGEST_WAIT_S:
                raise
            time.sleep(max(wait_s, asked_s))


def _lines(conversations: Sequence[Conversation]) -> bytes:
    """JSON lines, as vendors read them."""
    lines = []
    for conversation in conversations:
        assert conversation[-1]["role"] == "assistant", "a conversation ends with what is learnt"
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in conversation]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _fingerprint(config: OpenAITrainerConfig, contents: dict[str, bytes]) -> str:
    """Of all that the resulting model depends on."""
    settings = config.model_dump(mode="json", include={"model", "base_url", "hyperparameters", "suffix", "extra_body"})
    hashes = {part: hashlib.sha256(content).hexdigest() for part, content in contents.items()}
    return hashlib.sha256(json.dumps([settings, hashes], sort_keys=True).encode()).hexdigest()[:32]
