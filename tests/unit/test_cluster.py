"""What a person is told of an error that comes out of Ray: whose it is and what it said, not how Ray wrapped it."""

from __future__ import annotations

import socket

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from distill_ray.errors import ClusterError, ConfigError
from distill_ray.pipeline.cluster import connected, own_error, raised_by

ADVICE = (
    "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\n"
    "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()` "
    "(`retried_io_errors` for I/O; `retried_map_errors` and `max_map_retries` for any task) if you believe this to be "
    "transient."
)


def wrapped(cause: Exception) -> Exception:
    """As Ray raises it on the driver, whole traceback and all."""
    error = RayTaskError("_run", f"Traceback (most recent call last):\n{type(cause).__name__}: {cause}", cause)
    outer = RuntimeError("Ray Data's own")
    outer.__cause__ = error.as_instanceof_cause()
    return outer


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (ValueError(f"no such letter: 'q'\n{ADVICE}"), "ValueError: no such letter: 'q'"),
        (ValueError(f"two\nlines\n{ADVICE}"), "ValueError: two lines"),
        (KeyError(f"label\n{ADVICE}"), "KeyError: 'label'"),
        (ZeroDivisionError(ADVICE), "ZeroDivisionError"),  # raised without a word
        (ValueError("Failed to say why"), "ValueError: Failed to say why"),
    ],
)
def test_the_innermost_error_is_named_with_its_text_and_without_rays_advice(cause: Exception, said: str) -> None:
    assert raised_by(wrapped(cause)) == said
    assert own_error(wrapped(cause)) is None


def test_of_an_actor_that_died_in_its_constructor_the_last_line_of_its_traceback_is_told() -> None:
    traceback = "Traceback (most recent call last):\n  File \"recipe.py\", line 3\nKeyError: 'cfg'\n"
    assert raised_by(ActorDiedError(RayTaskError("__init__", traceback, KeyError("cfg")))) == "KeyError: 'cfg'"
    assert raised_by(ActorDiedError()) == "The actor died unexpectedly before finishing this task."


def test_a_long_text_is_cut() -> None:
    assert len(raised_by(ValueError("x" * 10_000))) < 700


def test_our_own_errors_keep_their_message_and_lose_the_advice() -> None:
    found = own_error(wrapped(ConfigError(f"teacher.model: none there\n{ADVICE}")))
    assert isinstance(found, ConfigError)
    assert str(found) == "teacher.model: none there"


def test_a_package_that_a_worker_lacks_is_named_with_what_to_do() -> None:
    found = own_error(wrapped(ModuleNotFoundError("No module named 'vllm.engine'")))
    assert "a worker process cannot import `vllm`: install it on every node" in str(found)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_where_nobody_answers_is_said_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself tries for minutes, and hears no Ctrl-C meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens to nobody
        address = address.format(port=taken.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", address)
        said = f"RAY_ADDRESS={address}: nobody answers there .*Unset RAY_ADDRESS"
        with pytest.raises(ClusterError, match=said), connected():
            raise AssertionError("connected to nobody")
