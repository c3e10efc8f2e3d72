"""Export: examples in the forms that other tools read.

| format     | what is written                                                  | read by                            |
|------------|------------------------------------------------------------------|------------------------------------|
| `messages` | one JSON lines file: {"messages": [..., the answer]} per example | fine-tuning APIs, TRL, many others |
| `dataset`  | a folder: README.md with its card, data/SPLIT-NNNNN.parquet      | `datasets.load_dataset`, the hub   |
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_ray.errors import ConfigError, DistillError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import say
from distill_ray.pipeline.reporting.cards import dataset_card
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.run import stored_config

SPLITS = ("train", "validation", "test")
FORMATS = ("messages", "dataset")
ENDINGS = (".jsonl", ".ndjson", ".json")  # of `messages`
FILE_ENDINGS = (*ENDINGS, ".parquet", ".csv", ".arrow", ".gz", ".zip")  # no names for a folder
COLUMNS = ["example_id", "row_id", "split", "task", "messages", "completion", "weight"]
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def export(folder: RunFolder, out: Path, format: str, split: str | None) -> dict[str, int]:
    """Write the examples of a run; returns how many of each split. What is there already is not overwritten.

    Args:
        folder: a run that has generated.
        out: file (`messages`) or folder (`dataset`) to write.
        format: one of FORMATS.
        split: only this one; None: train for `messages`, all of them for `dataset`.

    Raises:
        ConfigError: an unknown format or split, or `out` is there.
        DistillError: there is nothing to write, or it cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown; there are: {', '.join(FORMATS)}")
    if split is not None and split not in SPLITS:
        raise ConfigError(f"--split {split}: unknown; there are: {', '.join(SPLITS)}")
    _require_ending(out, format)
    require_free(out)
    if not folder.manifest().get("generation_complete", True):
        say("export: generation was stopped before its end; exporting the examples there are")
    if format == "messages":
        splits: tuple[str, ...] = (split or "train",)
    else:
        splits = (split,) if split is not None else SPLITS
    with appearing_whole(out) as temporary:
        write = _write_messages if format == "messages" else _write_dataset
        counts = write(folder, temporary, splits)
        if not any(counts.values()):
            raise DistillError(f"{folder.root}: no example of {' or '.join(splits)}; {_instead(folder)}")
    return counts


def require_free(out: Path) -> None:
    """Raises ConfigError: there is something already."""
    if out.exists():
        raise ConfigError(f"{out}: is there already; give another name")


@contextlib.contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A place to write a file or a folder to, which becomes `out` when the block is over, and is gone if it fails.

    Raises:
        DistillError: it cannot be written.
    """
    temporary = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise DistillError(f"{out}: cannot write it ({error.strerror or error}); give another place") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _require_ending(out: Path, format: str) -> None:
    """Raises ConfigError: the name says another kind of file than the one that would be written."""
    ending = out.suffix.lower()
    if format == "messages" and ending not in ENDINGS:
        raise ConfigError(
            f"{out}: --format messages writes JSON lines, into a file that ends in {', '.join(ENDINGS)}; or take "
            "--format dataset, which writes a folder with Parquet files"
        )
    if format == "dataset" and ending in FILE_ENDINGS:
        raise ConfigError(
            f"{out}: --format dataset writes a folder with Parquet files; give a folder's name, or take --format "
            f"messages with a file that ends in {', '.join(ENDINGS)}"
        )


def _instead(folder: RunFolder) -> str:
    """What to do where a split has no example: by what the run has."""
    counts: Counter[str] = Counter()
    for table in folder.read_tables("examples", columns=["split"]):
        counts.update(table["split"].to_pylist())
    if counts:
        return (
            f"there are {', '.join(f'{name} {counts[name]}' for name in SPLITS if counts[name])}; choose with --split"
        )
    if folder.manifest().get("generation_complete"):
        return "generation gave none at all: see its rejects/ for the reasons"
    return "run `distill-ray generate` first"


def _tables(folder: RunFolder, split: str) -> Iterator[pa.Table]:
    """The examples of a split, partition by partition, with the answer as the last message."""
    for table in folder.read_tables("examples", columns=COLUMNS):
        chosen = table.filter(pc.field("split") == split)
        if not chosen.num_rows:
            continue
        messages = [
            [*before, {"role": "assistant", "content": answer}]
            for before, answer in zip(chosen["messages"].to_pylist(), chosen["completion"].to_pylist(), strict=True)
        ]
        index = chosen.schema.get_field_index("messages")
        yield chosen.set_column(index, "messages", pa.array(messages, type=_MESSAGES)).drop_columns(
            ["split", "completion"]
        )


def _write_messages(folder: RunFolder, path: Path, splits: tuple[str, ...]) -> dict[str, int]:
    [split] = splits
    num_examples = 0
    with path.open("w", encoding="utf-8") as file:
        for table in _tables(folder, split):
            for messages in table["messages"].to_pylist():
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            num_examples += table.num_rows
    return {split: num_examples}


def _write_dataset(folder: RunFolder, path: Path, splits: tuple[str, ...]) -> dict[str, int]:
    (path / "data").mkdir(parents=True)
    counts = dict.fromkeys(splits, 0)
    for split in splits:
        for number, table in enumerate(_tables(folder, split)):
            pq.write_table(table.replace_schema_metadata(None), path / "data" / f"{split}-{number:05d}.parquet")
            counts[split] += table.num_rows
    files = {split: f"data/{split}-*.parquet" for split, count in counts.items() if count}
    card = dataset_card(Facts(folder, stored_config(folder)), counts, files)
    (path / "README.md").write_text(card, encoding="utf-8")
    return counts
