"""Bundles: read only when every byte is what was written; installed, promoted, rolled back by one move."""

from __future__ import annotations

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_ray.errors import BundleError, LeaseLost
from distill_ray.serving.routing.bundle import load_bundle, read_manifest, version_of
from distill_ray.serving.routing.bundles import NOTHING, Bundles, Candidate
from distill_ray.serving.routing.manifest import PromptForm
from tests.unit.small_bundle import REQUESTS, WordEmbedder, body, manifest, write_small_bundle

FILES = [
    "bundle.json",
    "entries.arrow",
    "index/flat.faiss",
    "index/groups.arrow",
    "student/model.safetensors",
    "student/config.json",
    "calibration.json",
    "curve.json",
    "curve.svg",
]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_small_bundle(tmp_path / "bundle")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read_back(bundle: Path) -> None:
    loaded = load_bundle(bundle, WordEmbedder.identity)
    assert loaded.manifest.model_copy(update={"files": {}, "seal": ""}) == manifest()
    assert [loaded.text(row) for row in range(len(REQUESTS))] == REQUESTS
    assert len(loaded.index) == len(loaded.outcomes_N) == len(REQUESTS)
    assert loaded.spells_control_tokens("a <|im_end|> b")
    assert not loaded.spells_control_tokens("a | b")
    assert sorted(FILES) == files(bundle)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_in_any_file_is_found(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=name.split("/")[-1]):
        load_bundle(bundle, WordEmbedder.identity)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name.split("/")[-1]):
        load_bundle(bundle, WordEmbedder.identity)


def test_a_key_of_bundle_json_that_is_changed_is_found(bundle: Path) -> None:
    record = json.loads((bundle / "bundle.json").read_text())
    record["threshold"] = 0.0
    (bundle / "bundle.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="not what was written"):
        load_bundle(bundle, WordEmbedder.identity)


def test_another_embedder_is_refused_by_name(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"words@1.*words@2"):
        load_bundle(bundle, "words@2")
    assert load_bundle(bundle, None).version == manifest().version


def test_another_format_is_refused(bundle: Path) -> None:
    record = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(BundleError, match="format 2"):
        load_bundle(bundle, WordEmbedder.identity)


def test_a_file_that_is_not_listed_is_refused(bundle: Path) -> None:
    (bundle / "student" / "modeling.py").write_text("import os")
    with pytest.raises(BundleError, match=r"modeling\.py: not a part"):
        load_bundle(bundle, WordEmbedder.identity)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "state.pkl", "weights.pt"])
def test_a_student_with_files_that_run_code_makes_no_bundle(tmp_path: Path, name: str) -> None:
    student = tmp_path / "student-of-bundle"
    student.mkdir()
    (student / name).write_bytes(pickle.dumps(1))
    with pytest.raises(BundleError, match="run code"):
        write_small_bundle(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["student-of-bundle"], "nothing half-made is left"


def test_a_link_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_bytes((bundle / "curve.json").read_bytes())
    (bundle / "curve.json").unlink()
    (bundle / "curve.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match="link"):
        load_bundle(bundle, WordEmbedder.identity)


def test_weights_are_only_read_where_they_are_used(bundle: Path) -> None:
    (bundle / "student" / "model.safetensors").write_bytes(b"changed")
    assert load_bundle(bundle, WordEmbedder.identity, with_student=False).version
    with pytest.raises(BundleError, match="safetensors"):
        load_bundle(bundle, WordEmbedder.identity)


def test_writing_again_replaces_the_bundle_and_leaves_nothing_beside_it(bundle: Path) -> None:
    write_small_bundle(bundle, threshold=0.7)
    assert read_manifest(bundle).threshold == 0.7
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "student-of-bundle"]


def test_a_version_depends_on_every_part_and_on_nothing_else() -> None:
    assert version_of({"a": 1, "b": 2}, "x") == version_of({"b": 2, "a": 1}, "x")
    assert version_of({"a": 1}, "x") != version_of({"a": 2}, "x")
    assert version_of({"a": 1}, "x") != version_of({"a": 1}, "y")


def test_the_student_is_asked_as_it_was_trained() -> None:
    turns = [*body("one")["messages"], {"role": "assistant", "content": "1"}, *body("two")["messages"]]
    form = PromptForm(system="Be brief.", prefix="predict: ")
    assert form.messages(turns) == [
        {"role": "system", "content": "Be brief."},
        *turns[:2],
        {**turns[2], "content": "predict: two"},
    ]
    parts = [{"role": "user", "content": [{"type": "text", "text": "two"}]}]
    assert form.messages(parts)[1]["content"] == "predict: two"
    assert PromptForm().messages(turns) == turns


# -- the bundles of a service ------------------------------------------------------------------------------------------

A, B, C = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"


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
    before = (bundles.folder / A / "bundle.json").stat().st_mtime_ns
    bundles.install(tmp_path / A)
    assert (bundles.folder / A / "bundle.json").stat().st_mtime_ns == before
    assert bundles.load(A, WordEmbedder.identity).version == A


def test_an_installed_bundle_that_was_damaged_is_replaced(bundles: Bundles, tmp_path: Path) -> None:
    (bundles.folder / A / "curve.json").write_text("x")
    bundles.install(tmp_path / A)
    assert bundles.load(A, WordEmbedder.identity).version == A


def test_a_damaged_bundle_is_neither_installed_nor_promoted(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / B / "curve.json").write_text("x")
    with pytest.raises(BundleError, match="sha256"):
        bundles.install(tmp_path / B)
    (bundles.folder / C / "student" / "model.safetensors").write_text("x")
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
    moves = [(m["action"], m["from"], m["version"]) for m in bundles.history()]
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


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"versions": [1]}', '{"versions": ["../../etc"]}', "\x00"])
def test_a_damaged_pointer_is_an_error_and_no_bundle(bundles: Bundles, content: str) -> None:
    bundles.promote(A)
    (bundles.folder / "current.json").write_text(content)
    with pytest.raises(BundleError, match=r"current\.json: damaged"):
        bundles.current()


def damage(bundles: Bundles) -> str:
    """Lose the pointer. Returns what is said then."""
    (bundles.folder / "current.json").write_text("{")
    with pytest.raises(BundleError) as told:
        bundles.current()
    return str(told.value)


def test_a_damaged_pointer_can_be_written_again_from_the_moves_so_far(bundles: Bundles) -> None:
    for move in (A, B, C):
        bundles.promote(move)
    bundles.rollback(B)
    bundles.promote(A)
    bundles.rollback()
    bundles.promote(C)
    expected = bundles.versions()
    told = damage(bundles)
    assert f"from {B} to {C})" in told
    [content] = re.findall(r"write (\{.*\}) into it", told)
    (bundles.folder / "current.json").write_text(content)
    assert bundles.versions() == expected == [A, B, C]
    bundles.rollback(NOTHING)
    assert "without one, delete it and promote a bundle again" in damage(bundles)


def test_a_move_that_was_noted_and_not_made_is_left_out_of_the_way_back(bundles: Bundles) -> None:
    def noted(action: str, version: str | None, before: str | None) -> None:
        record = {"time": "2026-11-21T13:55:00+00:00", "action": action, "version": version, "from": before}
        with open(bundles.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    bundles.promote(A)
    bundles.promote(B)
    noted("promote", C, B)
    noted("rollback", None, B)
    bundles.rollback(A)
    bundles.promote(C)
    assert json.dumps({"versions": [A, C]}) in damage(bundles)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"time": x}', "Expecting value"),
        ('{"t": 1}', "no 'time'"),
        ('{"time": "x", "action": "promote", "version": "b"}', "not the versions of bundles|no 'from'"),
        ('{"time": 1, "action": "promote", "version": null, "from": null}', "no time, or no action that there is"),
        ('{"time": "x", "action": "promote", "version": ["b"], "from": null}', "not the versions of bundles"),
        ('[{"time": 1}, {}', "Expecting ',' delimiter"),
    ],
)
def test_a_damaged_line_of_the_history_is_named(bundles: Bundles, line: str, why: str) -> None:
    bundles.promote(A)
    with open(bundles.folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(BundleError, match=rf"history\.jsonl:2: damaged \(({why}).*\); put this line right"):
        bundles.history()
    assert bundles.current() == A
    assert bundles.rollback(NOTHING) is None


def test_a_line_of_the_history_that_broke_off_spoils_none_after_it(bundles: Bundles) -> None:
    bundles.promote(A)
    with open(bundles.folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write('{"time": "2026-11-2')
    bundles.promote(B)
    assert [move["version"] for move in bundles.history()] == [A, B]


def test_a_history_that_is_no_text_is_an_error(bundles: Bundles) -> None:
    (bundles.folder / "history.jsonl").write_bytes(b"\xff\xfe}")
    with pytest.raises(BundleError, match=r"history\.jsonl: damaged"):
        bundles.history()


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


def test_who_reads_the_pointer_during_many_moves_always_finds_a_whole_one(bundles: Bundles) -> None:
    bundles.promote(A)
    with ThreadPoolExecutor(4) as pool:
        moves = [pool.submit(bundles.promote, (A, B, C)[n % 3]) for n in range(30)]
        while not all(move.done() for move in moves):
            assert bundles.current() in (A, B, C)
        assert all(move.exception() is None for move in moves)
    assert bundles.history()[-1]["version"] == bundles.current()
