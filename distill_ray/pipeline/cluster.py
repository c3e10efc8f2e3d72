"""Connect to Ray: the cluster in `RAY_ADDRESS` when set, else a local Ray of this command's own.

`address="local"` on purpose: a killed head leaves `ray_current_cluster` behind, and a plain `ray.init()` would join
whatever that file names.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator

import ray
import ray.data
import ray.exceptions
from ray._private import ray_constants

from distill_ray.errors import ClusterError, DistillError, first_line
from distill_ray.pipeline.capacity import placement_groups_removed
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import waiting

# Ray talks on the driver's terminal; progress and errors there are ours. Its own logs stay in its session folder.
_QUIET = {
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning that GPUs will one day not be hidden
}

ANSWER_S = 10.0  # within which somebody has to answer at RAY_ADDRESS
SAID_CHARS = 600  # of a foreign error, in our message
_ADVICE = re.compile(r"(?:\A|\n)Failed to [^\n]* after \d+/\d+ attempts .*", re.DOTALL)
_LACKING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


@contextlib.contextmanager
def connected(num_cpus: float | None = None) -> Iterator[None]:
    """Be connected to Ray inside the block; what its engines held of the cluster is free again afterwards.

    Inside an existing connection (tests, jobs, a stage of a run) nothing is connected anew.

    Args:
        num_cpus: CPUs that a Ray of our own counts at least, for processes that mostly wait.
    """
    with _connection(num_cpus), placement_groups_removed():
        yield


@contextlib.contextmanager
def _connection(num_cpus: float | None) -> Iterator[None]:
    # Ray Data's own wrapper forgets its cause when it is pickled, and with it our message.
    context = ray.data.DataContext.get_current()
    context.raise_original_map_exception = True
    context.enable_progress_bars = False  # it would draw over our display, on a terminal only
    # One of them asks for an actor's options to look at them, which makes a placement group that no actor is for.
    context.issue_detectors_config.detectors = []
    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS") or "local"
    on_terminate = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="distill-ray-", ignore_cleanup_errors=True) as scratch:
        if address == "local":
            os.environ.setdefault("VLLM_RPC_BASE_PATH", scratch)  # its sockets, which it leaves behind
        _require_somebody(address)
        what = "starting Ray" if address == "local" else f"connecting to Ray at {address}"
        alone = on_loopback() if address == "local" else contextlib.nullcontext()
        with warnings.catch_warnings(), _translated(address), waiting(what), alone:
            warnings.simplefilter("ignore")
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
                num_cpus=max(math.ceil(num_cpus), os.cpu_count() or 1) if num_cpus and address == "local" else None,
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's own ends the process without a word
        for name in ("ray", "ray.data", "ray.train", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()
            if os.environ.get("VLLM_RPC_BASE_PATH") == scratch:
                del os.environ["VLLM_RPC_BASE_PATH"]


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Have a Ray that is started in the block listen on loopback alone.

    It binds its sockets to all addresses except on Windows and macOS, which it takes for machines that are in no
    cluster (`ray_constants.ENABLE_RAY_CLUSTER`; Ray's issue 18730). A Ray of our own is in none either.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, was_enabled = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name] = "0"  # for the processes that it starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_enabled
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _require_somebody(address: str) -> None:
    """Raises ClusterError: nobody answers there. Ray itself would try for minutes, deaf to Ctrl-C."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal():
        return  # "local", "auto": nothing to ask
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: nobody answers there ({first_line(error)}); is the cluster up, and is this its "
            "address? Unset RAY_ADDRESS to use this machine alone"
        ) from error


@contextlib.contextmanager
def _translated(address: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, ValueError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: cannot connect to Ray ({first_line(error)}); is that a Ray cluster, and does "
            "this process have its token (RAY_AUTH_TOKEN, or the file ~/.ray/auth_token)?"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ClusterError(
            f"RAY_ADDRESS={address}: {' '.join(str(error).split())}; use the cluster's versions here, or submit a job "
            "(`ray job submit`), which runs with the cluster's own"
        ) from error


def own_error(error: BaseException) -> DistillError | None:
    """The distill-ray error behind what Ray raised, or None: Ray wraps what a worker raises several times over."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        # Ray's wrapper may also inherit from the class of its cause, with a whole traceback as its message.
        if isinstance(current, DistillError) and not isinstance(current, ray.exceptions.RayError):
            _drop_advice(current)
            return current
        pending += [current.__context__, current.__cause__, getattr(current, "cause", None)]
    if lacking := _LACKING.match(raised_by(error)):  # perhaps our own: then nothing of ours could say so there
        return ClusterError(
            f"a worker process cannot import `{lacking[1]}`: install it on every node (jobs/Dockerfile has all that is "
            "needed), or name it in the job's runtime environment"
        )
    return None


def raised_by(error: BaseException) -> str:
    """What was raised inside a worker, in one line without Ray's wrappers: "ValueError: its text"."""
    inner = _behind_wrappers(error)
    _drop_advice(inner)
    if isinstance(inner, ray.exceptions.RayError):  # its text is a whole traceback
        lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
        text = lines[-1] if lines else type(inner).__name__
    else:
        text = ": ".join(part for part in (type(inner).__name__, " ".join(str(inner).split())) if part)
    return text if len(text) <= SAID_CHARS else f"{text[: SAID_CHARS - 3]}..."


def keep_traceback(error: BaseException, folder: RunFolder) -> str:
    """Write a foreign error's traceback, which Ray brought here, to the run's log; says where that is.

    A stage has sent this process's error stream to the log (`progress.noise_to`); a run on a store has none.
    """
    with contextlib.suppress(OSError):  # its disk may be what is full
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.flush()
    return f"its traceback is in {folder.path('logs', 'driver.log')}" if folder.is_local else "its traceback is above"


def _behind_wrappers(error: BaseException) -> BaseException:
    """The first error with a `cause` of Ray's leads to what the worker raised; without one it is the error itself."""
    found = [error]
    for current in found:
        cause = getattr(current, "cause", None)
        if isinstance(cause, BaseException) and cause not in found:
            return _behind_wrappers(cause)
        found += [e for e in (current.__cause__, current.__context__) if e is not None and e not in found]
    return error


def _drop_advice(error: BaseException) -> None:
    """Ray Data adds advice about its own retries to the first argument of whatever a worker raises."""
    kept = [_ADVICE.sub("", arg) if isinstance(arg, str) else arg for arg in error.args]
    if kept != list(error.args):
        error.args = tuple(arg for arg in kept if arg != "")


def redirect_output(folder: RunFolder, name: str) -> None:
    """Send this worker process's (and its children's) output to `logs/<name>.log` of a local run folder.

    vLLM and DeepSpeed talk a lot, at start and when they are shut down; none of it belongs on a terminal.
    """
    if not folder.is_local:
        return
    path = folder.local("logs", f"{name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
