"""The demo's input: queries made from a seed, and the shipped config bound to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distill_ray.config import RunConfig, load_config
from distill_ray.demo import INSTRUCTION_PATH, language_rows

CONFIG_PATH = Path(__file__).parent / "config.yaml"
NUM_HELD_OUT = 400


def prepare_demo(folder: Path, *, num_rows: int, overrides: Sequence[str] = ()) -> RunConfig:
    """Write `queries.jsonl`, `held_out.jsonl` and `instruction.md` below `folder`; return the config bound to them.

    Args:
        folder: local; created if need be.
        num_rows: training queries.
        overrides: as in `load_config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / "queries.jsonl", language_rows(num_rows))
    _write_rows(folder / "held_out.jsonl", language_rows(NUM_HELD_OUT, held_out=True))
    _write(folder / "instruction.md", INSTRUCTION_PATH.read_text(encoding="utf-8"))
    _write(folder / "config.yaml", CONFIG_PATH.read_text(encoding="utf-8"))
    return load_config(folder / "config.yaml", overrides)


def _write_rows(path: Path, rows: list[dict]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    """Leave an equal file alone: its time of change is part of how a rerun knows its input."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
