"""The run folder: whole files, one run at a time, clear words when a disk says no."""

from __future__ import annotations

import builtins
import io
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distill_ray.errors import DistillError, RunFolderError
from distill_ray.pipeline.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_file_written_is_a_file_read(folder: RunFolder) -> None:
    folder.write_json({"a": 1}, "eval", "metrics.json")
    assert folder.read_json("eval", "metrics.json") == {"a": 1}
    assert folder.list("eval") == ["metrics.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_bytes(b"old", "x", "file")

    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFolderError, match=r"No space left on device.*run the same command again"):
        folder.write_bytes(b"new", "x", "file")
    assert folder.read_bytes("x", "file") == b"old"
    assert os.listdir(folder.path("x")) == ["file"]


def test_lines_that_a_full_disk_takes_in_part_are_not_there(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.append_metrics({"step": 1})
    before = folder.read_bytes("metrics.jsonl")

    class NearlyFull(io.FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(data[:10])

    monkeypatch.setattr(builtins, "open", lambda path, mode, buffering: NearlyFull(path, mode))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot write \(only 10 of .*the disk's space"):
        folder.append_metrics({"step": 2})
    monkeypatch.undo()
    assert folder.read_bytes("metrics.jsonl") == before
    folder.append_metrics({"step": 2})
    assert folder.read_bytes("metrics.jsonl").count(b"\n") == 2


def test_the_manifest_is_merged_section_by_section(folder: RunFolder) -> None:
    folder.update_manifest({"seconds": {"generate": 1}, "rows_in": 3})
    folder.update_manifest({"seconds": {"train": 2}})
    assert folder.manifest() == {"seconds": {"generate": 1, "train": 2}, "rows_in": 3}


def test_a_damaged_table_is_named(folder: RunFolder) -> None:
    folder.write_table(pa.table({"a": [1]}), "rows", "00000.parquet")
    data = folder.read_bytes("rows", "00000.parquet")
    folder.write_bytes(data[: len(data) // 2], "rows", "00000.parquet")
    with pytest.raises(RunFolderError, match=r"rows/00000\.parquet: damaged"):
        folder.read_table("rows", "00000.parquet")


@pytest.mark.parametrize("root", ["disk", "memory://rows-of-a-run"])
def test_rows_are_counted_without_reading_them(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / root if root == "disk" else root)
    assert folder.num_rows("examples") == 0
    for number in range(20):
        folder.write_table(pa.table({"a": list(range(number))}), "examples", f"{number:05}.parquet")
    folder.write_bytes(b"not a table", "examples", "notes.txt")
    monkeypatch.setattr(folder, "read_bytes", None)
    assert folder.num_rows("examples") == sum(range(20))
    folder.write_bytes(b"PAR1 and nothing more", "examples", "00007.parquet")
    with pytest.raises(RunFolderError, match=r"examples/00007\.parquet: damaged"):
        folder.num_rows("examples")


def test_a_folder_survives_pickling(folder: RunFolder) -> None:
    folder.write_bytes(b"1", "a")
    assert pickle.loads(pickle.dumps(folder)).read_bytes("a") == b"1"


def test_an_object_store_behaves_like_a_disk() -> None:
    folder = RunFolder("memory://test-folder/run")
    folder.write_json({"a": 1}, "eval", "metrics.json")
    folder.write_table(pa.table({"a": [1, 2]}), "rows", "00000.parquet")
    folder.append_metrics({"stage": "train"})
    folder.append_metrics({"stage": "train"})
    assert folder.exists("eval", "metrics.json")
    assert folder.list("rows", suffix=".parquet") == ["00000.parquet"]
    assert folder.read_table("rows", "00000.parquet").num_rows == 2
    assert folder.read_bytes("metrics.jsonl").count(b"\n") == 2
    folder.delete("rows")
    assert not folder.exists("rows")


@pytest.mark.parametrize("root", ["here", "memory://removed/run"])
def test_a_file_that_is_removed_is_gone_and_one_that_is_not_there_is_fine(root: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / root if root == "here" else root)
    folder.write_json({}, "done", "0.json")
    folder.write_json({}, "done", "1.json")
    folder.remove("done", "0.json")
    folder.remove("done", "0.json")
    assert folder.list("done") == ["1.json"]


@pytest.mark.parametrize("root", ["here", "memory://several/run"])
def test_several_json_files_are_read_at_once(root: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / root if root == "here" else root)
    for n in range(3):
        folder.write_json({"n": n}, "done", f"{n}.json")
    assert folder.read_jsons("done", names=["0.json", "2.json"]) == {"0.json": {"n": 0}, "2.json": {"n": 2}}
    assert folder.read_jsons("done", names=[]) == {}
    folder.write_bytes(b"[1]", "done", "1.json")
    with pytest.raises(RunFolderError, match=r"done/1\.json: damaged"):
        folder.read_jsons("done", names=["0.json", "1.json"])
    with pytest.raises(FileNotFoundError):
        folder.read_jsons("done", names=["9.json"])


def _hold(root: str, ready: multiprocessing.synchronize.Event, stop: multiprocessing.synchronize.Event) -> None:
    with RunFolder(root).locked():
        ready.set()
        stop.wait(600)


def test_a_second_run_on_a_folder_is_refused_with_the_first_ones_process(folder: RunFolder) -> None:
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(folder.root, ready, stop))
    process.start()
    try:
        assert ready.wait(600)
        with pytest.raises(RunFolderError, match=rf"pid {process.pid} on .+, started \d"), folder.locked():
            pass
    finally:
        stop.set()
        process.join()
    with folder.locked():
        pass


@pytest.mark.parametrize("url", ["s3://", "s3:///runs/a"])
def test_an_address_without_a_bucket_is_named(url: str) -> None:
    with pytest.raises(DistillError, match=f"{url} names no bucket; an address is s3://BUCKET/FOLDER"):
        RunFolder(url)


def test_a_name_that_no_bucket_can_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is asked
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(DistillError, match=r"'Bad_Bucket!' is no name of a bucket; an address is s3://BUCKET/FOLDER"):
        RunFolder("s3://Bad_Bucket!/a").exists("config.yaml")
