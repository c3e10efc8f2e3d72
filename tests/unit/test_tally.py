"""The counter of a generation: its sums are those of the last report of each partition."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.errors import TooManyRejects
from distill_ray.pipeline.tally import Tally

SUMMED = ("rows", "calls", "replayed", "paid_tokens")
counts = st.integers(0, 1000)
reasons = st.dictionaries(st.sampled_from(["refused", "cut_off", "duplicate"]), counts)
figures = st.fixed_dictionaries({**dict.fromkeys(SUMMED, counts), "rejects": reasons})
reports = st.lists(st.tuples(st.integers(0, 4), figures))


def make_tally(**changes: Any) -> Tally:
    return Tally(**{"rows_in": 10, "max_reject_frac": 10.0**9, "max_tokens": None, "rejects": {}, "rows_done": 0,
                    **changes})  # fmt: skip


@given(reports=reports, earlier=reasons)
def test_the_sums_are_those_of_the_last_report_of_each_partition(
    reports: list[tuple[int, dict[str, Any]]], earlier: dict[str, int]
) -> None:
    tally = make_tally(rejects=earlier, rows_done=7, replayed=5)
    for partition, told in reports:
        tally.report(partition, told, [], ("worker", 0))
    last = dict(reports).values()
    state = tally.state()
    assert state["rows"] == 7 + sum(told["rows"] for told in last)
    assert state["calls"] == sum(told["calls"] for told in last)
    assert state["replayed"] == 5 + sum(told["replayed"] for told in last)
    expected = Counter(earlier)
    for told in last:
        expected.update(told["rejects"])
    assert state["rejects"] == {reason: count for reason, count in expected.items() if count}


def test_the_budget_is_spent_when_all_partitions_together_have_spent_it() -> None:
    tally = make_tally(max_tokens=100)
    told = {"rows": 1, "calls": 1, "replayed": 0, "paid_tokens": 60, "rejects": {}}
    assert not tally.report(0, told, [], ("a", 0))
    assert not tally.report(0, told, [], ("a", 0))  # the same once more
    assert tally.report(1, told, [], ("b", 0))


def test_too_many_rejects_end_the_run_with_their_reasons() -> None:
    tally = make_tally(max_reject_frac=0.2, rejects={"refused": 2})
    told = {"rows": 3, "calls": 3, "replayed": 0, "paid_tokens": 6, "rejects": {"cut_off": 1}}
    with pytest.raises(TooManyRejects, match=r"3 of 10 rows were rejected \(refused 2, cut_off 1\)"):
        tally.report(0, told, [], ("a", 0))


def test_what_was_asked_again_is_counted_once_per_worker() -> None:
    tally = make_tally()
    told = {"rows": 0, "calls": 0, "replayed": 0, "paid_tokens": 0, "rejects": {}}
    for partition, retries in enumerate([("a", 1), ("a", 3), ("b", 2)]):
        tally.report(partition, told, [], retries)
    assert tally.state()["engine_retries"] == 5
