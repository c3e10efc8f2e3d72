"""Which pairs count as learnt: those in the index of a bundle that serves, or did on the way to the one that does.

`indexed` and `indexed_by` follow the pointer, never lead it: `settle` makes them say what it says, whoever moved it and
wherever he was killed. It may run at any time, any number of times, and several times at once.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from distill_ray.errors import BundleError
from distill_ray.serving.collecting.store.base import PairStore, Selection
from distill_ray.serving.routing.bundle import learnt_entries
from distill_ray.serving.routing.bundles import Bundles

PAIR_ID = re.compile(r"[0-9a-f]{32}")  # an offline run's examples are called otherwise


def settle(bundles: Bundles, store: PairStore) -> tuple[int, int]:
    """Mark what the bundles on the way to the current one were trained on, and nothing else.

    Returns:
        Pairs that were marked, and marks that were taken back.

    Raises:
        StoreError: the store cannot be used; the next time will do.
    """
    num_marked = num_unmarked = 0
    versions, settled = bundles.versions(), None
    # Whoever was at it with what the pointer said before looks once more after his last mark.
    while versions != settled:
        marked_now, unmarked_now = _settle(versions, bundles, store)
        num_marked, num_unmarked = num_marked + marked_now, num_unmarked + unmarked_now
        versions, settled = bundles.versions(), versions
    return num_marked, num_unmarked


def _settle(versions: list[str], bundles: Bundles, store: PairStore) -> tuple[int, int]:
    marked: dict[str, str] = {}
    for batch in store.scan(Selection(indexed=True), ["pair_id", "indexed_by"]):
        marked.update(zip(batch["pair_id"].to_pylist(), batch["indexed_by"].to_pylist(), strict=True))
    num_unmarked = sum(store.unmark_indexed(gone) for gone in sorted(set(marked.values()) - set(versions)))
    known = {pair_id for pair_id, version in marked.items() if version in versions}
    num_marked = 0
    for version in dict.fromkeys(versions):
        with contextlib.suppress(BundleError):  # not installed any more: its marks stay as they are
            folder = bundles.path(version, with_student=False)
            ids = [pair_id for pair_id in learnt_pairs(folder) if pair_id not in known]
            num_marked += store.mark_indexed(ids, version)
            known.update(ids)
    return num_marked, num_unmarked


def learnt_pairs(bundle: Path) -> list[str]:
    """Ids of the collected pairs in a bundle's index. Raises BundleError: it cannot be read."""
    ids = [entry["example_id"] for entry in learnt_entries(bundle)]
    return [each for each in ids if PAIR_ID.fullmatch(each)]
