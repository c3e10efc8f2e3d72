"""The keeper without Serve around it: what it counts, and that a folder has one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.serving.collecting.store import Selection, make_store
from distill_ray.serving.keeper import Keeper
from distill_ray.serving.names import AppNames
from tests.unit.pair_maker import pair


@pytest.fixture(autouse=True)
def _no_students(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Keeper) -> None: ...

    monkeypatch.setattr(Keeper, "_students", nothing)


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

    return asyncio.run(run())


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
