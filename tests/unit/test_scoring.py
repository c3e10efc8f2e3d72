"""Scoring: exactly the contract of `eval/metrics.json`."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import DistillError
from distill_ray.pipeline.scoring import PREDICTION_SCHEMA, score_predictions


def config(**evaluate: Any) -> RunConfig:
    return parse_config(
        {
            "recipe": {"context": {"text": "x"}},
            "data": {"source": "q.jsonl"},
            "teacher": {"type": "fake"},
            "evaluate": evaluate,
        }
    )


def row(
    number: int,
    reference: str | None,
    teacher: str | None,
    before: str | None,
    after: str | None,
    **more: Any,
) -> dict[str, Any]:
    return {
        "row_id": f"r{number}",
        "query": f"query {number}",
        "reference": reference,
        "teacher_answer": teacher,
        "student_before": before,
        "student_after": after,
        "loss_before": 2.0,
        "loss_after": 0.5,
        "prompt_tokens_before": 100 + number,
        "prompt_tokens_after": 10 + number,
        "messages": "whatever else the row holds",
        **more,
    }


ROWS = [
    row(0, "fr", "fr", "dunno", "fr"),
    row(1, "en", "en", "en", "en", loss_after=1.5),
    row(2, "de", "nl", "", "nl"),
    row(3, "de", "de", None, "fr"),
]


def test_with_references_all_three_are_measured_against_them() -> None:
    metrics, _ = score_predictions(config(), ROWS)
    assert metrics["teacher"]["exact_match"] == 0.75
    assert metrics["student_before"]["exact_match"] == 0.25
    assert metrics["student_after"]["exact_match"] == 0.5
    assert metrics["student_after"]["agreement"] == 0.75
    assert metrics["student_before"]["loss"] == 2.0
    assert metrics["student_after"]["loss"] == 0.75
    assert "agreement" not in metrics["teacher"]
    assert "loss" not in metrics["teacher"]
    assert metrics["num_rows"] == 4
    assert metrics["num_rows_without_teacher"] == 0
    assert (metrics["prompt_tokens_before"], metrics["prompt_tokens_after"]) == (101.5, 11.5)


def test_every_metric_comes_with_its_interval() -> None:
    metrics, _ = score_predictions(config(), ROWS)
    for role in ("teacher", "student_before", "student_after"):
        names = [name for name in metrics[role] if not name.endswith(("_low", "_high"))]
        assert {"exact_match", "token_f1"} <= set(names)
        for name in names:
            assert metrics[role][f"{name}_low"] <= metrics[role][name] <= metrics[role][f"{name}_high"]


def test_without_references_the_teacher_is_the_measure_and_is_not_measured() -> None:
    rows = [{**r, "reference": None} for r in ROWS]
    metrics, predictions = score_predictions(config(), rows)
    assert metrics["teacher"] is None
    assert metrics["student_after"]["exact_match"] == metrics["student_after"]["agreement"] == 0.75
    assert {prediction["match_teacher"] for prediction in predictions} == {None}


def test_where_only_gold_labels_are_learnt_no_teacher_is_measured_or_agreed_with() -> None:
    recipe = {"type": "step_by_step", "label_column": "label", "mode": "standard"}
    gold = parse_config({"recipe": recipe, "data": {"source": "q.jsonl"}})
    own = [row(0, "fr", "fr", "dunno", "fr", is_datas_own=True), row(1, "en", "en", "en", "de", is_datas_own=True)]
    metrics, records = score_predictions(gold, own)
    assert metrics["teacher"] is None
    assert metrics["student_after"]["exact_match"] == 0.5
    assert "agreement" not in metrics["student_after"]
    assert [(r["match"], r["match_teacher"], r["agreement"]) for r in records] == [(1.0, None, None), (0.0, None, None)]


def test_where_only_some_rows_have_a_reference_the_teacher_is_measured_on_those() -> None:
    rows = [ROWS[0], {**ROWS[2], "reference": None}, ROWS[2]]
    metrics, _ = score_predictions(config(), rows)
    assert metrics["teacher"]["exact_match"] == 0.5
    assert metrics["student_after"]["exact_match"] == pytest.approx(2 / 3)


def test_rows_without_a_teachers_answer_are_left_out_and_counted() -> None:
    metrics, predictions = score_predictions(config(), [*ROWS, row(4, "de", None, "de", "de")])
    assert metrics["num_rows"] == len(predictions) == 4
    assert metrics["num_rows_without_teacher"] == 1
    with pytest.raises(DistillError, match="none of the 1 test rows has an answer of the teacher"):
        score_predictions(config(), [row(4, "de", None, "de", "de")])


def test_a_student_that_was_not_asked_is_null() -> None:
    metrics, _ = score_predictions(config(), [{**r, "student_before": None} for r in ROWS])
    assert metrics["student_before"] is None
    assert metrics["student_after"] is not None


def test_only_the_metrics_asked_for_are_given_and_always_exact_match() -> None:
    rows = [{**r, "loss_before": None, "loss_after": None} for r in ROWS]
    metrics, _ = score_predictions(config(metrics=["agreement"]), rows)
    assert set(metrics["student_after"]) == {
        name + end for name in ("exact_match", "agreement") for end in ("", "_low", "_high")
    }
    metrics, _ = score_predictions(config(), rows)
    assert "loss" not in metrics["student_after"]


def test_predictions_say_row_by_row_what_matched_and_fit_their_schema() -> None:
    _, predictions = score_predictions(config(), ROWS)
    table = pa.Table.from_pylist(predictions, schema=PREDICTION_SCHEMA)
    assert table.column_names == list(predictions[0])
    assert table["row_id"].to_pylist() == ["r0", "r1", "r2", "r3"]
    assert table["match"].to_pylist() == [1.0, 1.0, 0.0, 0.0]
    assert table["match_before"].to_pylist() == [0.0, 1.0, 0.0, 0.0]
    assert table["match_teacher"].to_pylist() == [1.0, 1.0, 0.0, 1.0]
    assert table["agreement"].to_pylist() == [1.0, 1.0, 1.0, 0.0]


def test_labels_get_a_confusion_table_and_free_text_none() -> None:
    metrics, _ = score_predictions(config(), ROWS)
    assert metrics["confusion"] == {
        "labels": ["de", "en", "fr"],
        "counts": [[0, 0, 1], [0, 1, 0], [0, 0, 1]],
        "other": [1, 0, 0],
    }
    metrics, _ = score_predictions(config(), ROWS[:3])
    assert metrics["confusion"] is None


def test_equal_seeds_give_equal_figures() -> None:
    assert score_predictions(config(seed=1), ROWS) == score_predictions(config(seed=1), ROWS)


def test_where_the_datas_own_label_stands_in_for_the_teacher_the_teacher_is_not_measured() -> None:
    own = [row(0, "fr", "fr", "dunno", "fr", is_datas_own=True), row(1, None, "en", "en", "de", is_datas_own=True)]
    metrics, predictions = score_predictions(config(), own)
    assert metrics["teacher"] is None
    assert metrics["num_rows_of_data_alone"] == 2
    assert metrics["student_after"]["exact_match"] == 0.5
    assert "agreement" not in metrics["student_after"]
    assert [(p["match"], p["match_teacher"], p["agreement"]) for p in predictions] == [(1, None, None), (0, None, None)]
    mixed, _ = score_predictions(config(), [*ROWS, *own])
    assert mixed["teacher"]["exact_match"] == 0.75
    assert mixed["student_after"]["agreement"] == 0.75
