"""Folders of a store on this node's disk: fetched once, whole or not at all. The store is fsspec's in memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from distill_ray import node_cache
from distill_ray.node_cache import cache_root, fetched, filled_once, forget

URL = "memory://models/small"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.pipe({"/models/small/config.json": b"{}", "/models/small/weights/a.bin": b"abc", "/models/smaller/x": b"no"})
    yield fs
    fs.rm("/models", recursive=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_a_store_is_fetched_once_for_each_mark(store: fsspec.AbstractFileSystem) -> None:
    first = fetched(URL, "1")
    assert contents(first) == {"config.json": b"{}", "weights/a.bin": b"abc"}
    assert first.is_relative_to(cache_root())
    store.pipe("/models/small/config.json", b"[]")
    assert fetched(URL, "1") == first
    assert contents(first)["config.json"] == b"{}"
    assert contents(fetched(URL, "2"))["config.json"] == b"[]"
    forget(URL, "1")
    assert contents(fetched(URL, "1"))["config.json"] == b"[]"


def test_only_what_is_wanted_is_fetched() -> None:
    assert contents(fetched(URL, "light", wanted=lambda name: not name.startswith("weights/"))) == {
        "config.json": b"{}"
    }


class Crowded(AsyncFileSystem):
    """A store that counts who fetches at once."""

    at_once = most_at_once = 0

    def find(self, path: str, **options: Any) -> list[str]:
        return [f"{path}/shard-{number:02}.safetensors" for number in range(30)]

    async def _get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.001)
        Path(lpath).write_text(rpath)
        self.at_once -= 1


def test_few_of_a_models_files_are_on_their_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = Crowded()
    monkeypatch.setattr(node_cache, "reach", lambda url: (fs, "models/large"))
    assert len(contents(fetched("crowded://models/large", "1"))) == 30
    assert 1 < fs.most_at_once <= node_cache.AT_ONCE


def test_what_the_check_refuses_is_not_there_and_is_fetched_again() -> None:
    seen: list[Path] = []

    def refuse(folder: Path) -> None:
        seen.append(folder)
        raise ValueError("not what was written")

    for _ in range(2):
        with pytest.raises(ValueError, match="not what was written"):
            fetched(URL, "1", check=refuse)
    assert not [path for path in cache_root().rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert fetched(URL, "1", check=lambda folder: seen.append(folder)) not in seen


def test_a_name_that_leads_out_of_the_folder_is_refused(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    store.store["/models/small/../../../escaped.json"] = store.store["/models/small/config.json"]
    try:
        with pytest.raises(ValueError, match=r"\.\./escaped\.json is no name of a file in it"):
            fetched(URL, "1")
    finally:
        del store.store["/models/small/../../../escaped.json"]
    assert not list(tmp_path.rglob("escaped.json"))


def test_threads_that_want_the_same_folder_wait_for_the_one_that_fills_it(tmp_path: Path) -> None:
    filled: list[Path] = []
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: filled_once(tmp_path / "folder", filled.append), range(6)))
    assert found == [tmp_path / "folder"] * 6
    assert len(filled) == 1


PROCESS = """
import os, sys
from pathlib import Path
from distill_ray.node_cache import filled_once

def fill(folder):
    (folder / str(os.getpid())).touch()

print("ready", flush=True)
sys.stdin.readline()
print(len(list(filled_once(Path(sys.argv[1]), fill).iterdir())), flush=True)
"""


def test_processes_of_a_node_fill_a_folder_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "folder")]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert [json.loads(process.communicate("go\n", timeout=60)[0]) for process in running] == [1] * 4
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert len(list((tmp_path / "folder").iterdir())) == 1
