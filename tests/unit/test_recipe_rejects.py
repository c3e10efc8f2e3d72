"""What teachers, judges and rewards say that cannot be used: counted rejects, each with its reason.

The actor of the generation stage with the fake engine, without Ray. A judge without an engine of its own is the
teacher.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import parse_config
from distill_ray.pipeline.folder import RunFolder
from tests.unit.test_worker import run_worker

# A teacher of three turns that rates as well: it knows by the last question which of them it is at.
TURNS = (
    "{% if 'double brackets' in query %}RATING{% elif 'out everything' in query %}CRITIQUE"
    "{% elif 'without the faults' in query %}REVISION{% else %}DRAFT{% endif %}"
)
JUDGE = {"type": "judge"}
NAN = {"type": "regex", "pattern": "(a|aa)+$"}


def said(draft: str = "draft", critique: str = "c", revision: str = "revision", rating: str = "[[5]]") -> str:
    words = {"DRAFT": draft, "CRITIQUE": critique, "REVISION": revision, "RATING": rating}
    answer = TURNS
    for name, text in words.items():
        answer = answer.replace(name, text)
    return answer


def critiqued(answer: str, reward: dict[str, Any], **recipe: Any) -> dict[str, Any]:
    return {"recipe": {"type": "self_critique", "reward": reward, **recipe}, "answer": answer}


def explained(answer: str, **recipe: Any) -> dict[str, Any]:
    return {
        "recipe": {"type": "step_by_step", "query": "{{ text }}", "label_column": "label", **recipe},
        "answer": answer,
    }


@pytest.mark.parametrize(
    ("case", "reason", "detail"),
    [
        (critiqued(said(rating="Very good."), JUDGE), "no_reward", "the judge gives no rating in [[ ]]: 'Very good.'"),
        (critiqued(said(rating="[[11]]"), JUDGE), "no_reward", "the judge's rating 11 is not in 1..10"),
        (critiqued(said(rating=""), JUDGE), "no_reward", "the judge gives no rating"),
        (
            critiqued(said(), {**JUDGE, "mode": "comparison"}),
            "no_reward",
            "the judge gives no verdict [[A]], [[B]] or [[C]]",
        ),
        (critiqued(said(), JUDGE), "not_accepted", "reward 5 before, 5 after (improve)"),
        (critiqued(said(revision="a" * 60 + "!"), NAN), "no_reward", "the reward after the revision is nan"),
        (critiqued(said(critique=" "), {"type": "length"}), "empty_answer", "no text"),
        (critiqued(said(revision=" "), {"type": "length"}), "empty_answer", "no text"),
        (critiqued(said(draft="I cannot help with that."), {"type": "length"}), "refused", "I cannot help"),
        (explained("Because.", label_source="teacher"), "unparsable_answer", "no marker ('The answer is')"),
        (explained("The answer is 3."), "unparsable_answer", "no rationale before the label"),
        (
            explained("Because. The answer is x.", label_source="teacher", label_pattern=r"\d+"),
            "unparsable_answer",
            "nothing that recipe.label_pattern finds behind 'The answer is'",
        ),
        (explained("Because. The answer is 3.", label_column="empty"), "empty_answer", "column `empty`"),
        (explained("Because. The answer is 3.", rationale_column="empty"), "empty_answer", "column `empty`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_a_counted_reject(
    case: dict[str, Any], reason: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_ray.recipes.patterns.LIMIT_S", 0.1)
    rows = [{"text": f"question {i}", "label": "3", "empty": " "} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(
        {
            "recipe": case["recipe"],
            "data": {"source": str(tmp_path / "rows.jsonl"), "holdout": 0, "validation_holdout": 0},
            "teacher": {"type": "fake", "answer": case["answer"]},
        }
    )
    folder = RunFolder(tmp_path / "run")
    state = run_worker(config, folder).state()
    assert state["rejects"] == {reason: 3}
    rejects = [reject for table in folder.read_tables("rejects") for reject in table.to_pylist()]
    assert all(detail in reject["detail"] for reject in rejects), rejects[0]["detail"]
    assert [table.num_rows for table in folder.read_tables("examples")] == [0] * len(folder.list("examples"))


def test_a_rationale_without_a_marker_is_learnt_where_the_label_is_the_datas_own(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "q", "label": "3"}\n')
    case = explained("Only thoughts.")
    config = parse_config(
        {
            "recipe": case["recipe"],
            "data": {"source": str(tmp_path / "rows.jsonl")},
            "teacher": {"type": "fake", "answer": case["answer"]},
        }
    )
    folder = RunFolder(tmp_path / "run")
    assert run_worker(config, folder).state()["rejects"] == {}
    found = [e for table in folder.read_tables("examples") for e in table.to_pylist()]
    assert {(e["task"], e["completion"], e["teacher_answer"]) for e in found} == {
        ("label", "3", None),
        ("rationale", "Only thoughts.", None),
    }
