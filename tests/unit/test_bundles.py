"""The bundles of a service: installed side by side; promoted, rolled back, tried and fenced by one move each."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_ray.errors import BundleError, LeaseLost
from distill_ray.serving.numbered import NumberedFiles
from distill_ray.serving.routing.bundles import NOTHING, Bundles
from distill_ray.serving.routing.moves import Candidate, Move, Moves, State
from tests.unit.small_bundle import WordEmbedder, write_small_bundle

A, B, C = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"


def move_file(**changes: Any) -> str:
    """The first move's."""
    move = {"number": 1, "id": "x", "time": "t", "action": "promote", "version": None, "before": None, "state": {}}
    return json.dumps({**move, **changes})


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    found = Bundles(tmp_path / "service")
    for number, version in enumerate((A, B, C)):
        made = write_small_bundle(tmp_path / version, version=version, created=f"2026-01-0{number + 1}T00:00:00+00:00")
        assert found.install(made) == version
    return found


def test_a_service_without_a_bundle_says_so(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path / "new")
    assert (bundles.current(), bundles.list(), bundles.history()) == (None, [], [])
    with pytest.raises(BundleError, match="no bundle 'aaaaaaaaaaaa' is installed; there are: none"):
        bundles.promote(A)


def test_installed_bundles_are_whole_and_installing_twice_changes_nothing(bundles: Bundles, tmp_path: Path) -> None:
    assert [m.version for m in bundles.list()] == [A, B, C]
    before = (bundles.path(A) / "bundle.json").stat().st_mtime_ns
    bundles.install(tmp_path / A)
    assert (bundles.path(A) / "bundle.json").stat().st_mtime_ns == before
    assert bundles.load(A, WordEmbedder.identity).version == A


def test_an_installed_bundle_that_was_damaged_is_replaced(bundles: Bundles, tmp_path: Path) -> None:
    (bundles.path(A) / "curve.json").write_text("x")
    bundles.install(tmp_path / A)
    assert bundles.load(A, WordEmbedder.identity).version == A


def test_a_damaged_bundle_is_neither_installed_nor_promoted(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / B / "curve.json").write_text("x")
    with pytest.raises(BundleError, match="sha256"):
        bundles.install(tmp_path / B)
    (bundles.path(C) / "student" / "model.safetensors").write_text("x")
    with pytest.raises(BundleError, match="sha256"):
        bundles.promote(C)
    assert bundles.current() is None


def test_rollback_goes_back_step_by_step_and_history_keeps_every_move(bundles: Bundles) -> None:
    for version in (A, B, B, C):  # the second promotion of B is none
        bundles.promote(version)
    assert bundles.current() == C
    assert bundles.rollback() == B
    assert bundles.rollback() == A
    with pytest.raises(BundleError, match="no bundle was current before aaaaaaaaaaaa"):
        bundles.rollback()
    assert bundles.current() == A
    moves = [(move.action, move.before, move.version) for move in bundles.history()]
    assert moves == [("promote", None, A), ("promote", A, B), ("promote", B, C), ("rollback", C, B), ("rollback", B, A)]


def test_rollback_to_a_version_needs_that_it_served_before(bundles: Bundles) -> None:
    for version in (A, B):
        bundles.promote(version)
    with pytest.raises(BundleError, match=r"cccccccccccc was not current before; there were: aaaaaaaaaaaa"):
        bundles.rollback(C)
    bundles.promote(C)
    assert bundles.rollback(A) == A == bundles.current()


def test_one_can_go_back_to_nothing_and_then_the_teacher_answers_everything(bundles: Bundles) -> None:
    bundles.promote(A)
    assert bundles.rollback(NOTHING) is None
    assert bundles.current() is None
    with pytest.raises(BundleError, match="no bundle was current before"):
        bundles.rollback(NOTHING)
    bundles.promote(B)
    assert bundles.versions() == [B]


def test_whoever_goes_back_from_one_bundle_does_not_go_back_from_another(bundles: Bundles) -> None:
    for version in (A, B, C):
        bundles.promote(version)
    for version in (None, NOTHING):
        with pytest.raises(BundleError, match=f"{B} is not current any more; nothing was moved"):
            bundles.rollback(version, only_from=B)
    assert bundles.versions() == [A, B, C]
    assert bundles.rollback(only_from=C) == B
    assert bundles.rollback(NOTHING, only_from=B) is None
    with pytest.raises(BundleError, match="not current any more"):
        bundles.rollback(NOTHING, only_from=B)


def test_who_lost_his_lease_cannot_promote_and_a_person_always_can(bundles: Bundles) -> None:
    bundles.fence(1)
    bundles.promote(A, token=1)
    bundles.fence(2)
    with pytest.raises(LeaseLost, match="lease 2, this one has 1"):
        bundles.promote(B, token=1)
    with pytest.raises(LeaseLost):
        bundles.fence(1)
    assert bundles.current() == A
    bundles.promote(B)
    bundles.promote(C, token=2)
    assert bundles.current() == C


def test_a_candidate_is_noted_and_let_go(bundles: Bundles) -> None:
    assert bundles.candidate() is None
    bundles.set_candidate(Candidate(B, share=0.5, max_tokens=100))
    assert bundles.candidate() == Candidate(B, 0.5, 100)
    bundles.set_candidate(None)
    bundles.set_candidate(None)
    assert bundles.candidate() is None
    with pytest.raises(BundleError, match="no bundle"):
        bundles.set_candidate(Candidate("d" * 12))


def test_old_bundles_are_removed_by_count_but_not_those_one_may_go_back_to(bundles: Bundles) -> None:
    for version in (A, B, C):
        bundles.promote(version)
    bundles.rollback(A)
    bundles.promote(B)
    assert bundles.prune(3) == []
    assert bundles.prune(1) == [C]
    assert [manifest.version for manifest in bundles.list()] == [A, B]


def last_move(bundles: Bundles) -> Path:
    return max((Path(bundles.url) / "moves").glob("*.json"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Invalid JSON"),
        ("\x00", "Invalid JSON"),
        ("[]", ""),
        ("{}", "Field required"),
        (move_file(number=2), "it says that it is number 2"),
        (move_file(action="delete"), "Input should be 'promote'"),
        (move_file(state={"versions": [1]}), "valid string"),
        (move_file(state={"versions": ["../../etc"]}), "match pattern"),
        (move_file(state={"fence": -1}), "greater than or equal to 0"),
        (move_file(state={"candidate": {"version": A, "share": 2}}), "less than or equal to 1"),
    ],
    ids=["empty", "zero", "list", "nothing", "number", "action", "type", "path", "fence", "candidate"],
)
def test_a_damaged_move_is_an_error_that_says_what_to_do_and_no_bundle(
    bundles: Bundles, content: str, why: str
) -> None:
    bundles.promote(A)
    last_move(bundles).write_text(content)
    reader = Bundles(bundles.url)
    for use in (reader.current, reader.candidate, reader.fenced, reader.history, reader.rollback):
        with pytest.raises(
            BundleError, match=rf"moves/0{{19}}1\.json: damaged \(.*{why}.*\).*put it back from a backup"
        ):
            use()


def test_without_a_backup_a_damaged_move_is_deleted_and_so_undone(bundles: Bundles) -> None:
    bundles.promote(A)
    bundles.promote(B)
    last_move(bundles).write_text("{")
    with pytest.raises(BundleError, match="delete this file and those after it, and start them again"):
        Bundles(bundles.url).current()
    last_move(bundles).unlink()
    assert Bundles(bundles.url).versions() == [A]


def test_a_move_that_is_missing_in_the_middle_is_named_where_the_history_is_read(bundles: Bundles) -> None:
    for version in (A, B, C):
        bundles.promote(version)
    (last_move(bundles).parent / f"{2:020d}.json").unlink()
    reader = Bundles(bundles.url)
    assert reader.versions() == [A, B, C]
    with pytest.raises(BundleError, match="moves: a move between 1 and 3 is missing; put it back"):
        reader.history()


def test_what_another_version_wrote_beside_a_move_is_passed_over(bundles: Bundles) -> None:
    bundles.promote(A)
    last_move(bundles).write_text(move_file(state={"versions": [B], "of_a_later_version": 1}, more=2))
    assert Bundles(bundles.url).current() == B


def test_a_folder_of_an_older_version_is_refused_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "current.json").write_text('{"version": null, "versions": []}')
    bundles = Bundles(tmp_path / "bundles")
    for use in (bundles.current, bundles.history, lambda: bundles.fence(1)):
        with pytest.raises(
            BundleError, match=r"current\.json and no moves/, so it is of an older .*move the folder away"
        ):
            use()


def test_what_changes_nothing_is_no_move(bundles: Bundles) -> None:
    for _ in range(2):
        bundles.promote(A)
        bundles.fence(1)
        bundles.set_candidate(Candidate(B))
    assert bundles.num_moves() == 3
    for _ in range(2):
        bundles.set_candidate(None)
    assert bundles.num_moves() == 4


def test_history_is_the_moves_of_the_pointer_all_or_those_after_one(bundles: Bundles) -> None:
    assert bundles.last_in_history() is None
    bundles.promote(A)
    bundles.fence(3)
    before = bundles.num_moves()
    bundles.set_candidate(Candidate(B))
    bundles.promote(B)
    bundles.set_candidate(None)
    assert [(move.number, move.version) for move in bundles.history()] == [(1, A), (4, B)]
    assert [move.version for move in bundles.history(after=before)] == [B]
    assert bundles.last_in_history() == bundles.history()[-1]


def test_who_asks_every_second_makes_one_request_and_never_lists(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (A, B):
        bundles.promote(version)
    reader, asked = Bundles(bundles.url), list[int]()
    assert reader.current() == B
    read = NumberedFiles.read
    monkeypatch.setattr(NumberedFiles, "read", lambda self, number: asked.append(number) or read(self, number))
    monkeypatch.setattr(NumberedFiles, "numbers", lambda self: pytest.fail("a listing"))
    for _ in range(3):
        assert reader.state().versions == (A, B)
    assert asked == [3, 3, 3]
    bundles.promote(C)
    asked.clear()
    assert reader.current() == C
    assert asked == [3, 4]


def test_a_file_in_place_of_the_folder_of_bundles_is_named(tmp_path: Path) -> None:
    (tmp_path / "bundles").write_text("mine")
    bundles = Bundles(tmp_path / "bundles")
    for use in (bundles.current, bundles.history, bundles.candidate, bundles.fenced, lambda: bundles.fence(1)):
        with pytest.raises(BundleError, match=r"bundles: a file where the folder of the bundles belongs; move it away"):
            use()


@pytest.mark.parametrize("version", ["..", "../student", "", "AAAAAAAAAAAA", "aaaaaaaaaaaa/../x"])
def test_a_version_is_no_path(bundles: Bundles, version: str) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        bundles.path(version)


# -- several at once ---------------------------------------------------------------------------------------------------


def test_who_reads_the_pointer_during_many_moves_always_finds_a_whole_one(bundles: Bundles) -> None:
    bundles.promote(A)
    with ThreadPoolExecutor(4) as pool:
        moves = [pool.submit(bundles.promote, (A, B, C)[n % 3]) for n in range(30)]
        while not all(move.done() for move in moves):
            assert bundles.current() in (A, B, C)
        assert all(move.exception() is None for move in moves)
    assert bundles.history()[-1].version == bundles.current()


def follows(before: State, move: Move) -> bool:
    """Whether what a move says can come of what was so before it."""
    state = move.state
    if move.action == "fence":
        return state == dataclasses.replace(before, fence=state.fence) and state.fence > before.fence
    if move.action == "candidate":
        return state == dataclasses.replace(before, candidate=state.candidate) and state.candidate != before.candidate
    if (move.before, move.version, state.pointer_moved) != (before.current, state.current, move.number):
        return False
    if (state.candidate, state.fence) != (before.candidate, before.fence):
        return False
    if move.action == "promote":
        return state.versions == (*before.versions, state.current)
    return len(state.versions) < len(before.versions) and before.versions[: len(state.versions)] == state.versions


def require_one_story(bundles: Bundles) -> list[Move]:
    """All moves; each follows from the one before."""
    moves, state = Moves(bundles.url).since(0), State()
    assert [move.number for move in moves] == list(range(1, len(moves) + 1))
    assert len({move.id for move in moves}) == len(moves)
    for move in moves:
        assert follows(state, move), move
        state = move.state
    return moves


STEPS = st.one_of(
    st.tuples(st.just("promote"), st.sampled_from([A, B, C])),
    st.tuples(st.just("rollback"), st.sampled_from([None, NOTHING, A, B, C])),
    st.tuples(st.just("fence"), st.integers(1, 4)),
    st.tuples(st.just("token"), st.sampled_from([A, B, C])),
    st.tuples(st.just("candidate"), st.sampled_from([None, A, B, C])),
)


def do(bundles: Bundles, step: str, argument: Any, token: int) -> bool:
    """One step; whether it could be done."""
    try:
        if step == "candidate":
            bundles.set_candidate(Candidate(argument) if argument is not None else None)
        elif step == "token":
            bundles.promote(argument, token)
        else:
            getattr(bundles, step)(argument)
    except (BundleError, LeaseLost):
        return False
    return True


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stories=st.lists(st.lists(STEPS, min_size=1, max_size=6), min_size=2, max_size=4))
def test_whatever_several_do_at_once_is_one_story_in_which_no_move_is_lost(
    bundles: Bundles, stories: list[list[tuple[str, Any]]]
) -> None:
    shutil.rmtree(Path(bundles.url) / "moves", ignore_errors=True)
    with ThreadPoolExecutor(len(stories)) as pool:

        def tell(number: int) -> list[tuple[str, Any]]:
            own = Bundles(bundles.url)
            return [step for step in stories[number] if do(own, *step, number)]

        done = [step for story in pool.map(tell, range(len(stories))) for step in story]
    moves = require_one_story(Bundles(bundles.url))
    for move in moves:  # each was asked for, and went through
        if move.action == "promote":
            assert ("promote", move.version) in done or ("token", move.version) in done
        elif move.action == "candidate":
            assert ("candidate", move.version) in done
    for step, argument in done:  # and none of them was lost
        if step == "fence":
            assert moves[-1].state.fence >= argument
        elif step in ("promote", "token"):
            assert any(move.state.current == argument for move in moves)


PROCESS = """
import sys
from distill_ray.errors import BundleError
from distill_ray.serving.routing.bundles import Bundles
url, number = sys.argv[1], int(sys.argv[2])
bundles, made = Bundles(url), 0
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    version = "abc"[(number + turn) % 3] * 12
    try:
        if turn % 4 == 3:
            bundles.rollback()
        else:
            bundles.promote(version)
    except BundleError:
        pass
print("done", flush=True)
"""


def test_processes_that_move_at_once_lose_no_move(bundles: Bundles) -> None:
    command = [sys.executable, "-c", PROCESS, bundles.url]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, str(number)], **pipes) for number in range(4)]
    try:
        for process in running:
            assert process.stdout.readline() == "ready\n"
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in running:
            assert process.communicate(timeout=120)[0] == "done\n"
            assert process.returncode == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    moves = require_one_story(bundles)
    assert {move.action for move in moves} == {"promote", "rollback"}
    assert not list((Path(bundles.url) / "moves").glob(".*"))


def test_of_one_who_fences_and_one_who_promotes_late_only_the_first_moves(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He had looked at the fence, and is about to make his move, when the newer lease comes."""
    bundles.fence(1)
    make, late = NumberedFiles.make, Bundles(bundles.url)

    def make_late(self: NumberedFiles, number: int, content: bytes) -> bool:
        monkeypatch.setattr(NumberedFiles, "make", make)
        bundles.fence(2)
        return make(self, number, content)

    monkeypatch.setattr(NumberedFiles, "make", make_late)
    with pytest.raises(LeaseLost, match="lease 2, this one has 1"):
        late.promote(A, token=1)
    assert (bundles.current(), bundles.fenced()) == (None, 2)


def test_a_move_that_was_made_by_a_request_that_seemed_to_fail_is_made_once(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (A, B, C):
        bundles.promote(version)
    link = os.link

    def link_twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert bundles.rollback() == B
    assert bundles.versions() == [A, B]


def test_what_has_the_name_of_the_next_move_and_is_none_is_an_error(bundles: Bundles) -> None:
    bundles.promote(A)
    last_move(bundles).with_name(f"{2:020d}.json").symlink_to("nowhere")
    with pytest.raises(BundleError, match=r"0{19}2\.json: cannot be made, and is not there; remove"):
        bundles.promote(B)


def test_a_bundle_that_is_promoted_while_it_is_removed_stays(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who removes looks again when nobody finds it any more."""
    for version in (B, C):
        bundles.promote(version)

    def promoted_meanwhile(path: Path, target: Path) -> None:
        monkeypatch.undo()
        path.rename(target)
        Moves(bundles.url).change("promote", lambda state: dataclasses.replace(state, versions=(*state.versions, A)))

    monkeypatch.setattr(Path, "rename", promoted_meanwhile)
    assert bundles.prune(1) == []
    assert bundles.load(A, None).version == A


def test_a_bundle_that_is_removed_while_it_is_promoted_does_not_serve(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (B, C):
        bundles.promote(version)
    make = NumberedFiles.make

    def removed_meanwhile(self: NumberedFiles, number: int, content: bytes) -> bool:
        monkeypatch.undo()
        assert Bundles(bundles.url).prune(1) == [A]
        return make(self, number, content)

    monkeypatch.setattr(NumberedFiles, "make", removed_meanwhile)
    with pytest.raises(BundleError, match=f"{A} was removed while it was made the current one; install it again"):
        bundles.promote(A)
    assert bundles.versions() == [B, C]
