"""What was deleted from the store leaves the verdicts of cycles too: the worst examples and the names of clusters.

Nothing else of a cycle that is over holds text, and one that is not has more until it is. `pairs delete` does it at
once; each run of the flywheel does it before and after a cycle, as pairs may be deleted while one is on, or elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from distill_ray.flywheel.cycles import Cycle, Cycles
from distill_ray.flywheel.page import write_gate_page
from distill_ray.serving.collecting.store import PairStore

DELETED = "(deleted)"


def forget(service: str | Path, store: PairStore) -> None:
    """Take what was ever deleted out of `gate.json` of all cycles that are over, and make their pages anew.

    It may be done any number of times.

    Raises:
        DistillError: the store, or a file of a cycle, cannot be used.
    """
    over = [cycle for cycle in Cycles(service).all() if cycle.outcome is not None]
    if over:
        gone = {pair_id for deletion in store.deletions() for pair_id in deletion.pair_ids}
        for cycle in over:
            _forget(cycle, gone)


def _forget(cycle: Cycle, gone: set[str]) -> None:
    gate = cycle.result("gate") or {}
    worst, clusters = gate.get("worst", []), gate.get("clusters", [])
    left = {
        "worst": [each for each in worst if each.get("pair_id") not in gone],
        "clusters": [{**each, "name": DELETED} if each.get("pair_id") in gone else each for each in clusters],
    }
    if left != {"worst": worst, "clusters": clusters}:
        write_gate_page(cycle, "gate", {**gate, **left})  # first: the file says what is still to be done
        cycle.files.write_json({**gate, **left}, "gate.json")
