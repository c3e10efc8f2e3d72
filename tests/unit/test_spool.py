"""The spool survives kill -9 of a real process, loses no pair whose append returned, and stays within its bound."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.errors import SpoolError, SpoolFull
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.spool import Spool
from tests.unit.pair_maker import pair, pairs

ROOT = Path(__file__).parents[2]
MANY = 2**20

# Appends for ever, and says each id when its append has returned.
WRITER = """
import itertools, sys
sys.path.insert(0, "tests/unit")
from tests.unit.pair_maker import pair
from distill_ray.serving.collecting.spool import Spool
spool = Spool(sys.argv[1], 2**30)
for number in itertools.count():
    each = pair(f"question {number}", idempotency_key=f"{sys.argv[2]} {number}")
    spool.append(each)
    print(each.pair_id, flush=True)
"""


def start_writer(folder: Path, name: str = "w") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def kill(writer: subprocess.Popen[str]) -> list[str]:
    """What it had said before it died."""
    writer.send_signal(signal.SIGKILL)
    rest = writer.communicate()[0]
    return rest.split("\n")[:-1]


def drain(spool: Spool, max_pairs: int = 100) -> list[Pair]:
    drained = []
    while (batch := spool.take(max_pairs)).pairs:
        drained += batch.pairs
        spool.ack(batch)
    return drained


def fill(spool: Spool) -> list[Pair]:
    """Append until it is full; what it took."""
    kept = []
    with contextlib.suppress(SpoolFull):
        for each in pairs(1000):
            spool.append(each)
            kept.append(each)
    return kept


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_pairs_come_back_in_order_and_leave_nothing_behind(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MANY)
    kept = pairs(10)
    for each in kept:
        spool.append(each)
    assert spool.num_bytes == sum(file.stat().st_size for file in files(tmp_path)) > 0
    assert drain(spool, max_pairs=3) == kept
    assert spool.num_bytes == 0
    assert files(tmp_path) == []


def test_what_is_not_acked_is_taken_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MANY)
    first, second, third = pairs(3)
    spool.append(first)
    spool.append(second)
    lost = spool.take(1)
    assert lost.pairs == spool.take(1).pairs == [first]
    spool.ack(lost)
    spool.append(third)
    everything = spool.take(9)
    assert everything.pairs == [second, third]
    spool.ack(everything)
    spool.ack(everything)  # twice is once
    assert spool.take(9).pairs == []


def test_kill_9_loses_no_pair_whose_append_returned(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, name) for name in ("a", "b")]
    said: list[str] = []
    for writer in writers:
        assert writer.stdout is not None
        said += [writer.stdout.readline().strip() for _ in range(50)]
    for writer in writers:
        said += kill(writer)
    spool = Spool(tmp_path, MANY)
    found = [each.pair_id for each in drain(spool)]
    assert len(found) == len(set(found))
    assert set(said) <= set(found)
    assert len(found) - len(said) <= 2  # written, and killed before it could say so
    assert spool.num_damaged == 0
    assert files(tmp_path) == []


def test_a_living_process_is_not_inherited_from_and_a_dead_one_is(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    assert writer.stdout is not None
    first = writer.stdout.readline().strip()
    spool = Spool(tmp_path, MANY)
    assert spool.take(10).pairs == []
    kill(writer)
    assert spool.inherit() == 1
    assert spool.take(10).pairs[0].pair_id == first


def test_a_pair_is_inherited_by_one_only(tmp_path: Path) -> None:
    first = Spool(tmp_path, MANY)
    first.append(pair())
    first.close()
    one, other = Spool(tmp_path, MANY), Spool(tmp_path, MANY)
    assert (len(one.take(9).pairs), len(other.take(9).pairs)) == (1, 0)
    one.close()
    assert other.inherit() == 1
    assert other.take(9).pairs == [pair()]


def test_a_file_that_its_owner_deletes_just_now_is_not_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Spool(tmp_path, MANY)
    first.append(pair())
    first.close()
    [file] = files(tmp_path)
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: (file.unlink(), flock(fd, how)))
    assert Spool(tmp_path, MANY).take(9).pairs == []


def test_a_batch_is_bounded_in_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_ray.serving.collecting.spool.BATCH_BYTES", 2000)
    spool = Spool(tmp_path, MANY)
    kept = [pair("x" * 5000), *pairs(20)]
    for each in kept:
        spool.append(each)
    assert spool.take(99).pairs == kept[:1]
    assert drain(spool, 99) == kept


@settings(max_examples=60)
@given(cut=st.integers(min_value=0), flip=st.none() | st.integers(min_value=0))
def test_a_torn_or_changed_line_is_dropped_and_counted_and_the_others_stay(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int | None
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder, MANY)
    kept = pairs(4)
    for each in kept:
        spool.append(each)
    spool.close()
    [file] = files(folder)
    data = bytearray(file.read_bytes())
    whole = bytes(data).splitlines()
    del data[len(data) - cut % len(data) :]  # at least one byte is left
    if flip is not None:
        data[flip % len(data)] ^= 0x55
    file.write_bytes(data)
    good = [each for each, line in zip(kept, whole, strict=True) if line in bytes(data).split(b"\n")]
    spool = Spool(folder, MANY)
    assert drain(spool) == good
    assert (spool.num_damaged > 0) == (bytes(data).removesuffix(b"\n").split(b"\n") != whole[: len(good)])
    assert files(folder) == []


def test_a_full_spool_refuses_and_takes_again_when_the_store_has_some(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 20_000)
    kept = fill(spool)
    with pytest.raises(SpoolFull, match="spool_mb"):
        spool.append(pair())
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 20_000
    assert len(files(tmp_path)) > 2  # so that room comes back before all of it is stored
    spool.ack(spool.take(len(kept) // 2))
    spool.append(pair())
    assert drain(spool) == [*kept[len(kept) // 2 :], pair()]


def test_room_that_others_left_full_counts(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 20_000)
    fill(spool)
    spool.close()
    with pytest.raises(SpoolFull):
        Spool(tmp_path, 20_000).append(pair())


def test_a_full_disk_leaves_no_half_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, MANY)
    first, second, third = pairs(3)
    spool.append(first)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(SpoolFull, match="No space left"):
        spool.append(second)
    monkeypatch.setattr(os, "write", write)
    spool.append(third)
    assert drain(spool) == [first, third]
    assert spool.num_damaged == 0


def test_a_disk_without_room_for_another_file_costs_no_file_handles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(tmp_path, MANY)
    monkeypatch.setattr(os, "rename", fail)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(SpoolFull, match="No space left"):
            spool.append(pair())
    assert len(os.listdir("/proc/self/fd")) == before
    assert files(tmp_path) == []


def test_a_disk_that_fails_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    spool = Spool(tmp_path / "a", MANY)
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(SpoolError, match="Input/output"):
        spool.append(pair())
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="spool"):
        Spool(tmp_path / "file", MANY)
