"""One runner at a time on a store. On Lance with real processes; Qdrant's in-process mode has but this one.

Not covered: a real Qdrant server (that its shard makes one change after the other), two real machines (they are one
with another name, see `lease_runner`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config.serve import StoreConfig
from distill_ray.errors import BundleError, FlywheelError, LeaseLost, StoreError
from distill_ray.flywheel import lease
from distill_ray.flywheel.lease import Held
from distill_ray.serving.collecting.store import Lease, PairStore, Where, make_store
from distill_ray.serving.collecting.store.lease_files import KEPT_FILES
from distill_ray.serving.numbered import NumberedFiles
from distill_ray.serving.routing.bundles import Bundles
from tests.unit.pair_maker import pairs
from tests.unit.small_bundle import write_small_bundle
from tests.unit.test_stores import STORES, opener

A, B = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
ELSEWHERE = Where("gpu-7", "another kernel", 12, 34, "2026-01-02T03:04:05+00:00", "/srv/mail")


def hold(
    store: PairStore, folder: Path, say: Callable[[str], None] = lambda text: None
) -> contextlib.AbstractContextManager[Held]:
    return lease.hold(store, folder, Bundles(folder / "bundles"), say)


@pytest.fixture(params=STORES)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], PairStore]:
    return opener(request.param, tmp_path)


@pytest.fixture
def store(open_store: Callable[[], PairStore]) -> PairStore:
    return open_store()


@pytest.fixture
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "TTL_S", 2.0)
    monkeypatch.setattr(lease, "LOOK_S", 0.01)


@pytest.fixture
def _short_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TTL_S", 0.3)
    monkeypatch.setattr(lease, "LOOK_S", 0.01)


def beaten(store: PairStore, before: Lease) -> Lease:
    after = Lease(before.token, before.beat + 1, before.holder, before.where)
    assert store.swap_lease(before, after)
    return after


def taken_elsewhere(store: PairStore) -> Lease:
    before = store.lease()
    theirs = Lease(before.token + 1, 0, "theirs", ELSEWHERE)
    assert store.swap_lease(before, theirs)
    return theirs


# -- held and given back -----------------------------------------------------------------------------------------------


def test_each_holder_has_a_higher_token_and_each_beat_counts(store: PairStore, tmp_path: Path) -> None:
    for token in (1, 2, 3):
        with hold(store, tmp_path) as held:
            before = store.lease()
            held.require()
            after = store.lease()
            assert (held.token, after.token, after.beat) == (token, token, before.beat + 1)
            assert after.where == before.where
            assert (after.where.pid, after.where.folder) == (os.getpid(), str(tmp_path))
        assert (store.lease().token, store.lease().holder) == (token, "")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_it_is_given_back_whatever_ends_the_work(store: PairStore, tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), hold(store, tmp_path):
        raise error
    assert store.lease().holder == ""
    assert "lease" not in [thread.name for thread in threading.enumerate()]


def test_a_folder_whose_bundles_cannot_be_fenced_leaves_the_lease_free(store: PairStore, tmp_path: Path) -> None:
    (tmp_path / "service").write_text("a file")
    with pytest.raises(BundleError), hold(store, tmp_path / "service"):
        pass
    assert store.lease().holder == ""


def test_a_second_one_on_this_machine_is_told_at_once_who_is_at_work(
    open_store: Callable[[], PairStore], tmp_path: Path
) -> None:
    with hold(open_store(), tmp_path / "mail") as held:
        said: list[str] = []
        with pytest.raises(FlywheelError) as caught, hold(open_store(), tmp_path / "other", said.append):
            pass
        assert not said  # it did not watch
        held.require()
    for part in (f"process {os.getpid()} on ", "running since 20", str(tmp_path / "mail"), "(lease 1)", "Wait until"):
        assert part in str(caught.value)
    with hold(open_store(), tmp_path / "other"):
        pass


@pytest.mark.usefixtures("_hurried")
def test_pairs_come_and_go_while_the_lease_is_held(open_store: Callable[[], PairStore], tmp_path: Path) -> None:
    writer, runner = open_store(), open_store()
    with hold(runner, tmp_path) as held:
        assert writer.add(pairs(5)) == 5
        assert runner.mark_indexed([pairs(1)[0].pair_id], "v1") == 1
        writer.compact()
        held.require()
        assert runner.count() == 5


# -- on another machine ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_hurried")
def test_somebody_elsewhere_whose_beat_moves_is_at_work(
    open_store: Callable[[], PairStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(lease, "_machine", lambda: "another kernel")
        holder = hold(open_store(), tmp_path)
        holder.__enter__()
    for _ in range(2):
        with (
            pytest.raises(FlywheelError, match=f"process {os.getpid()} on "),
            hold(open_store(), tmp_path, said.append),
        ):
            pass
    assert [text.split(" process")[0] for text in said] == ["watching for up to 2 s whether"] * 2
    holder.__exit__(None, None, None)
    with hold(open_store(), tmp_path, said.append):
        pass
    assert len(said) == 2


@pytest.mark.usefixtures("_short_of_patience")
def test_somebody_elsewhere_whose_beat_stands_still_is_waited_for_and_taken_over(
    store: PairStore, tmp_path: Path
) -> None:
    theirs = taken_elsewhere(store)
    begun = time.monotonic()
    with hold(store, tmp_path) as held:
        assert time.monotonic() - begun >= lease.TTL_S
        assert held.token == theirs.token + 1


def test_somebody_elsewhere_who_lets_go_is_followed_at_once(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = taken_elsewhere(store)
    monkeypatch.setattr(lease.time, "sleep", lambda _: store.swap_lease(theirs, Lease(theirs.token, 1)))
    begun = time.monotonic()
    with hold(store, tmp_path) as held:
        assert held.token == theirs.token + 1
    assert time.monotonic() - begun < lease.BEAT_S


@pytest.mark.usefixtures("_short_of_patience")
def test_who_is_overtaken_while_he_takes_over_gives_way(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = taken_elsewhere(store)
    swap = store.swap_lease

    def swap_too_late(before: Lease, after: Lease) -> bool:
        monkeypatch.setattr(store, "swap_lease", swap)
        beaten(store, theirs)
        return swap(before, after)

    monkeypatch.setattr(store, "swap_lease", swap_too_late)
    with pytest.raises(FlywheelError, match="process 12 on gpu-7, running since 2026-01-02"), hold(store, tmp_path):
        pass
    assert store.lease().holder == "theirs"


def test_a_clock_that_jumps_changes_nothing_for_the_living(
    open_store: Callable[[], PairStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`boot_time` is what `psutil` adds to a process's start: it moves as the clock does."""
    import psutil._pslinux as linux

    boot, now, now_ns = linux.boot_time, time.time, time.time_ns
    with hold(open_store(), tmp_path) as held:
        for jump in (-7200, 7200):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
            monkeypatch.setattr(time, "time_ns", lambda jump=jump: now_ns() + jump * 10**9)
            monkeypatch.setattr(linux, "boot_time", lambda jump=jump: boot() + jump)
            monkeypatch.setattr(os, "getpid", lambda: 1)  # so that the process is looked for, as from another one
            with pytest.raises(FlywheelError), hold(open_store(), tmp_path):
                pass
            monkeypatch.undo()
            held.require()


@pytest.mark.usefixtures("_short_of_patience")
def test_a_clock_that_jumps_changes_nothing_for_who_watches(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, clock = taken_elsewhere(store), itertools.cycle([0.0, 1e9, 5e8])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    begun = time.monotonic()
    with hold(store, tmp_path) as held:
        assert held.token == theirs.token + 1
        assert time.monotonic() - begun >= lease.TTL_S


# -- on this machine: who is gone --------------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def held_by(pid: int) -> Lease:
    found = lease._process(pid)
    assert found is not None
    return Lease(1, 0, "theirs", Where("here", lease._machine(), pid, found[1]))


def test_a_process_is_alive_until_it_ends_also_as_a_zombie_and_its_number_is_not_its_name(
    child: subprocess.Popen[bytes],
) -> None:
    theirs = held_by(child.pid)
    assert lease._is_alive(theirs) is True
    os.kill(child.pid, signal.SIGSTOP)
    assert lease._is_alive(theirs) is True
    another = Where("here", lease._machine(), child.pid, theirs.where.started - 1)
    assert lease._is_alive(Lease(1, 0, "theirs", another)) is False
    child.kill()
    deadline = time.monotonic() + 120
    while lease._process(child.pid) not in (None, ("Z", theirs.where.started)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lease._is_alive(theirs) is False  # a zombie
    child.wait()
    assert lease._is_alive(theirs) is False
    assert lease._is_alive(Lease(1, 5)) is False
    assert lease._is_alive(Lease(1, 5, "theirs", ELSEWHERE)) is None


def test_a_process_that_may_not_be_looked_at_is_watched_as_one_elsewhere(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = held_by(child.pid)
    monkeypatch.setattr(lease, "_process", lambda pid: None)
    assert lease._is_alive(theirs) is None
    monkeypatch.setattr(lease, "_machine", lambda: "")
    assert lease._is_alive(Lease(1, 0, "theirs", Where("here", "", child.pid, theirs.where.started))) is None


def test_what_this_process_held_and_could_not_give_back_it_takes_again(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(store, tmp_path):
        monkeypatch.setattr(store, "swap_lease", refuse)
    monkeypatch.undo()
    assert store.lease().holder
    with hold(store, tmp_path) as held:
        assert held.token == 2


# -- lost --------------------------------------------------------------------------------------------------------------


def with_bundles(folder: Path) -> Bundles:
    bundles = Bundles(folder / "bundles")
    for version in (A, B):
        bundles.install(write_small_bundle(folder / version, version=version))
    return bundles


@pytest.mark.usefixtures("_short_of_patience")
def test_who_lost_it_is_told_so_and_cannot_promote_and_leaves_the_next_one_alone(
    open_store: Callable[[], PairStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = with_bundles(tmp_path)
    monkeypatch.setattr(Held, "beat_until", lambda self, stop: None)  # suspended
    with monkeypatch.context() as patch:
        patch.setattr(lease, "_machine", lambda: "another kernel")
        late = hold(open_store(), tmp_path)
        held = late.__enter__()
    with hold(open_store(), tmp_path) as next_one:
        bundles.promote(A, token=next_one.token)
        for _ in range(2):
            with pytest.raises(LeaseLost, match=rf"lease 1 .* lost to process {os.getpid()} on .* \(lease 2\)"):
                held.require()
        with pytest.raises(LeaseLost, match="lease 2, this one has 1"):
            bundles.promote(B, token=held.token)
        late.__exit__(None, None, None)
        next_one.require()
    with pytest.raises(LeaseLost):
        bundles.promote(B, token=held.token)  # however late
    assert bundles.versions() == [A]


def test_it_is_lost_too_when_the_next_one_has_ended_already(store: PairStore, tmp_path: Path) -> None:
    with hold(store, tmp_path) as held:
        theirs = taken_elsewhere(store)
        store.swap_lease(theirs, Lease(theirs.token, 1))
        with pytest.raises(LeaseLost, match=r"lost to another run that has ended \(lease 2\)"):
            held.require()


def test_with_a_new_store_the_tokens_of_a_service_go_on(tmp_path: Path) -> None:
    bundles = with_bundles(tmp_path)
    bundles.fence(7)
    with hold(make_store(StoreConfig(), tmp_path), tmp_path) as held:
        assert held.token == 8
        bundles.promote(A, token=held.token)


def test_of_two_stores_for_one_service_the_later_one_counts(tmp_path: Path) -> None:
    one, other = (make_store(StoreConfig(collection=name), tmp_path) for name in ("one", "other"))
    bundles = with_bundles(tmp_path)
    with hold(one, tmp_path) as early, hold(other, tmp_path) as late:
        assert (early.token, late.token) == (1, 2)
        with pytest.raises(LeaseLost):
            bundles.promote(A, token=early.token)


def test_a_damaged_fence_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "bundles" / "moves").mkdir(parents=True)
    (tmp_path / "bundles" / "moves" / f"{1:020d}.json").write_text("{")
    with pytest.raises(BundleError, match=r"1\.json: damaged"), hold(make_store(StoreConfig(), tmp_path), tmp_path):
        pass


# -- a store that is away ----------------------------------------------------------------------------------------------


def refuse(*_: object) -> Any:
    raise StoreError("away")


@pytest.mark.usefixtures("_hurried")
def test_a_store_that_was_away_for_a_while_is_no_loss(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = store._swap_lease
    with hold(store, tmp_path) as held:
        monkeypatch.setattr(store, "_swap_lease", refuse)
        with pytest.raises(StoreError, match="away"):
            held.require()
        time.sleep(5 * lease.BEAT_S)
        monkeypatch.setattr(store, "_swap_lease", swap)
        held.require()
        before = store.lease().beat
        deadline = time.monotonic() + 120
        while store.lease().beat == before:  # the thread went on too
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_beat_that_came_through_unheard_is_no_loss(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = store._swap_lease
    with hold(store, tmp_path) as held:
        monkeypatch.setattr(store, "_swap_lease", lambda before, after: (swap(before, after), refuse()))
        with pytest.raises(StoreError):
            held.require()
        monkeypatch.undo()
        held.require()
        held.require()


@pytest.mark.parametrize("kind", ["beats", "takes"])
def test_a_swap_without_effect_is_tried_again(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    swap, calls = store._swap_lease, []

    def swap_at_the_second_call(before: Lease, after: Lease) -> None:
        calls.append(after)
        if len(calls) > 1:
            swap(before, after)

    if kind == "takes":
        monkeypatch.setattr(store, "_swap_lease", swap_at_the_second_call)
    with hold(store, tmp_path) as held:
        if kind == "beats":
            monkeypatch.setattr(store, "_swap_lease", swap_at_the_second_call)
            held.require()
    assert len(calls) >= 2
    monkeypatch.setattr(store, "_swap_lease", lambda before, after: None)
    with pytest.raises(StoreError, match="took none of 10 swaps"):
        Held(store, store.lease()).require()
    with pytest.raises(StoreError, match="took none of 10 swaps"), hold(store, tmp_path):
        pass


def test_what_was_taken_unheard_is_ours(store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = store.swap_lease
    monkeypatch.setattr(store, "swap_lease", lambda before, after: swap(before, after) and False)
    with hold(store, tmp_path) as held:
        monkeypatch.setattr(store, "swap_lease", swap)
        held.require()
        assert held.token == 1


def test_a_folder_that_is_away_is_an_error_of_ours_and_it_works_when_it_is_back(tmp_path: Path) -> None:
    store = make_store(StoreConfig(), tmp_path)
    with hold(store, tmp_path) as held:
        (tmp_path / "pairs").rename(tmp_path / "aside")
        (tmp_path / "pairs").write_text("a file where the folder belongs")
        with pytest.raises(StoreError, match="cannot use the lease"):
            held.require()
        with pytest.raises(StoreError, match="cannot use the lease"), hold(store, tmp_path):
            pass
        (tmp_path / "pairs").unlink()
        (tmp_path / "aside").rename(tmp_path / "pairs")
        held.require()


# -- the files of a folder ---------------------------------------------------------------------------------------------


def test_beats_do_not_fill_the_disk(tmp_path: Path) -> None:
    store = make_store(StoreConfig(), tmp_path)
    with hold(store, tmp_path) as held:
        for _ in range(2 * KEPT_FILES):
            held.require()
    assert len(list((tmp_path / "pairs" / "pairs_lease").iterdir())) == KEPT_FILES + 1
    assert store.lease().beat > 2 * KEPT_FILES


def test_a_file_that_is_made_again_after_a_clean_up_is_no_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with lance-format/lance#3718: whoever sleeps before he makes a file may find its number free again."""
    sleeper, other = (make_store(StoreConfig(), tmp_path) for _ in range(2))
    make = NumberedFiles.make

    def make_late(self: NumberedFiles, number: int, content: bytes) -> bool:
        monkeypatch.setattr(NumberedFiles, "make", make)
        theirs = taken_elsewhere(other)
        for _ in range(KEPT_FILES + 1):
            theirs = beaten(other, theirs)
        return make(self, number, content)

    monkeypatch.setattr(NumberedFiles, "make", make_late)
    assert not sleeper.swap_lease(Lease(), Lease(1, 0, "sleeper"))
    assert (tmp_path / "pairs" / "pairs_lease" / f"{1:020d}.json").exists()
    assert (other.lease().holder, other.lease().beat) == ("theirs", KEPT_FILES + 1)


def test_a_damaged_file_is_an_error_of_ours_and_other_files_are_passed_over(tmp_path: Path) -> None:
    store = make_store(StoreConfig(), tmp_path)
    taken_elsewhere(store)
    folder = tmp_path / "pairs" / "pairs_lease"
    (folder / ".3f2a").write_text("left by a process that was killed")
    (folder / "notes.json").write_text("{}")
    assert store.lease().holder == "theirs"
    (folder / f"{2:020d}.json").write_text('{"token": 3, "beat": 4, "key": "of a later version"}')
    assert store.lease() == Lease(3, 4)
    (folder / f"{3:020d}.json").write_text("{")
    with pytest.raises(StoreError, match=r"pairs_lease/0{19}3\.json: damaged, .*; delete it while no flywheel runs"):
        store.lease()
    (folder / f"{3:020d}.json").unlink()
    assert store.lease() == Lease(3, 4)


# -- processes ---------------------------------------------------------------------------------------------------------


class Runner:
    """A process that holds a lease, or would like to."""

    def __init__(self, folder: Path, *changes: str) -> None:
        command = [sys.executable, "-m", "tests.unit.lease_runner", str(folder), *changes]
        root = Path(__file__).parents[2]
        self.store = make_store(StoreConfig(), folder)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def send(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, command: str) -> Any:
        self.send(command)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Runner]]:
    started: list[Runner] = []

    def run(*changes: str) -> Runner:
        started.append(Runner(tmp_path, *changes))
        return started[-1]

    yield run
    for runner in started:
        runner.end()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Runner]]:
    """Five on one store."""
    folder = tmp_path_factory.mktemp("crowd")
    runners = [Runner(folder) for _ in range(5)]
    assert [runner.answer() for runner in runners] == ["ready"] * 5
    yield runners
    for runner in runners:
        runner.end()


def test_of_many_processes_that_race_one_wins_each_time(crowd: list[Runner]) -> None:
    first = crowd[0].store.lease().token + 1
    for token in (first, first + 1, first + 2):
        for runner in crowd:
            runner.send("hold")
        answers = {runner: runner.answer() for runner in crowd}
        (winner,) = [runner for runner, answer in answers.items() if answer == token]
        refused = [answer for runner, answer in answers.items() if runner is not winner]
        assert all(answer.startswith("FlywheelError: another run") for answer in refused)
        assert all(f"process {winner.process.pid} " in answer for answer in refused)
        assert winner.ask("require") is None
        assert winner.ask("release") is None


def test_of_many_processes_that_swap_one_lease_never_two_win(crowd: list[Runner]) -> None:
    for runner in crowd:
        runner.send("swap 50")
    won = [tuple(each) for runner in crowd for each in runner.answer()]
    last = crowd[0].store.lease()
    assert len(set(won)) == len(won) > 20
    assert max(won) == (last.token, last.beat)
    assert crowd[0].store.swap_lease(last, Lease(last.token + 1, 0))


def test_after_kill_9_the_same_command_goes_on_at_once(start: Callable[..., Runner], tmp_path: Path) -> None:
    first, second = start(), start()
    assert first.answer() == second.answer() == "ready"
    assert first.ask("hold") == 1
    assert "FlywheelError" in second.ask("hold")
    first.signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    while "FlywheelError" in str(answer := second.ask("hold")):  # it is dying
        assert time.monotonic() < deadline
    assert answer == 2


def test_a_runner_that_was_suspended_on_another_machine_wakes_up_without_its_lease(
    start: Callable[..., Runner], tmp_path: Path
) -> None:
    bundles = with_bundles(tmp_path)
    sleeper, other = start("another kernel", "0.05", "2"), start("this one", "0.05", "2")
    assert sleeper.answer() == other.answer() == "ready"
    assert sleeper.ask("hold") == 1
    assert sleeper.ask("require") is None
    assert "FlywheelError" in other.ask("hold")
    sleeper.signal(signal.SIGSTOP)
    assert other.ask("hold") == 2
    sleeper.signal(signal.SIGCONT)
    lost = sleeper.ask("require")
    assert lost.startswith(f"LeaseLost: lease 1 of the store of pairs is lost to process {other.process.pid} ")
    assert "LeaseLost" in sleeper.ask(f"promote {A}")
    assert sleeper.ask("release") is None
    assert other.ask("require") is None
    assert other.ask(f"promote {B}") is None
    assert bundles.versions() == [B]


def test_swaps_of_processes_that_are_suspended_and_killed_at_random_never_have_two_winners(
    start: Callable[..., Runner], tmp_path: Path
) -> None:
    runners = [start() for _ in range(3)]
    assert [runner.answer() for runner in runners] == ["ready"] * 3
    for runner in runners:
        runner.send("swap 100")
    for round_number in range(20):
        sleeper = runners[round_number % 2]
        sleeper.signal(signal.SIGSTOP)
        time.sleep(0.02)
        sleeper.signal(signal.SIGCONT)
    runners[2].signal(signal.SIGKILL)
    won = [tuple(each) for runner in runners[:2] for each in runner.answer()]
    assert len(set(won)) == len(won)
    store = make_store(StoreConfig(), tmp_path)
    assert (store.lease().token, store.lease().beat) >= max(won)
    assert store.swap_lease(store.lease(), Lease(store.lease().token + 1, 0, "after them all"))
