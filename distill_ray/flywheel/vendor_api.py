"""A vendor's fine-tuning API as the flywheel uses it: files, jobs, and what it says of them. Through OpenAI's client.

The client's own retries (429, 5xx, lost connections) are for what is only read. What is made there is asked for once:
a request that failed may have made it all the same, so whoever asks again looks first (`vendor.once`).
https://platform.openai.com/docs/api-reference/fine-tuning
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from distill_ray.config.flywheel import OpenAITrainerConfig
from distill_ray.errors import DistillError
from distill_ray.flywheel.vendor_errors import VendorErrors, codes

T = TypeVar("T")

RETRIES = 4
CONNECT_S = 10.0
KEY = "distill_ray"  # of the job's metadata
ENDED_BADLY = frozenset({"failed", "cancelled"})
_PAGE = 100
_LAST_EVENTS = 20


@dataclass(frozen=True)
class Job:
    """What the vendor says of a job."""

    id: str
    status: str
    """validating_files, queued, running, succeeded, failed, cancelled, paused, or what a vendor calls it."""

    model: str | None
    """The resulting one, when there is one."""

    trained_tokens: int | None
    reason: str
    """Why it failed, fit to be shown."""


class VendorApi:
    """The API, with its errors as ours (see `VendorErrors.translate`).

    Args:
        config: `flywheel.trainer`.
        key: of the account; empty for none.
        errors: translates.
    """

    def __init__(self, config: OpenAITrainerConfig, key: str, errors: VendorErrors) -> None:
        from openai import OpenAI, Timeout

        self._config, self._errors = config, errors
        self._reading = OpenAI(
            api_key=key or "none",  # the client insists on one
            base_url=config.base_url,
            max_retries=RETRIES,
            timeout=Timeout(config.timeout_s, connect=CONNECT_S),
        )
        self._making = self._reading.with_options(max_retries=0)

    def close(self) -> None:
        """Close the connections."""
        self._reading.close()

    def find_file(self, name: str) -> str | None:
        """Id of an uploaded file with this name; None: there is none."""

        def find() -> str | None:
            files = _all(self._reading.files.list(purpose="fine-tune", order="desc"))
            found = (file.id for file in files if file.filename == name and getattr(file, "status", "") != "error")
            return next(found, None)

        return self._asked(find)

    def upload(self, name: str, content: bytes) -> str:
        """Returns the file's id."""
        return self._asked(lambda: _id(self._making.files.create(file=(name, content), purpose="fine-tune")))

    def find_job(self, fingerprint: str, training_file: str) -> str | None:
        """Id of a job that was made of this and did not end badly; None: there is none.

        By its metadata, or, where a vendor keeps none, by its training file: its name has the fingerprint too.
        """

        def find() -> str | None:
            for job in _all(self._reading.fine_tuning.jobs.list(limit=_PAGE, metadata={KEY: fingerprint})):
                is_ours = (job.metadata or {}).get(KEY) == fingerprint or job.training_file == training_file
                if is_ours and job.status not in ENDED_BADLY:
                    return job.id
            return None

        return self._asked(find)

    def create_job(self, fingerprint: str, training_file: str, validation_file: str | None) -> str:
        """Returns the job's id. From here on it costs money."""
        config = self._config
        optional: dict[str, Any] = {"validation_file": validation_file, "suffix": config.suffix}
        if config.hyperparameters:
            supervised = {"hyperparameters": config.hyperparameters}
            optional["method"] = {"type": "supervised", "supervised": supervised}
        return self._asked(
            lambda: _id(
                self._making.fine_tuning.jobs.create(
                    model=config.model,
                    training_file=training_file,
                    metadata={KEY: fingerprint},
                    extra_body=config.extra_body,
                    **{name: value for name, value in optional.items() if value is not None},
                )
            )
        )

    def job(self, job_id: str) -> Job:
        """How it stands."""

        def look() -> Job:
            found = self._reading.fine_tuning.jobs.retrieve(job_id)
            tokens = getattr(found, "trained_tokens", None)
            return Job(
                _id(found),
                str(found.status),
                found.fine_tuned_model or None,
                tokens if isinstance(tokens, int) else None,
                self._reason(found.error),
            )

        return self._asked(look)

    def progress(self, job_id: str) -> str:
        """The last step that an event tells of: "step 40 of 100, training loss 0.52". Empty: no event does.

        Of an event only its numbers: its message may quote a line.
        """

        def look() -> str:
            events = self._reading.fine_tuning.jobs.list_events(job_id, limit=_LAST_EVENTS).data or []
            steps = [event.data for event in events if isinstance(event.data, dict)]
            steps = [step for step in steps if isinstance(step.get("step"), int)]
            if not steps:
                return ""
            last = max(steps, key=lambda step: step["step"])
            total, loss = last.get("total_steps"), last.get("train_loss")
            said = f"step {last['step']}" + (f" of {total}" if isinstance(total, int) else "")
            return said + (f", training loss {loss:.3g}" if isinstance(loss, int | float) else "")

        return self._asked(look)

    def _reason(self, error: Any) -> str:
        said = {name: str(getattr(error, name, None) or "") for name in ("message", "code", "param")}
        which = codes(said["code"], said["param"])
        return self._errors.shown(said["message"]) + (f" ({which})" if which else "")

    def _asked(self, ask: Callable[[], T]) -> T:
        """Raised outside of `except`: no traceback shows the client's own error, which holds what was sent."""
        import openai

        failure: DistillError
        try:
            return ask()
        except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:  # the last three: no such answer
            failure = self._errors.translate(error)
        raise failure


def _all(page: Any) -> Iterator[Any]:
    """What a list holds, page after page. Raises TypeError: it is none, which is not the same as an empty one."""
    if not isinstance(page.data, list):
        raise TypeError("no list")
    seen: set[str] = set()
    for item in page:
        if item.id in seen:  # some servers know no pages, and would send the first one for ever
            return
        seen.add(item.id)
        yield item


def _id(made: Any) -> str:
    if not (isinstance(made.id, str) and made.id):
        raise ValueError("without an id")
    return made.id
