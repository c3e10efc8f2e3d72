"""One runner of the flywheel at a time on a store of pairs, on whatever machines: a lease with a fencing token.

    with hold(store, service_folder, bundles) as held:     # FlywheelError: another one is at work
        ...
        held.require()                                     # LeaseLost: another one took over meanwhile
        bundles.promote(version, token=held.token)

No clocks are compared, since they differ and jump. The holder counts a beat on; who wants the lease watches by his own
monotonic clock whether it moves, and takes over when it has not for TTL_S. On one machine nobody needs to wait: a
process that has ended (kill -9) is seen at once, and so is one that has not.

A holder who was suspended, or could not reach the store, may not know yet that he is none any more. So the token, which
grows with each holder, goes along to the service's bundles: `hold` fences them, and with an older one
nothing is promoted, however late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from distill_ray.errors import FlywheelError, LeaseLost, StoreError
from distill_ray.serving.collecting.store import Lease, PairStore, Where
from distill_ray.serving.routing.bundles import Bundles

BEAT_S = 10.0
TTL_S = 60.0  # without a beat
LOOK_S = 1.0  # between two looks of who watches
_SWAPS = 10  # that may have no effect

_held: set[str] = set()  # holders that are this process


class Held:
    """A lease that is ours, for as long as nobody takes it over."""

    def __init__(self, store: PairStore, lease: Lease) -> None:
        self.token = lease.token
        self._store = store
        self._lease = lease
        self._lost: str | None = None
        self._lock = threading.Lock()

    def require(self) -> None:
        """Make sure that it is ours still, with a beat that the store took just now.

        Raises:
            LeaseLost: another runner took over.
            StoreError: the store cannot be reached, so nobody knows.
        """
        with self._lock:
            for _ in range(_SWAPS):
                if self._lost is not None:
                    raise LeaseLost(self._lost)
                after = dataclasses.replace(self._lease, beat=self._lease.beat + 1)
                if self._store.swap_lease(self._lease, after):
                    self._lease = after
                    return
                self._look()
        raise _without_effect()

    def _look(self) -> None:
        """After a swap that came to nothing, or seemed to."""
        now = self._store.lease()
        if (now.token, now.holder) == (self.token, self._lease.holder):
            self._lease = now
            return
        self._lost = (
            f"lease {self.token} of the store of pairs is lost to {_described(now)}: this run was suspended, or could "
            f"not reach the store, for {TTL_S:.0f} s. It ends here and changes nothing any more; once the other has "
            "ended, the same command goes on"
        )

    def beat_until(self, stop: threading.Event) -> None:
        """Keep it."""
        while not stop.wait(BEAT_S):
            try:
                self.require()
            except StoreError:  # may pass; `require` says it to whoever relies on the lease
                continue
            except LeaseLost:  # likewise
                return

    def release(self) -> None:
        """Let go of it, if it is ours still."""
        with self._lock:
            self._store.swap_lease(self._lease, Lease(self.token, self._lease.beat + 1))


@contextlib.contextmanager
def hold(
    store: PairStore, service_folder: str | Path, bundles: Bundles, say: Callable[[str], None] = lambda text: None
) -> Iterator[Held]:
    """Be the only one who is at work on a store. The lease is kept meanwhile, and given back in the end.

    Args:
        store: of the collected pairs.
        service_folder: of the service, for people.
        bundles: of it, which this runner may promote; those with an older token no longer may.
        say: told, for people, when the lease is watched, which may take TTL_S.

    Raises:
        FlywheelError: another runner is at work.
        LeaseLost: one with a newer lease, of another store, is at work on this service.
        StoreError, BundleError: the store, or the place of the bundles, cannot be used.
    """
    holder = secrets.token_hex(8)
    _held.add(holder)
    try:
        held = Held(store, _take(store, holder, _here(service_folder), bundles.fenced(), say))
        stop = threading.Event()
        beating = threading.Thread(target=held.beat_until, args=(stop,), name="lease", daemon=True)
        beating.start()
        try:
            bundles.fence(held.token)
            yield held
        finally:
            stop.set()
            beating.join(BEAT_S)  # it may hang on a store that is away
            if not beating.is_alive():
                with contextlib.suppress(StoreError):  # who comes next finds that its holder is gone
                    held.release()
    finally:
        _held.discard(holder)


def _take(store: PairStore, holder: str, where: Where, fenced: int, say: Callable[[str], None]) -> Lease:
    seen, since, is_told, num_swaps = store.lease(), time.monotonic(), False, 0
    while num_swaps < _SWAPS:
        alive = _is_alive(seen)
        if alive:
            raise _busy(seen)
        if alive is False or time.monotonic() - since >= TTL_S:
            # A store that is new to this service begins again; the fence of its bundles does not.
            mine = Lease(max(seen.token, fenced) + 1, 0, holder, where)
            num_swaps += 1
            if store.swap_lease(seen, mine):
                return mine
        else:
            if not is_told:
                say(f"watching for up to {TTL_S:.0f} s whether {_described(seen)} is still at work")
                is_told = True
            time.sleep(LOOK_S)
        now = store.lease()
        if now.holder == holder:
            return now
        if now != seen:
            if _is_alive(now) is not False:
                raise _busy(now)
            seen = now
    raise _without_effect()


def _here(service_folder: str | Path) -> Where:
    started = datetime.datetime.fromtimestamp(psutil.Process().create_time(), datetime.UTC)
    process = _process(os.getpid())
    return Where(
        host=socket.gethostname(),
        machine=_machine() if process else "",
        pid=os.getpid(),
        started=process[1] if process else 0,
        since=started.isoformat(timespec="seconds"),
        folder=os.path.abspath(service_folder),
    )


def _machine() -> str:
    """Names a running kernel and the pids that this process sees; empty where there is no such name (not Linux).

    A host's name would not do: containers and laptops share theirs.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, int] | None:
    """State of a process, and its start in ticks after the boot, which no clock moves; None: it cannot be read.

    See proc(5), /proc/PID/stat, fields 3 and 22. `psutil` says the start by the clock, and so another one after a jump.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])


def _is_alive(lease: Lease) -> bool | None:
    """Whether somebody has it. None: he cannot be seen from here."""
    where = lease.where
    if not lease.holder:
        return False
    if not where.machine or where.machine != _machine():
        return None
    if where.pid == os.getpid():
        return lease.holder in _held
    found = _process(where.pid)
    if found is not None:
        state, started = found
        return started == where.started and state not in ("Z", "X")
    try:  # it has ended, or /proc shows everybody only his own (hidepid)
        os.kill(where.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None


def _busy(lease: Lease) -> FlywheelError:
    return FlywheelError(
        f"another run of the flywheel is at work on this store of pairs: {_described(lease)}. Wait until it has ended, "
        "or end it; then the same command goes on"
    )


def _without_effect() -> StoreError:
    return StoreError(
        f"the store of pairs took none of {_SWAPS} swaps of its lease, and does not say why; see how it is with what "
        "serve.collect.store names"
    )


def _described(lease: Lease) -> str:
    where = lease.where
    if not lease.holder:
        return f"another run that has ended (lease {lease.token})"
    return (
        f"process {where.pid} on {where.host}, running since {where.since}, for the service in {where.folder} "
        f"(lease {lease.token})"
    )
