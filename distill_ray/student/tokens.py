"""Examples as token ids on disk. Written once, then memory-mapped by every worker.

    <folder>/<split>/ids.bin         int32, prompt + completion of one example after the other
    <folder>/<split>/index.parquet   one record per example, in the same order
    <folder>/<split>/topk_ids.bin, topk_logprobs.bin   soft targets: int32 and float32, K per completion token

Only the index is ever held in memory; of its columns only the numbers (ids of rows are read when an error
names them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

INDEX_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("row_id", pa.string()),
        ("row", pa.int64()),  # consecutive number of the row: examples of one row are neighbours
        ("task", pa.dictionary(pa.int32(), pa.string())),
        ("weight", pa.float32()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)


@dataclasses.dataclass(slots=True)
class TokenizedExample:
    """One example, ready to be trained on."""

    example_id: str
    row_id: str
    task: str
    weight: float
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    topk_ids: npt.NDArray[np.int32] | None = None  # [T of the completion, K]
    topk_logprobs: npt.NDArray[np.float32] | None = None


SOFT_TARGETS = {"topk_ids": np.int32, "topk_logprobs": np.float32}


class TokenWriter:
    """Writes one split. Examples of one row must come one after the other.

    Args:
        folder: to write into.
        topk: K of the soft targets that every example has; 0: none has.
    """

    def __init__(self, folder: Path, *, topk: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._topk = topk
        self._files: dict[str, BinaryIO] = {}
        for name in ("ids", *(SOFT_TARGETS if topk else ())):
            self._files[name] = open(folder / f"{name}.bin", "wb")  # noqa: SIM115 (closed in __exit__)
        self._index = pq.ParquetWriter(folder / "index.parquet", INDEX_SCHEMA)
        self._last_row_id: str | None = None
        self._row = -1
        self.num_examples = 0
        self.num_tokens = 0

    def write(self, examples: Sequence[TokenizedExample]) -> None:
        """Append some examples."""
        records: list[dict[str, Any]] = []
        for example in examples:
            if example.row_id != self._last_row_id:
                self._last_row_id, self._row = example.row_id, self._row + 1
            ids = np.asarray([*example.prompt_ids, *example.completion_ids], dtype=np.int32)
            self._files["ids"].write(ids.tobytes())
            for name, dtype in SOFT_TARGETS.items() if self._topk else ():
                values = np.asarray(getattr(example, name), dtype=dtype)
                assert values.shape == (len(example.completion_ids), self._topk), example.example_id
                self._files[name].write(values.tobytes())
            self.num_examples += 1
            self.num_tokens += len(ids)
            records.append(
                {
                    "example_id": example.example_id,
                    "row_id": example.row_id,
                    "row": self._row,
                    "task": example.task,
                    "weight": example.weight,
                    "prompt_tokens": len(example.prompt_ids),
                    "completion_tokens": len(example.completion_ids),
                }
            )
        if records:
            self._index.write_table(pa.Table.from_pylist(records, schema=INDEX_SCHEMA))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._index.close()
        for file in self._files.values():
            file.close()


class Tokens:
    """One split, memory-mapped. Suffix E: one entry per example."""

    def __init__(self, folder: Path) -> None:
        self._index_file = folder / "index.parquet"
        columns = ["row", "task", "weight", "prompt_tokens", "completion_tokens"]
        index = pq.read_table(self._index_file, columns=columns)
        self.rows_E = index["row"].to_numpy()
        self.weights_E: npt.NDArray[np.float32] = index["weight"].to_numpy()
        self.prompt_tokens_E = index["prompt_tokens"].to_numpy().astype(np.int64)
        self.completion_tokens_E = index["completion_tokens"].to_numpy().astype(np.int64)
        self.lengths_E = self.prompt_tokens_E + self.completion_tokens_E
        tasks = index["task"].combine_chunks()
        tasks = tasks.unify_dictionaries() if isinstance(tasks, pa.ChunkedArray) else tasks
        names, self.tasks_E = np.unique(tasks.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
        self.task_names: list[str] = names.tolist()
        self._offsets_E = np.concatenate([[0], np.cumsum(self.lengths_E)])
        self._ids = _mapped(folder / "ids.bin", np.int32)
        self._completion_offsets_E = np.concatenate([[0], np.cumsum(self.completion_tokens_E)])
        self._soft = {
            name: _mapped(folder / f"{name}.bin", dtype)
            for name, dtype in SOFT_TARGETS.items()
            if (folder / f"{name}.bin").exists()
        }
        num_completion_tokens = int(self._completion_offsets_E[-1])
        self.topk = len(self._soft["topk_ids"]) // num_completion_tokens if self._soft and num_completion_tokens else 0

    def __len__(self) -> int:
        return len(self.lengths_E)

    def ids(self, example: int) -> npt.NDArray[np.int32]:
        """Prompt and completion of one example. [T]"""
        return self._ids[self._offsets_E[example] : self._offsets_E[example + 1]]

    def soft_targets(self, examples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The teacher's top k at the completion tokens of these examples, one after the other. [N, K], [N, K]"""
        starts, counts = self._completion_offsets_E[examples], self.completion_tokens_E[examples]
        rows = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        ids, logprobs = (self._soft[name].reshape(-1, self.topk)[rows] for name in SOFT_TARGETS)
        return ids.astype(np.int64), logprobs

    def task_tokens(self, examples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Completion tokens of each task among these examples. [num tasks]"""
        return np.bincount(
            self.tasks_E[examples], self.completion_tokens_E[examples], minlength=len(self.task_names)
        ).astype(np.int64)

    def row_ids(self, examples: npt.NDArray[np.int64]) -> list[str]:
        """Ids of the rows of these examples, each once, in order."""
        column = pq.read_table(self._index_file, columns=["row_id"])["row_id"]
        return list(dict.fromkeys(column.take(pa.array(examples)).to_pylist()))


def _mapped(path: Path, dtype: type) -> npt.NDArray[Any]:
    """The file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
