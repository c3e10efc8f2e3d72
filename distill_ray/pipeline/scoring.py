"""From answers to `eval/metrics.json` and `eval/predictions.parquet`. A pure function: no engine, no file.

What an answer is compared with: the row's `reference` where it has one, else the teacher's answer. So the
teacher has an `exact_match` only where rows have references; `agreement` always means "same as the teacher".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distill_ray.config import RunConfig
from distill_ray.errors import DistillError
from distill_ray.pipeline.metrics import confusion, exact_match, interval, metric_of, token_f1

STUDENTS = ("before", "after")
COMPUTED_ELSEWHERE = ("agreement", "reward", "win_rate", "loss")
REWARDED = ("draft", "teacher", "student_before", "student_after")
TIE = 0.5  # of the win

PREDICTION_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("query", pa.string()),
        ("reference", pa.string()),
        ("teacher_answer", pa.string()),
        ("student_before", pa.string()),
        ("student_after", pa.string()),
        ("match", pa.float64()),  # of student_after with the reference, else with the teacher's answer
        ("match_before", pa.float64()),
        ("match_teacher", pa.float64()),  # null without a reference
        ("agreement", pa.float64()),  # null where nobody but the data answered
        ("token_f1", pa.float64()),
        ("reward_draft", pa.float64()),
        ("reward_teacher", pa.float64()),
        ("reward_student_before", pa.float64()),
        ("reward_student_after", pa.float64()),
        ("loss_before", pa.float64()),
        ("loss_after", pa.float64()),
        ("win", pa.float64()),  # of the student over the teacher, by a judge in both orders; null without a verdict
        ("shown_first", pa.float64()),  # share of what the judge saw first, over both orders; null if not asked
        ("prompt_tokens_before", pa.int64()),
        ("prompt_tokens_after", pa.int64()),
        ("completion_tokens", pa.int64()),  # of the answer to learn
    ]
)


def score_predictions(
    config: RunConfig, rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the answers of teacher and student.

    Args:
        config: `evaluate` says which metrics, how many resamples, the seed.
        rows: one per test row, with `row_id`, `query`, `reference`, `teacher_answer`, `student_before`,
            `student_after` (text or None), `loss_before`, `loss_after` (nats per token of the teacher's
            answer, or None), `prompt_tokens_before`, `prompt_tokens_after`. Other keys are ignored. A row
            without a teacher's answer is left out and counted; a student without one is wrong. Where `is_datas_own`
            the data's own label stands in for the teacher, who is not measured by it.

    Returns:
        The content of `metrics.json`, and a record of `PREDICTION_SCHEMA` per scored row, in the order given.

    Raises:
        DistillError: no row has an answer of the teacher.
    """
    scored = [row for row in rows if row["teacher_answer"] is not None]
    if not scored:
        raise DistillError(
            f"evaluation: none of the {len(rows)} test rows has an answer of the teacher; see rejects/, "
            "raise data.holdout or give data.test"
        )
    expected = [_expected(row) for row in scored]
    gold_only, datas_own = config.recipe.learns_gold_only, sum(_is_datas_own(row) for row in scored)
    metrics: dict[str, Any] = {
        "teacher": _score_teacher(config, scored),
        **{f"student_{when}": _score_student(config, scored, expected, when) for when in STUDENTS},
        "recipe": config.recipe.type,
        "gold_only": gold_only,
        "num_rows": len(scored),
        "num_rows_without_teacher": len(rows) - len(scored),
        **({"num_rows_of_data_alone": datas_own} if datas_own and not gold_only else {}),
        **{f"prompt_tokens_{when}": _mean([row[f"prompt_tokens_{when}"] for row in scored]) for when in STUDENTS},
    }
    explained = [row for row in scored if row.get("rationale_tokens") is not None]
    if explained:
        answer = _mean([len(row["completion_ids"]) for row in explained])
        rationale = _mean([row["rationale_tokens"] for row in explained])
        metrics["completion_tokens"] = {"answer": answer, "with_rationale": answer + rationale}
    if rewards := _score_rewards(config, scored):
        metrics["reward"] = rewards
    if "win_rate" in config.evaluate.metrics:
        metrics["wins"] = {**_wins(scored), "judge": _judge(config)}
    table = confusion([row["student_after"] or "" for row in scored], expected)
    metrics["confusion"] = table.as_dict() if table is not None else None
    return metrics, [_prediction(row, gold) for row, gold in zip(scored, expected, strict=True)]


def _expected(row: Mapping[str, Any]) -> str:
    return row["reference"] if row["reference"] is not None else row["teacher_answer"]


def _is_datas_own(row: Mapping[str, Any]) -> bool:
    return bool(row.get("is_datas_own"))


def _score_teacher(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Against the references, on the rows that have one; None if none has."""
    judged = [
        (row["teacher_answer"], row["reference"])
        for row in rows
        if row["reference"] is not None and not _is_datas_own(row)
    ]
    return _with_intervals(config, _compared(config, judged)) if judged else None


def _score_rewards(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]] | None:
    """Mean reward with its interval of the draft, the teacher's answer and the students'; None without a reward."""
    found: dict[str, dict[str, float]] = {}
    for who in REWARDED:
        values = [row[f"reward_{who}"] for row in rows if row.get(f"reward_{who}") is not None]
        values = [value for value in values if math.isfinite(value)]  # a reward may have no number for an answer
        if values:
            found[who] = _with_interval(config, "mean", values)
    return found or None


def _judge(config: RunConfig) -> str:
    key, engine = config.evaluation_judge
    return "the teacher itself" if key == "teacher" else f"{engine.model} ({engine.type})"


def _wins(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Verdicts on the student against the teacher, counted; a share of the win is a win, a loss, or neither.

    Neither is a tie, or turned: one verdict in one order and its opposite in the other. `shown_first` is what the
    answer shown first got of all verdicts; null if none was asked for.
    """
    shares = [(row.get("win"), row.get("shown_first")) for row in rows if not _is_datas_own(row)]
    found = [(win, first) for win, first in shares if win is not None]
    by_order = [first for _, first in found if first is not None]
    return {
        "won": sum(win > TIE for win, _ in found),
        "tied": sum(win == TIE and first in (None, TIE) for win, first in found),
        "turned": sum(win == TIE and first not in (None, TIE) for win, first in found),
        "lost": sum(win < TIE for win, _ in found),
        "without_verdict": len(shares) - len(found),
        "shown_first": _mean(by_order) if by_order else None,
    }


def _score_student(
    config: RunConfig, rows: Sequence[Mapping[str, Any]], expected: Sequence[str], when: str
) -> dict[str, float] | None:
    """None if this student was not asked at all."""
    if all(row[f"student_{when}"] is None for row in rows):
        return None
    answers = [row[f"student_{when}"] or "" for row in rows]
    values = _compared(config, list(zip(answers, expected, strict=True)))
    agreement = [
        exact_match(answer, row["teacher_answer"])
        for answer, row in zip(answers, rows, strict=True)
        if not _is_datas_own(row)
    ]
    if agreement:
        values["agreement"] = agreement
    if when == "after":
        values["win_rate"] = [row["win"] for row in rows if row.get("win") is not None]
    values["loss"] = [row[f"loss_{when}"] for row in rows if row[f"loss_{when}"] is not None]
    return _with_intervals(config, values)


def _compared(config: RunConfig, pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """The metrics that hold an answer against a text; the others of `evaluate.metrics` are computed elsewhere."""
    asked_for = [name for name in config.evaluate.metrics if name not in COMPUTED_ELSEWHERE]
    compare = {name: metric_of(name) for name in dict.fromkeys(["exact_match", *asked_for])}
    return {name: [function(*pair) for pair in pairs] for name, function in compare.items()}


def _with_intervals(config: RunConfig, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """NAME, NAME_low, NAME_high of the metrics asked for, and always of `exact_match`: tools rely on it."""
    wanted = {"exact_match", *config.evaluate.metrics}
    figures: dict[str, float] = {}
    for name, per_row in values.items():
        if name in wanted and per_row:
            figures |= _with_interval(config, name, per_row)
    return figures


def _with_interval(config: RunConfig, name: str, per_row: Sequence[float]) -> dict[str, float]:
    low, high = interval(per_row, num_resamples=config.evaluate.bootstrap, seed=config.evaluate.seed)
    return {name: _mean(per_row), f"{name}_low": low, f"{name}_high": high}


def _prediction(row: Mapping[str, Any], expected: str) -> dict[str, Any]:
    before, after = row["student_before"] or "", row["student_after"] or ""
    reference = row["reference"] if not _is_datas_own(row) else None
    computed = {
        "match": exact_match(after, expected),
        "match_before": exact_match(before, expected),
        "match_teacher": exact_match(row["teacher_answer"], reference) if reference is not None else None,
        "agreement": exact_match(after, row["teacher_answer"]) if not _is_datas_own(row) else None,
        "token_f1": token_f1(after, expected),
        "completion_tokens": len(row["completion_ids"]) if "completion_ids" in row else None,
    }
    return {name: computed[name] if name in computed else row.get(name) for name in PREDICTION_SCHEMA.names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
