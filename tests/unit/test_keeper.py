"""The keeper without Serve around it: what it counts, and that a folder has one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import BundleError, ServingError, StoreError
from distill_ray.serving import names
from distill_ray.serving.collecting.store import Selection, make_store
from distill_ray.serving.collecting.writer import Writer
from distill_ray.serving.front.limits import DAY
from distill_ray.serving.keeper import Keeper
from distill_ray.serving.names import AppNames
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.installed import InFolder
from distill_ray.serving.routing.moves import Moves
from distill_ray.serving.watching.second_look import Look
from tests.unit.pair_maker import pair
from tests.unit.small_bundle import write_small_bundle


@pytest.fixture(autouse=True)
def _no_students(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Keeper) -> None: ...

    monkeypatch.setattr(Keeper, "_look_after_students", nothing)


def config() -> RunConfig:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    return parse_config({"name": "small", **raw})


def with_keeper(folder: Path, ask: Callable[[Keeper], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        keeper = Keeper(config(), str(folder), AppNames("small"))
        try:
            return await ask(keeper)
        finally:
            for loop in keeper._loops:
                loop.cancel()
            keeper._occupied.close()

    return asyncio.run(run())


def test_a_folder_has_one_keeper_and_the_next_one_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "PATIENCE_S", 0.0)

    async def second(_: Keeper) -> None:
        with pytest.raises(
            ServingError, match=rf"{tmp_path}: .*keeper: pid {os.getpid()} on .+, started \d.*serve.folder"
        ):
            Keeper(config(), str(tmp_path), AppNames("small"))

    with_keeper(tmp_path, second)


def test_a_keeper_that_is_killed_leaves_the_folder_to_the_next_one(tmp_path: Path) -> None:
    held = f"from distill_ray.serving.names import occupy; file = occupy({str(tmp_path)!r}); print('held', flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{held}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    threading.Timer(0.5, process.kill).start()  # the next one waits for it

    async def status(keeper: Keeper) -> dict[str, Any]:
        return await keeper.status()

    assert with_keeper(tmp_path, status)["num_routers"] == 0
    process.wait()


def test_what_came_to_the_store_is_told_apart_from_what_was_there_or_deleted(tmp_path: Path) -> None:
    pairs = [pair("a"), pair("b")]
    store = make_store(config().serve.collect.store, tmp_path)

    async def ask(keeper: Keeper) -> dict[str, Any]:
        assert await keeper.add(pairs) == 2
        store.delete(Selection(ids=(pairs[0].pair_id,)))
        assert await keeper.add([*pairs, pair("c")]) == 1
        await keeper._count()
        assert b'distill_stored_pairs_total{result="new"} 3.0' in await keeper.exposition()
        return await keeper.status()

    status = with_keeper(tmp_path, ask)
    assert status["figures"]["stored"] == {"new": 3.0, "already_there": 2.0}
    assert (status["stored_pairs"], status["deleted_pairs"]) == (2, 1)


def test_the_status_waits_for_no_bundles_that_are_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_back = threading.Event()

    def away(self: object) -> Any:
        is_back.wait(60)
        raise BundleError("away")

    monkeypatch.setattr(Moves, "state", away)
    monkeypatch.setattr(InFolder, "versions", away)

    async def ask(keeper: Keeper) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(keeper.status(), 30)
        finally:
            is_back.set()

    assert with_keeper(tmp_path, ask)["num_routers"] == 0


def test_many_routers_wait_for_a_store_that_is_away_once_and_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over, tries = threading.Event(), list[None]()

    def away(self: Writer, pairs: object) -> int:
        tries.append(None)
        is_over.wait(60)
        raise StoreError("away")

    monkeypatch.setattr(Writer, "write", away)

    async def ask(keeper: Keeper) -> list[object]:
        adds = [asyncio.create_task(keeper.add([pair(f"{n}")])) for n in range(50)]
        try:
            await asyncio.wait_for(keeper.status(), 30)
        finally:
            is_over.set()
        return await asyncio.gather(*adds, return_exceptions=True)

    found = with_keeper(tmp_path, ask)
    assert [(type(error), str(error)) for error in found] == [(StoreError, "away")] * 50
    assert len(tries) == 1


def test_what_routers_find_at_second_looks_is_judged_told_and_survives(tmp_path: Path) -> None:
    version = "a" * 12
    summary = {"metric": "exact_match", "error_budget": 0.05, "confidence": 0.95}
    bundles = Bundles(tmp_path / "bundles")
    bundles.promote(bundles.install(write_small_bundle(tmp_path / "made", version=version, summary=summary)))
    store = make_store(config().serve.collect.store, tmp_path)
    store.add([pair("a")])
    store.mark_indexed([pair("a").pair_id], version)

    def looks(good: bool, first: int, num: int) -> list[Look]:
        return [Look(first + n, "drift", version, good, 0.9, 10, 1000.0) for n in range(num)]

    async def hear(keeper: Keeper, found: list[Look]) -> dict[str, Any]:
        today = int(time.time() // DAY) * DAY
        totals = await keeper.exchange("r1", {("drift", "", today): 10 * len(found)}, (), [], found)
        assert totals["drift", "", today] > 0
        await keeper._oversee()
        await keeper._save()
        return await keeper.status()

    status = with_keeper(tmp_path, lambda keeper: hear(keeper, looks(True, 1, 5)))
    assert status["drift"] | {"agreement_bound": None} == {
        **{"looks": 5, "agreement": 1.0, "agreement_bound": None, "budget": 0.05, "confidence": 0.95, "floor": None},
        **{"max_tokens_per_day": 200_000, "tokens_today": 50},
    }
    assert [event["what"] for event in status["events"]] == ["promoted"]
    status = with_keeper(tmp_path, lambda keeper: hear(keeper, looks(False, 6, 20)))  # after a kill
    assert bundles.current() is None
    assert [event["what"] for event in status["events"]] == ["rolled_back", "promoted"]
    assert status["drift"] is None
    assert store.count(Selection(indexed=True)) == 0
