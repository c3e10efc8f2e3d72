"""From spool to store: in order, once, and nothing lost while the store is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config.serve import StoreConfig
from distill_ray.errors import StoreError
from distill_ray.object_store import ObjectStoreError
from distill_ray.serving.collecting import writer as writer_module
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.spool import Spool
from distill_ray.serving.collecting.store import PairStore, make_store
from distill_ray.serving.collecting.writer import LONGEST_WAIT_S, Drain, Writer
from tests.unit.pair_maker import pair, pairs

ROOT = Path(__file__).parents[2]
MANY = 2**24


class Away:
    """Delivers to a list, unless it is told to fail."""

    def __init__(self) -> None:
        self.got: list[Pair] = []
        self.is_away = False
        self.sizes: list[int] = []

    def __call__(self, batch: list[Pair]) -> None:
        self.sizes.append(len(batch))
        if self.is_away:
            raise ConnectionError("the writer's machine is gone")
        self.got += batch


def wait_for(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.01)


def test_while_the_store_is_away_appends_go_on_and_nothing_is_lost(tmp_path: Path) -> None:
    spool, store = Spool(tmp_path, MANY), Away()
    failures: list[Exception] = []
    drain = Drain(spool, store, batch=4, flush_s=1, failed=failures.append)
    kept = pairs(10)
    store.is_away = True
    for each in kept[:6]:
        spool.append(each)
        assert not drain.flush()
    assert (len(failures), drain.num_delivered, store.got) == (6, 0, [])
    store.is_away = False
    for each in kept[6:]:
        spool.append(each)
    assert drain.flush()
    assert store.got == kept
    assert (drain.num_delivered, spool.num_bytes) == (10, 0)


def test_a_drain_delivers_what_a_process_left_that_ended_meanwhile(tmp_path: Path) -> None:
    other, store = Spool(tmp_path, MANY), Away()
    drain = Drain(Spool(tmp_path, MANY), store, batch=4, flush_s=1, failed=print)
    other.append(pair())
    assert drain.flush()
    assert store.got == []
    other.close()
    assert drain.flush()
    assert store.got == [pair()]


def test_batches_become_smaller_while_they_fail_and_waits_longer(tmp_path: Path) -> None:
    spool, store = Spool(tmp_path, MANY), Away()
    drain = Drain(spool, store, batch=8, flush_s=1, failed=print)
    for each in pairs(20):
        spool.append(each)
    assert drain.wait_s == 1
    store.is_away = True
    for _ in range(5):
        drain.flush()
    assert store.sizes == [8, 4, 2, 1, 1]
    assert 16 <= drain.wait_s <= 32
    for _ in range(2000):
        drain.flush()
    assert LONGEST_WAIT_S / 2 <= drain.wait_s <= LONGEST_WAIT_S
    store.is_away = False
    store.sizes.clear()
    drain.flush()
    assert store.sizes == [1, 8, 8, 3]
    assert drain.wait_s == 1


def test_the_thread_delivers_within_the_interval_and_once_more_at_the_end(tmp_path: Path) -> None:
    spool, store = Spool(tmp_path, MANY), Away()
    drain = Drain(spool, store, batch=4, flush_s=0.01, failed=print)
    drain.start()
    spool.append(pair("a"))
    wait_for(lambda: len(store.got) == 1)
    drain.close()
    slow = Drain(spool, store, batch=4, flush_s=1000, failed=print)
    slow.start()
    spool.append(pair("b"))
    slow.close()
    assert [each.messages for each in store.got] == [pair("a").messages, pair("b").messages]


def test_an_append_does_not_wait_for_a_delivery_that_hangs(tmp_path: Path) -> None:
    spool, go_on = Spool(tmp_path, MANY), threading.Event()
    drain = Drain(spool, lambda _: go_on.wait(20), batch=1, flush_s=0.001, failed=print)
    spool.append(pair("a"))
    drain.start()
    time.sleep(0.05)
    began = time.monotonic()
    for each in pairs(50):
        spool.append(each)
    took_s = time.monotonic() - began
    go_on.set()
    drain.close()
    assert took_s < 5
    assert drain.num_delivered == 51


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), max_size=12))
def test_any_mix_of_failures_and_restarts_delivers_each_pair_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool, store = Spool(folder, MANY), Away()
    kept = pairs(sum(count for count, _, _ in steps))
    left = iter(kept)
    for count, is_away, is_restarted in steps:
        for _ in range(count):
            spool.append(next(left))
        store.is_away = is_away
        Drain(spool, store, batch=3, flush_s=1, failed=print).flush()
        if is_restarted:
            spool.close()
            spool = Spool(folder, MANY)
    store.is_away = False
    assert Drain(spool, store, batch=3, flush_s=1, failed=print).flush()
    assert store.got == kept
    spool.close()


class Flaky:
    """Opens stores that fail so many times."""

    def __init__(self, folder: Path, num_failures: int) -> None:
        self.folder, self.num_failures, self.num_opened = folder, num_failures, 0

    def __call__(self) -> PairStore:
        self.num_opened += 1
        store = make_store(StoreConfig(), self.folder)
        if self.num_failures:
            self.num_failures -= 1
            store.add = self._fail  # pyright: ignore[reportAttributeAccessIssue]
        return store

    def _fail(self, _: object) -> int:
        raise StoreError("away")


def test_a_connection_that_broke_is_made_anew(tmp_path: Path) -> None:
    opened = Flaky(tmp_path, num_failures=1)
    writer = Writer(opened, compact_s=1000)
    assert writer.write(pairs(3)) == 3
    assert writer.write([*pairs(3), pair("new")]) == 1
    assert (writer.num_stored, writer.num_passed_over, writer.num_failures) == (4, 3, 0)
    assert opened.num_opened == 2


def test_a_store_that_is_away_is_said_and_counted_and_tried_again_next_time(tmp_path: Path) -> None:
    writer = Writer(Flaky(tmp_path, num_failures=2), compact_s=1000)
    with pytest.raises(StoreError, match="away"):
        writer.write(pairs(1))
    assert (writer.num_failures, writer.num_stored) == (1, 0)
    assert writer.write(pairs(1)) == 1


def test_a_bucket_that_was_asked_patiently_is_not_asked_twice(tmp_path: Path) -> None:
    def away() -> PairStore:
        opened.append(None)
        raise StoreError("away") from ObjectStoreError("the store failed 9 times")

    opened: list[None] = []
    writer = Writer(away, compact_s=1000)
    with pytest.raises(StoreError, match="away"):
        writer.write(pairs(1))
    assert (len(opened), writer.num_failures) == (1, 1)


def test_the_store_is_compacted_on_schedule_and_a_failure_of_that_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    store = make_store(StoreConfig(), tmp_path)
    writer = Writer(lambda: store, compact_s=10, clock=lambda: now)
    compactions: list[float] = []

    def compact() -> None:
        compactions.append(now)
        if now < 20:
            raise StoreError("busy")

    monkeypatch.setattr(store, "compact", compact)
    for now in (1.0, 9.0, 11.0, 12.0, 21.0, 22.0, 31.5):
        assert writer.write([pair(f"at {now}")]) == 1
    assert compactions == [11.0, 11.0, 21.0, 31.5]  # the first time it is tried twice
    assert (writer.num_compactions, writer.num_failures, writer.num_stored) == (2, 1, 7)


def test_many_small_writes_are_compacted_before_it_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MOST_WRITES", 3)
    store = make_store(StoreConfig(), tmp_path)
    writer = Writer(lambda: store, compact_s=1000)
    counts = []
    for number in range(7):
        writer.write([pair(f"at {number}")])
        counts.append(writer.num_compactions)
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    assert store.count() == 7


# Collects and stores for ever; says each id when its append has returned, and how many the store had by then.
ROUTER = """
import itertools, sys
from distill_ray.config.serve import StoreConfig
from distill_ray.serving.collecting.spool import Spool
from distill_ray.serving.collecting.store import make_store
from distill_ray.serving.collecting.writer import Drain, Writer
from tests.unit.pair_maker import pair
folder, name = sys.argv[1:]
spool = Spool(folder + "/spool", 2**24)
writer = Writer(lambda: make_store(StoreConfig(), folder), compact_s=0.05)
Drain(spool, writer.write, batch=16, flush_s=0.001, failed=print).start()
for number in itertools.count():
    each = pair(f"{name} {number}")
    spool.append(each)
    print(each.pair_id, writer.num_stored, flush=True)
"""


def said_by(line: str) -> tuple[str, int]:
    pair_id, num_stored = line.split()
    return pair_id, int(num_stored)


def test_kill_9_of_router_and_writer_at_any_moment_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    said: set[str] = set()
    for life in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", ROUTER, str(tmp_path), f"life {life}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        num_stored = 0
        while num_stored < 40 + 13 * life:  # so the kill meets a writer at work
            pair_id, num_stored = said_by(process.stdout.readline())
            said.add(pair_id)
        process.send_signal(signal.SIGKILL)
        said |= {said_by(line)[0] for line in process.communicate()[0].split("\n")[:-1]}
    store = make_store(StoreConfig(), tmp_path)
    writer = Writer(lambda: store, compact_s=1000)
    assert Drain(Spool(tmp_path / "spool", MANY), writer.write, batch=256, flush_s=1, failed=print).flush()
    found = [i for batch in store.scan(columns=["pair_id"]) for i in batch["pair_id"].to_pylist()]
    assert len(found) == len(set(found))
    assert said <= set(found)
    assert len(found) - len(said) <= 2  # one a life: written, and killed before it could say so
