"""The exception tree. One message each: what is wrong, the value, where, and what to do.

    DistillError                     exit 1: the run failed
    |-- InputError                   exit 2: the config or the input is wrong
    |   |-- ConfigError              a key of the YAML, or something that it names
    |   |   `-- SeveralErrors        more than one thing is wrong
    |   `-- DataError                a source file as a whole (a bad row is a Reject, not an error)
    |       `-- NoReadableRow        the file can be opened, and not one row of it is usable: exit 1
    |-- RunFolderError               the run folder cannot be used (in use, from elsewhere, not writable)
    |-- RowError                     this row cannot be used; it becomes a Reject with `reason`
    |-- ClusterError                 Ray cannot be reached or started
    |-- TooManyRejects               the share of rejected rows passed `generate.max_reject_frac`
    |-- Interrupted                  Ctrl-C; the folder can be resumed: exit 130
    |-- TrainingError                a non-finite loss, nothing to train on, a worker that keeps dying
    |-- ServingError                 a part of the service; the request is answered all the same, where that can be
    |   |-- EmbedderError            a text has no vector (the teacher answers), or the embedder cannot be loaded
    |   |   `-- TextTooLong          the text is longer than the embedder reads
    |   |-- BundleError              a bundle, or its index, is damaged, incomplete or does not fit
    |   |-- SpoolError               what was collected cannot be kept on this machine's disk
    |   |   `-- SpoolFull            there is no room for it
    |   `-- StoreError               the store of collected pairs cannot be reached or used
    |-- FlywheelError                a cycle cannot go on; the service stays as it is
    |   `-- LeaseLost                another runner is at work on this store
    |-- ApiError                     a request to the service cannot be answered; has an HTTP status
    `-- EngineError                  an engine could not answer
        |-- RequestRejected          this request can never be answered; the row becomes a Reject with `reason`
        |-- TransientEngineError     may pass later (429, 5xx, time-out, a dead engine); `retry_after` in seconds
        `-- EngineUnavailable        no request can be answered (401, unknown model): stops the run

All of them cross process boundaries inside Ray, so they stay picklable: positional arguments only, kept in `args`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class DistillError(Exception):
    """Base of all errors that a user can meet. `exit_code` is the command's exit status."""

    exit_code = 1


class InputError(DistillError):
    """The config or the input is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A key of the configuration, or something that it names, is wrong."""


class SeveralErrors(ConfigError):
    """More than one thing is wrong.

    Args:
        errors: each of them; those that are several themselves count as what they hold.
    """

    def __init__(self, errors: Sequence[InputError]) -> None:
        held = [each for error in errors for each in (error.errors if isinstance(error, SeveralErrors) else [error])]
        self.errors = list({str(error): error for error in held}.values())
        super().__init__(errors)

    def __str__(self) -> str:
        return "\n".join([f"{len(self.errors)} things are wrong:", *(f"  - {error}" for error in self.errors)])


def raise_all(errors: Sequence[InputError]) -> None:
    """Raise what is wrong, all of it in one error, if anything is."""
    several = SeveralErrors(errors)
    if several.errors:
        raise several if several.errors[1:] else several.errors[0]


class DataError(InputError):
    """A source as a whole cannot be read."""


class NoReadableRow(DataError):
    """A file can be opened, and not one row of it is readable. Like too many rejects: the run failed."""

    exit_code = 1


class RunFolderError(DistillError):
    """The run folder cannot be used."""


def cannot_write(target: str | Path, error: OSError) -> RunFolderError:
    """What to tell of a place that takes nothing."""
    return RunFolderError(
        f"{target}: cannot write ({error.strerror or error}); check the disk's space and the folder's permissions, "
        "then run the same command again: finished work is kept"
    )


class RowError(DistillError):
    """This row cannot be used; whoever reads rows turns it into a Reject.

    Args:
        reason: a `records.RejectReason` value.
        detail: one sentence for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ClusterError(DistillError):
    """Ray cannot be reached or started."""


class TooManyRejects(DistillError):
    """The share of rejected rows passed `generate.max_reject_frac`."""


class Interrupted(DistillError):
    """Somebody pressed Ctrl-C."""

    exit_code = 130


class TrainingError(DistillError):
    """Training cannot start or go on."""


class ServingError(DistillError):
    """A part of the service does not work."""


class EmbedderError(ServingError):
    """A text has no vector, or the embedder cannot be loaded."""


class TextTooLong(EmbedderError):
    """The text is longer than the embedder reads; nothing is ever cut."""


class BundleError(ServingError):
    """A bundle, or its index, is damaged, incomplete or does not fit."""


class SpoolError(ServingError):
    """A collected pair cannot be kept on this machine's disk."""


class SpoolFull(SpoolError):
    """There is no room for it: `serve.collect.spool_mb` is used up, or the disk is full."""


class StoreError(ServingError):
    """The store of collected pairs cannot be reached or used."""


class FlywheelError(DistillError):
    """A cycle cannot go on. The service stays as it is."""


class LeaseLost(FlywheelError):
    """Another runner of the flywheel is at work on this store."""


class EngineError(DistillError):
    """An engine could not answer. `paid` holds the samples (`Completion`) of the request that it did answer."""

    paid: Sequence[Any] = ()


class RequestRejected(EngineError):
    """This request can never be answered by this engine.

    Args:
        reason: a `records.RejectReason` value.
        detail: one sentence for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class TransientEngineError(EngineError):
    """May pass later. `retry_after` is the wait in seconds that the server asked for, if it did."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after)
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class EngineUnavailable(EngineError):
    """No request can be answered: wrong key, unknown model, engine that does not start."""


class ApiError(DistillError):
    """A request to the service that cannot be answered, as the OpenAI API says it.

    Args:
        status: of the HTTP response.
        message: one sentence for a person.
        kind: OpenAI's `type`: invalid_request_error, authentication_error, rate_limit_error, server_error, ...
        param: the part of the request that is wrong, dotted.
        code: OpenAI's `code`, for programs.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message, kind, param, code, retry_after)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def first_line(error: BaseException) -> str:
    """What a foreign error says, in a line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
