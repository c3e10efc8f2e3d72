"""The trained student from its checkpoint. Ray is not started: what it would do elsewhere is done here, pickled."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
import pytest
import ray.exceptions
import ray.train

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import TrainingError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.training import student_folder
from distill_ray.pipeline.training.student_folder import write_student

STEP = "/run/checkpoints/abc/step-0000004"
MERGED = {"lora": {"merge": True}}


class Store(pyarrow.fs.FSSpecHandler):
    """A store that is asked for a checkpoint's model, and for nothing else of it."""

    def __init__(self) -> None:
        super().__init__(fsspec.filesystem("memory"))

    def open_input_stream(self, path: str) -> Any:
        assert "/model/" in f"/{path}", f"{path} is fetched"
        return super().open_input_stream(path)

    open_input_file = open_input_stream


@pytest.fixture
def folder() -> Iterator[RunFolder]:
    fs = fsspec.filesystem("memory")
    fs.pipe(
        {
            f"{STEP}/state/optimizer.pt": b"large",
            f"{STEP}/model/adapter_model.safetensors": b"learnt",
            "/run/student/of_the_run_before.json": b"{}",
        }
    )
    yield RunFolder("memory://run")
    fs.rm("/run", recursive=True)


@pytest.fixture
def checkpoint() -> ray.train.Checkpoint:
    return ray.train.Checkpoint(STEP, pyarrow.fs.PyFileSystem(Store()))


@pytest.fixture(autouse=True)
def without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(config: Any, adapter: Path, built: Path) -> None:
        built.mkdir()
        (built / "model.safetensors").write_bytes(b"base and " + (adapter / "adapter_model.safetensors").read_bytes())

    monkeypatch.setattr(student_folder, "merge_adapter", merge)
    monkeypatch.setattr(student_folder, "redirect_output", lambda folder, name: None)  # of this very process
    monkeypatch.setattr(student_folder, "prompts_of", lambda student, key: None)
    monkeypatch.setattr(student_folder, "save_tokenizer", lambda prompts, built: (built / "tokenizer.json").touch())


def config_with(student: dict[str, Any], **train: Any) -> RunConfig:
    raw = {"recipe": {"context": {"text": "."}}, "data": {"source": "x"}, "teacher": {"type": "fake"}}
    return parse_config({**raw, "student": {"model": "demo", **student}, "train": train})


class Elsewhere:
    """Stands in for `ray.remote`: tasks run on a node that has not the driver's temporary folder."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked_for: dict[str, Any] = {}
        self._monkeypatch = monkeypatch
        self._drivers, self._nodes, self._away = tmp_path / "driver", tmp_path / "node", tmp_path / "away"
        for place in (self._drivers, self._nodes):
            place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(self._drivers))

    def __call__(self, function: Callable[..., Any]) -> Elsewhere:
        self._function = function
        return self

    def options(self, **asked_for: Any) -> Elsewhere:
        self.asked_for = asked_for
        return self

    def remote(self, *arguments: Any) -> Any:
        arguments = pickle.loads(pickle.dumps(arguments))
        self._drivers.rename(self._away)
        self._monkeypatch.setattr(tempfile, "tempdir", str(self._nodes))
        try:
            return self._function(*arguments)
        finally:
            self._away.rename(self._drivers)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    stand_in = Elsewhere(tmp_path, monkeypatch)
    monkeypatch.setattr(ray, "remote", stand_in)
    monkeypatch.setattr(ray, "get", lambda done: done)
    return stand_in


def test_only_the_model_of_a_checkpoint_is_fetched_and_put_in_the_place_of_the_student_before(
    folder: RunFolder, checkpoint: ray.train.Checkpoint
) -> None:
    write_student(config_with({"lora": {}}), folder, checkpoint)
    assert folder.list("student") == ["adapter_model.safetensors", "tokenizer.json"]
    assert folder.read_bytes("student", "adapter_model.safetensors") == b"learnt"


def test_adapters_of_a_run_in_a_bucket_are_merged_on_a_node_where_a_worker_had_room(
    folder: RunFolder, checkpoint: ray.train.Checkpoint, elsewhere: Elsewhere
) -> None:
    config = config_with(MERGED, cpus_per_worker=3, node_labels={"stage": "student"})
    write_student(config, folder, checkpoint)
    assert elsewhere.asked_for == {"num_cpus": 3.0, "label_selector": {"stage": "student"}}
    assert folder.list("student") == ["adapter", "model.safetensors", "tokenizer.json"]
    assert folder.read_bytes("student", "model.safetensors") == b"base and learnt"
    assert folder.read_bytes("student", "adapter", "adapter_model.safetensors") == b"learnt"


def test_adapters_of_a_local_run_are_merged_in_it(tmp_path: Path, elsewhere: Elsewhere) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_bytes(b"learnt", "checkpoints", "step", "model", "adapter_model.safetensors")
    write_student(config_with(MERGED), folder, ray.train.Checkpoint.from_directory(folder.local("checkpoints", "step")))
    assert folder.read_bytes("student", "model.safetensors") == b"base and learnt"
    assert [path.name for path in folder.local("train").iterdir()] == []


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (
            MemoryError("cannot allocate"),
            "student.lora.merge: merging failed inside Ray: MemoryError: cannot allocate;",
        ),
        (TrainingError("student.model: gone"), "student.model: gone"),
    ],
    ids=["another's", "our own"],
)
def test_what_fails_on_the_other_node_is_one_message(
    cause: Exception, said: str, folder: RunFolder, checkpoint: ray.train.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def options(self, **asked_for: Any) -> Failing:
            return self

        def remote(self, *arguments: Any) -> Exception:
            return ray.exceptions.RayTaskError("_write_apart", "Traceback\n", cause).as_instanceof_cause()

    def get(error: Exception) -> None:
        raise error

    monkeypatch.setattr(ray, "remote", lambda function: Failing())
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(TrainingError) as caught:
        write_student(config_with(MERGED), folder, checkpoint)
    assert str(caught.value).startswith(said)
    assert caught.value.__cause__ is None
