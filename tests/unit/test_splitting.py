"""What is learnt and what is held out: whole groups, and for good."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.errors import ConfigError, DataError
from distill_ray.flywheel.splitting import Splits, evaluation_texts, split_pairs

WORDS = ("apple", "river", "stone", "cloud", "engine", "violin", "desert", "window", "forest", "candle", "market")


def text(number: int) -> str:
    chosen = random.Random(number)
    return " ".join(chosen.choices(WORDS, k=8)) + f" {number}"


def records(numbers: range | list[int], prefix: str = "p") -> list[dict[str, Any]]:
    return [{"pair_id": f"{prefix}{number}", "text": text(number)} for number in numbers]


def split(new: list[dict[str, Any]], **given: Any) -> Splits:
    parts: dict[str, Any] = {"earlier": [], "replayed": [], "learnt": [], "evaluation": [], **given}
    return split_pairs(new, **parts, holdout=0.25, validation=0.1, seed=0)


def splits_of(found: Splits) -> dict[str, str]:
    return {record["pair_id"]: record["split"] for record in found.records}


def test_the_shares_come_out_and_every_pair_is_somewhere() -> None:
    found = split(records(range(800)))
    counts = Counter(splits_of(found).values())
    assert sum(counts.values()) == 800
    assert counts["held_out"] == pytest.approx(200, abs=45)
    assert counts["validation"] == pytest.approx(60, abs=30)


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_a_pair_goes_the_same_way_whatever_else_is_there_and_in_whatever_order(shuffled: random.Random) -> None:
    all_records = records(range(60))
    expected = splits_of(split(all_records))
    some = shuffled.sample(all_records, 40)
    found = splits_of(split(some))
    assert all(found[record["pair_id"]] == expected[record["pair_id"]] for record in some)


def test_near_duplicates_never_sit_on_both_sides() -> None:
    new = records(range(100))
    copies = [{"pair_id": f"q{n}", "text": text(n).upper() + "!"} for n in range(100)]
    found = splits_of(split(new + copies))
    assert all(found[f"p{n}"] == found[f"q{n}"] for n in range(100))


def test_what_was_held_out_stays_so_and_what_is_near_it_too() -> None:
    earlier = records(range(50), "old")
    found = split(records(range(50)), earlier=earlier)
    assert all(name == "held_out" for pair_id, name in splits_of(found).items() if pair_id[0] == "p")
    assert all(name == "earlier" for pair_id, name in splits_of(found).items() if pair_id[0] == "o")


def test_what_is_near_something_learnt_cannot_measure_and_is_learnt() -> None:
    found = split(records(range(30)), learnt=[text(n) for n in range(30)])
    assert set(splits_of(found).values()) == {"train"}
    found = split(records(range(30)), replayed=records(range(30), "r"))
    assert Counter(splits_of(found).values()) == {"train": 30, "replay": 30}


def test_what_is_near_both_something_held_out_and_something_learnt_is_not_used() -> None:
    new = [*records(range(10)), {"pair_id": "q", "text": text(40)}]
    found = split(new, earlier=records(range(10), "old"), learnt=[text(n).upper() for n in range(6)])
    assert found.near_both == [f"p{n}" for n in range(6)]
    assert all(splits_of(found)[f"p{n}"] == "held_out" for n in range(6, 10))
    assert Counter(splits_of(found).values())["earlier"] == 10


def test_the_users_evaluation_set_stays_unlearnt() -> None:
    found = split(
        records(range(20)),
        replayed=records([3, 25], "r"),
        evaluation=[text(3).upper(), text(7) + "."],
    )
    assert found.near_evaluation == ["p3", "p7"]
    assert not {"p3", "p7", "r3"} & splits_of(found).keys()
    assert len(found.records) == 18 + 1


def test_evaluation_files_are_read_by_their_column(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"question": "who?"}) + "\n")
    (tmp_path / "more.csv").write_text("question,answer\nwhere?,here\n")
    files = [str(tmp_path / "mine.jsonl"), str(tmp_path / "more.csv")]
    assert evaluation_texts(files, "question") == ["who?", "where?"]
    assert evaluation_texts([], "question") == []


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        (
            "a.jsonl",
            b'{"question": "who?"}\n',
            ConfigError,
            r":1: no column 'text' \(there are: question\);",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": 3}\n',
            ConfigError,
            r":2: the column 'text' has no text but a number",
        ),
        ("a.jsonl", b"not json\n", DataError, ":1: line 1 is not JSON: .*; mend it, or leave it out"),
        ("a.jsonl", b"\n", DataError, ": no rows in this file; write some, or take it out of the list"),
        ("a.csv", b"text\n", DataError, ": no rows in this file; write some, or take it out of the list"),
        ("a.parquet", b"PAR1 torn", DataError, r": cannot be read as parquet \(.*\); write it again"),
    ],
)
def test_an_evaluation_file_that_is_no_good_is_named_whole_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, kind: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=rf"^flywheel\.evaluation: {tmp_path}/{name}{message}") as caught:
        evaluation_texts([str(tmp_path / name)], "text")
    assert "data." not in str(caught.value)


def test_an_evaluation_file_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"flywheel\.evaluation.*nowhere"):
        evaluation_texts(["/nowhere.jsonl"], "text")
