"""A bundle is read only when every byte is what was written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from distill_ray.errors import BundleError
from distill_ray.serving.routing.bundle import load_bundle, read_manifest, version_of
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
