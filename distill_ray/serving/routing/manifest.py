"""What `bundle.json` says: version, context, prompt form, embedder, decision, threshold, hashes of all files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from distill_ray.config import ParseConfig, SamplingConfig
from distill_ray.config.base import Config, ServerUrl
from distill_ray.config.serve import EmbedderConfig
from distill_ray.serving.routing.decision import DecisionModel

FORMAT = 1
NEVER = 2.0  # a threshold that no probability reaches: everything goes to the teacher


class PromptForm(Config):
    """How the student is asked, around what the client asks."""

    system: str | None = None
    """A system prompt that the student keeps."""

    prefix: str = ""
    """Before the last user turn's text ("predict: ")."""

    suffix: str = ""
    """Behind it."""

    def messages(self, turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation as the student was trained on it. `turns` are the client's, without the bundle's context."""
        asked = list(turns)
        last = max((n for n, turn in enumerate(asked) if turn.get("role") == "user"), default=None)
        if last is not None and (self.prefix or self.suffix):
            asked[last] = {**asked[last], "content": f"{self.prefix}{_text(asked[last]['content'])}{self.suffix}"}
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *asked]


class StudentSpec(Config):
    """What runs the student. Its files, if it has any, are the bundle's `student/`."""

    kind: Literal["full", "adapter", "remote"]
    """full: a model in Hugging Face format. adapter: LoRA, to put on `base`. remote: a server somewhere else has it."""

    base: str | None = None
    """For an adapter: the model below it. For a remote one: its name at that server."""

    base_url: ServerUrl | None = None
    """For a remote one: the server's API."""

    api_key_env: str | None = None
    """For a remote one: name of the environment variable with its key; null where it asks for none."""

    revision: str | None = None
    """Of `base`."""

    is_encoder_decoder: bool = False
    """Then vLLM cannot run it."""

    form: PromptForm = PromptForm()
    """How it is asked."""

    sampling: SamplingConfig
    """As it was asked when it was measured: greedy."""

    chat_template: str | None = None
    """File of the bundle with a template that the model's folder lacks."""

    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template."""

    control_tokens: list[str] = []
    """Text that spells one of these goes to the teacher."""

    trust_remote_code: bool = False
    """As in the run."""

    @model_validator(mode="after")
    def _is_somewhere(self) -> StudentSpec:
        if (self.kind == "remote") != (self.base_url is not None) or (self.kind == "remote" and not self.base):
            raise ValueError("a remote student, and no other, has a base_url, and its name there in base")
        return self


class Manifest(Config):
    """`bundle.json`."""

    format: Literal[1] = FORMAT
    """Of this folder."""

    version: str
    """12 hex characters: a hash of what the bundle is made from, so that the same is the same."""

    name: str
    """Of the run."""

    created: str
    """UTC, ISO 8601."""

    made_with: str
    """Version of distill-ray."""

    context: list[dict[str, str]]
    """What was distilled: in front of the client's messages on the teacher route, never on the student's."""

    parse: ParseConfig | None = None
    """Which part of the teacher's answer the student learnt; the service applies it to the teacher's answers."""

    student: StudentSpec
    """Who answers where it is good."""

    teacher: str
    """Model of the teacher that it was measured against."""

    teacher_sampling: SamplingConfig
    """Of the run."""

    embedder: EmbedderConfig
    """What makes the vectors."""

    embedder_identity: str
    """And which weights; another embedder's vectors mean nothing to this index."""

    ignore: list[str] = []
    """`serve.fingerprint.ignore` when the index was made."""

    neighbours: int
    """Nearest trained requests that are looked at."""

    model: DecisionModel
    """The score."""

    threshold: float
    """The student answers from this score on; NEVER keeps everything on the teacher."""

    far: float
    """Requests less similar than this to everything trained go to the teacher, whatever the score."""

    guard: Literal["off", "strict"]
    """With which the threshold was chosen."""

    summary: dict[str, Any]
    """The figures of calibration.json that people ask for."""

    data: str
    """Tag of the examples."""

    files: dict[str, str] = {}
    """Relative path -> sha256, of every other file. Written by `write_bundle`."""

    seal: str = ""
    """sha256 of the rest of this file. Written by `write_bundle`."""

    def sealed(self) -> Manifest:
        """With its seal."""
        return self.model_copy(update={"seal": seal_of(self.model_dump(mode="json"))})


def seal_of(record: Mapping[str, Any]) -> str:
    """sha256 of what `bundle.json` says beside its seal: as it stands there, for an older one knows fewer keys."""
    content = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _text(content: Any) -> str:
    """Content as text; parts are joined as vLLM joins them."""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content or [])
