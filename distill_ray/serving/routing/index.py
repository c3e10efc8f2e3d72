"""The requests that a student was trained on, nearest first. In memory, never changed; faiss searches.

    vectors [N, D], fingerprints [N]  ->  one group of rows per fingerprint  ->  search within one group

A search never sees rows of another fingerprint. Groups of up to EXACT_UP_TO rows lie one behind the other in one flat
index, of which a search reads its own range: exact. A larger group has a graph (HNSW, Malkov & Yashunin 2016, arXiv
1603.09320): approximate, at a small part of the time; `benchmarks/decision.py` measures both.

On disk: `flat.faiss`, `graph-N.faiss` for each large group, `groups.arrow` (fingerprint, rows). No pickle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from distill_ray.errors import BundleError, first_line

# Shape suffixes: N rows, D dimensions, K neighbours.

EXACT_UP_TO = 10_000  # rows: 1 ms of one core at 384 dimensions
GRAPH_LINKS = 32  # per row and layer
GRAPH_BUILD_WIDTH = 80  # candidates looked at when a row is put in
GRAPH_SEARCH_WIDTH = 128  # candidates looked at when searching

_GROUPS = pa.schema(
    [("fingerprint", pa.string()), ("rows", pa.list_(pa.int64())), ("has_graph", pa.bool_())],
    metadata={"distill_ray.index": "1"},
)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of one fingerprint, which are the range [start, start + len(rows)) of their faiss index."""

    rows_N: np.ndarray
    faiss_index: Any
    start: int
    has_graph: bool


class NearestIndex:
    """Similarity search among rows of the same fingerprint. Immutable, so any number of threads may search.

    Make one with `build` or `load`.
    """

    def __init__(self, dim: int, flat: Any, groups: dict[str, _Group]) -> None:
        self.dim = dim
        self._flat = flat
        self._groups = groups

    @classmethod
    def build(
        cls, vectors_ND: np.ndarray, fingerprints: Sequence[str], *, exact_up_to: int = EXACT_UP_TO
    ) -> NearestIndex:
        """Index vectors of unit length, each under the fingerprint of its request. Seconds per 100,000 rows.

        Args:
            vectors_ND: [N, D] float32; N may be 0.
            fingerprints: one per row.
            exact_up_to: rows of a fingerprint that are searched one by one.

        Raises:
            ValueError: a shape or number that is none of that.
        """
        if vectors_ND.ndim != 2 or len(vectors_ND) != len(fingerprints):
            raise ValueError(f"vectors of shape {vectors_ND.shape} for {len(fingerprints)} fingerprints")
        if not np.allclose(np.linalg.norm(vectors_ND, axis=1), 1.0, atol=1e-3):  # not so for NaN either
            raise ValueError("a vector is not of unit length, or not finite")
        rows_by_fingerprint: dict[str, list[int]] = {}
        for row, fingerprint in enumerate(fingerprints):
            rows_by_fingerprint.setdefault(fingerprint, []).append(row)
        flat = faiss.IndexFlatIP(vectors_ND.shape[1])
        groups: dict[str, _Group] = {}
        for fingerprint, rows in rows_by_fingerprint.items():
            rows_N = np.asarray(rows, dtype=np.int64)
            has_graph = len(rows) > exact_up_to
            index = _graph(vectors_ND.shape[1]) if has_graph else flat
            groups[fingerprint] = _Group(rows_N, index, index.ntotal, has_graph)
            index.add(np.ascontiguousarray(vectors_ND[rows_N], dtype=np.float32))
        return cls(vectors_ND.shape[1], flat, groups)

    def __len__(self) -> int:
        return sum(len(group.rows_N) for group in self._groups.values())

    def search(self, vector_D: np.ndarray, fingerprint: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest rows of a fingerprint: their cosine similarities [K] float32, and the rows [K] int64.

        Most similar first. K is k, or as many rows as there are: 0 for an unknown fingerprint.

        Raises:
            ValueError: a vector of another dimension.
        """
        if vector_D.shape != (self.dim,):
            raise ValueError(f"a vector of shape {vector_D.shape} for an index of {self.dim} dimensions")
        group = self._groups.get(fingerprint)
        if group is None or k < 1:
            return np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
        parameters = None
        if not group.has_graph:  # faiss reads nothing outside a range
            span = faiss.IDSelectorRange(group.start, group.start + len(group.rows_N))
            parameters = faiss.SearchParameters()
            parameters.sel = span  # borrowed: `span` has to live until the search is over
        query_1D = np.ascontiguousarray(vector_D, dtype=np.float32)[None]
        similarities_1K, places_1K = group.faiss_index.search(query_1D, k, params=parameters)
        is_found_K = places_1K[0] >= 0  # where there are fewer than k, faiss fills up with -1
        return similarities_1K[0][is_found_K], group.rows_N[places_1K[0][is_found_K] - group.start]

    def save(self, folder: Path) -> None:
        """Write the index into a folder (made if need be)."""
        folder.mkdir(parents=True, exist_ok=True)
        records = [
            {"fingerprint": fingerprint, "rows": group.rows_N, "has_graph": group.has_graph}
            for fingerprint, group in self._groups.items()
        ]
        with pa.OSFile(str(folder / "groups.arrow"), "wb") as file, pa.ipc.new_file(file, _GROUPS) as writer:
            writer.write_table(pa.Table.from_pylist(records, schema=_GROUPS))
        faiss.write_index(self._flat, str(folder / "flat.faiss"))
        graphs = [group.faiss_index for group in self._groups.values() if group.has_graph]
        for number, graph in enumerate(graphs):
            faiss.write_index(graph, str(folder / f"graph-{number}.faiss"))

    @classmethod
    def load(cls, folder: Path) -> NearestIndex:
        """Read what `save` wrote.

        Raises:
            BundleError: a file is missing, damaged, or of another version.
        """
        try:
            return cls._load(folder)
        except (OSError, ValueError, RuntimeError) as error:  # faiss raises RuntimeError for all that it cannot read
            reason = first_line(error)
            raise BundleError(f"{folder}: cannot read this index ({reason}); calibrate again") from error

    @classmethod
    def _load(cls, folder: Path) -> NearestIndex:
        with pa.OSFile(str(folder / "groups.arrow"), "rb") as file:
            table = pa.ipc.open_file(file).read_all()
        if not table.schema.equals(_GROUPS, check_metadata=True):
            raise ValueError("groups.arrow was written by another version of distill-ray")
        flat = faiss.read_index(str(folder / "flat.faiss"))
        groups: dict[str, _Group] = {}
        start = num_graphs = 0
        for fingerprint, rows, has_graph in zip(*(table[name] for name in _GROUPS.names), strict=True):
            group = _Group(rows.values.to_numpy(), flat, start, has_graph.as_py())
            if group.has_graph:
                graph = faiss.read_index(str(folder / f"graph-{num_graphs}.faiss"))
                if graph.ntotal != len(group.rows_N) or graph.d != flat.d:
                    raise ValueError(f"graph-{num_graphs}.faiss belongs to another index")
                group = dataclasses.replace(group, faiss_index=graph, start=0)
                num_graphs += 1
            else:
                start += len(group.rows_N)
            groups[fingerprint.as_py()] = group
        if start != flat.ntotal:
            raise ValueError("flat.faiss belongs to another index")
        return cls(flat.d, flat, groups)


def _graph(dim: int) -> Any:
    graph = faiss.IndexHNSWFlat(dim, GRAPH_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = GRAPH_BUILD_WIDTH
    graph.hnsw.efSearch = GRAPH_SEARCH_WIDTH
    return graph
