"""A model in an object store: fetched once for a node, without what runs code, and told from another. In memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distill_ray.config import HfEngineConfig, StudentConfig
from distill_ray.engines.hf import HfEngine
from distill_ray.errors import ConfigError
from distill_ray.models import (
    ChatTokenizer,
    load_model_config,
    model_identity,
    require_safetensors,
    resolve_adapter,
    resolve_model,
)

URL = "memory://zoo/tiny"


@pytest.fixture(autouse=True)
def store(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tiny model in a store, beside files that nobody needs."""
    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.put(str(tiny_model) + "/", "/zoo/tiny/", recursive=True)
    fs.pipe({"/zoo/tiny/pytorch_model.bin": b"pickle", "/zoo/tiny/checkpoint-1/model.safetensors": b"old"})
    yield fs
    fs.rm("/zoo", recursive=True)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fetched as a whole file, from now on."""
    names: list[str] = []
    get = MemoryFileSystem.get_file

    def noted(self: MemoryFileSystem, rpath: str, *arguments: Any, **named: Any) -> Any:
        names.append(rpath.rsplit("/", 1)[-1])
        return get(self, rpath, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", noted)
    return names


def test_a_model_is_fetched_once_and_without_what_runs_code(tiny_model: Path, read: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        [folder] = {Path(place) for place in pool.map(lambda _: resolve_model(URL), range(4))}
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tiny_model.iterdir())
    assert sorted(read) == names
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_who_looks_at_configuration_and_tokenizer_fetches_no_weights(read: list[str]) -> None:
    student = StudentConfig(model=URL)
    assert load_model_config(student, key="student.model").num_hidden_layers == 2
    assert ChatTokenizer.of(student, key="student.model").prompt_ids([{"role": "user", "content": "x"}])
    require_safetensors(URL, key="student.model")
    assert read
    assert not [name for name in read if name.endswith(".safetensors")]


def test_a_changed_model_is_another_one(store: Any) -> None:
    before, identity = resolve_model(URL), model_identity(URL)
    assert (resolve_model(URL), model_identity(URL)) == (before, identity)
    weights = store.cat_file("/zoo/tiny/model.safetensors")
    store.pipe_file("/zoo/tiny/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    assert resolve_model(URL) != before
    assert model_identity(URL) != identity


def test_the_same_files_have_one_mark_wherever_they_lie(store: Any, tiny_model: Path, tmp_path: Path) -> None:
    store.copy("/zoo/tiny", "/zoo/copy", recursive=True)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    large = bytes(range(256)) * (3 << 12)  # three MiB: its ends are read
    (copy / "more.safetensors").write_bytes(large)
    for folder in ("tiny", "copy"):
        store.pipe_file(f"/zoo/{folder}/more.safetensors", large)
    places = (URL, "memory://zoo/copy", str(copy))
    assert len({model_identity(place).rsplit("@", 1)[1] for place in places}) == 1
    assert model_identity(URL).startswith(f"{URL}@")


def test_an_engine_runs_a_model_from_a_store_under_the_name_of_its_place() -> None:
    engine = HfEngine(HfEngineConfig(model=URL, gpus=0))
    assert engine.identity.startswith(f"hf:{URL}@")


def test_adapters_are_fetched_too(store: Any) -> None:
    store.pipe({"/zoo/adapter/adapter_config.json": b"{}", "/zoo/adapter/adapter_model.safetensors": b"a"})
    folder = Path(resolve_adapter("memory://zoo/adapter", key="student.adapter"))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert resolve_adapter("/some/folder", key="student.adapter") == "/some/folder"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://zoo/none", r"^student\.model: no model at memory://zoo/none: nothing is there; check the address"),
        ("memory://zoo/adapter", r"^student\.model: memory://zoo/adapter has no config\.json"),
        ("nothing://zoo/tiny", r"^student\.model: nothing://zoo/tiny: cannot look there for a model"),
    ],
)
def test_what_is_no_model_is_named(store: Any, url: str, said: str) -> None:
    store.pipe_file("/zoo/adapter/adapter_config.json", b"{}")
    with pytest.raises(ConfigError, match=said):
        resolve_model(url, key="student.model")


def test_weights_that_run_code_alone_are_refused(store: Any) -> None:
    store.pipe({"/zoo/old/config.json": b"{}", "/zoo/old/pytorch_model.bin": b"pickle"})
    with pytest.raises(ConfigError, match=r"student\.model: memory://zoo/old has no weights in safetensors"):
        require_safetensors("memory://zoo/old", key="student.model")


def test_a_model_that_changes_while_it_is_fetched_is_not_used(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    get = MemoryFileSystem.get_file

    def meanwhile(self: MemoryFileSystem, *arguments: Any, **named: Any) -> Any:
        store.pipe_file("/zoo/tiny/more.json", b"{}")
        return get(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", meanwhile)
        with pytest.raises(ConfigError, match="changed while it was fetched"):
            resolve_model(URL)
    assert (Path(resolve_model(URL)) / "more.json").is_file()
