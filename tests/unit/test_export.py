"""Examples in the forms of other tools, read back by those tools."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from distill_ray.config import parse_config
from distill_ray.errors import ConfigError, DistillError
from distill_ray.pipeline.export import export
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.pipeline.run import write_origin
from distill_ray.recipes import make_recipe
from distill_ray.records import Example, Split, examples_table

RAW = {"recipe": {"context": {"text": "x"}}, "teacher": {"type": "fake"}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of two partitions."""
    folder = RunFolder(tmp_path / "run")
    splits: list[Split] = ["train", "train", "validation", "test"]
    for partition in range(2):
        examples = [
            Example(f"r{partition}{i}", split, [{"role": "user", "content": f"Frage {i}: „ä“?"}], f"answer {i}\nß")
            for i, split in enumerate(splits)
        ]
        folder.write_table(examples_table(examples), "examples", f"{partition:05d}.parquet")
    write_origin(parse_config({**RAW, "data": {"source": "queries.jsonl"}}), folder)
    return folder


def test_messages_end_with_the_answer_and_are_of_the_training_split(run: RunFolder, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out" / "train.jsonl", "messages", None) == {"train": 4}
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4
    assert lines[1] == {
        "messages": [{"role": "user", "content": "Frage 1: „ä“?"}, {"role": "assistant", "content": "answer 1\nß"}]
    }
    assert export(run, tmp_path / "test.jsonl", "messages", "test") == {"test": 2}


def test_what_is_exported_can_be_a_source_again(run: RunFolder, tmp_path: Path) -> None:
    export(run, tmp_path / "train.jsonl", "messages", None)
    raw = {
        **RAW,
        "data": {"source": str(tmp_path / "train.jsonl"), "layout": "messages"},
        "evaluate": {"reference": "answer"},
    }
    config = parse_config(raw)
    again = RunFolder(tmp_path / "again")
    plan_rows(config, make_recipe(config.recipe), again)
    rows = [record for table in again.read_tables("rows") for record in table.to_pylist()]
    assert {(row["query"], row["reference"]) for row in rows} == {
        (f"Frage {i}: „ä“?", f"answer {i}\nß") for i in range(2)
    }


def test_a_data_set_folder_is_loaded_by_datasets_with_its_splits(run: RunFolder, tmp_path: Path) -> None:
    assert export(run, tmp_path / "set", "dataset", None) == {"train": 4, "validation": 2, "test": 2}
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 4, "validation": 2, "test": 2}
    row = loaded["test"][0]
    assert row["messages"][-1] == {"role": "assistant", "content": "answer 3\nß"}
    assert (row["row_id"], row["task"], row["weight"]) == ("r03", "answer", 1.0)


def test_nothing_is_overwritten_and_nothing_half_written_stays(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "there.jsonl").write_text("mine")
    for name, format in (("there.jsonl", "messages"), ("there", "dataset")):
        with pytest.raises(ConfigError, match="is there already"):
            export(run, tmp_path / name, format, None)
    assert (tmp_path / "there").read_text() == (tmp_path / "there.jsonl").read_text() == "mine"
    empty = RunFolder(tmp_path / "empty")
    with pytest.raises(DistillError, match="run `distill-ray generate` first"):
        export(empty, tmp_path / "none.jsonl", "messages", None)
    with pytest.raises(DistillError, match="cannot write it"):
        export(run, tmp_path / "there" / "below.jsonl", "messages", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there", "there.jsonl"]


def test_a_split_without_examples_names_those_that_have_some(run: RunFolder, tmp_path: Path) -> None:
    run.delete("examples", "00001.parquet")
    examples = [Example("r", "train", [{"role": "user", "content": "?"}], "!")] * 3
    run.write_table(examples_table(examples), "examples", "00000.parquet")
    run.write_json({"generation_complete": True}, "manifest.json")
    with pytest.raises(DistillError, match="no example of test; there are train 3; choose with --split"):
        export(run, tmp_path / "test.jsonl", "messages", "test")


def test_a_run_whose_rows_were_all_rejected_is_not_told_to_generate_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_json({"generation_complete": True}, "manifest.json")
    folder.write_table(examples_table([]), "examples", "00000.parquet")
    with pytest.raises(DistillError, match="no example of train; generation gave none at all: see its rejects/"):
        export(folder, tmp_path / "train.jsonl", "messages", None)


def test_a_run_that_was_stopped_is_exported_with_a_warning(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_json({"generation_complete": True}, "manifest.json")
    export(run, tmp_path / "whole.jsonl", "messages", None)
    assert "stopped" not in capsys.readouterr().err
    run.write_json({"generation_complete": False}, "manifest.json")
    assert export(run, tmp_path / "half.jsonl", "messages", None) == {"train": 4}
    assert "generation was stopped before its end; exporting the examples there are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("train.parquet", "messages", r"ends in \.jsonl, \.ndjson, \.json; or take --format dataset"),
        ("train.jsonl.gz", "messages", r"ends in \.jsonl, "),
        ("train", "messages", r"ends in \.jsonl, "),
        ("train.parquet", "dataset", "writes a folder with Parquet files; give a folder's name"),
    ],
)
def test_a_name_of_another_kind_of_file_is_refused(
    run: RunFolder, tmp_path: Path, name: str, format: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / name, format, None)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(("format", "split"), [("csv", None), ("messages", "dev")])
def test_an_unknown_format_or_split_names_those_there_are(
    run: RunFolder, tmp_path: Path, format: str, split: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"unknown; there are: \w+"):
        export(run, tmp_path / "x", format, split)
