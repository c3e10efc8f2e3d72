"""What a run has cost, and after how many requests it has paid for itself: checked against sums done by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.costs import Costs, costs
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.spending import spending
from tests.unit.test_report import config, run, written  # noqa: F401  (a fixture)

PER_TOKEN = {"price_per_million_prompt_tokens": 2.0, "price_per_million_completion_tokens": 10.0}


def of(folder: RunFolder, teacher: dict[str, Any], student: dict[str, Any], /, **keys: Any) -> Costs:
    return costs(Facts(folder, config(plan={"teacher": teacher, "student": student}, **keys)))


def test_an_api_is_paid_by_the_token(run: RunFolder) -> None:  # noqa: F811
    found = of(run, PER_TOKEN, {"price_per_hour": 3.6})
    assert found.teacher == pytest.approx(48_000 * 2e-6 + 1_234 * 10e-6)
    assert found.training == pytest.approx(10.0 * 3.6 / 3600)
    assert found.evaluation is None  # what evaluation took is not in the files
    # 120 rows, of which none was unreadable: the rejects are of answers, which were paid.
    assert found.teacher_per_request == pytest.approx((48_000 * 2e-6 + 1_234 * 10e-6) / 120)
    assert found.student_per_request == pytest.approx(0.1 * 3.6 / 3600)
    assert found.total is None
    assert found.break_even is None


def test_engines_of_ones_own_are_paid_by_the_hour(run: RunFolder) -> None:  # noqa: F811
    run.update_manifest({"spent": {"evaluate": {"seconds": 36.0, "replica_seconds": 36.0}}})
    found = of(run, {"price_per_hour": 10.0}, {"price_per_hour": 1.0})
    assert found.teacher == pytest.approx(122 / 3600 * 10)
    # 117 answers for 120 requests, 0.9 engine-seconds of work each: what was replayed would have taken as long.
    assert found.teacher_per_request == pytest.approx(117 / 120 * 0.9 / 3600 * 10)
    saved = 117 / 120 * 0.9 / 3600 * 10 - 0.1 / 3600
    total = 122 / 3600 * 10 + 10 / 3600 + 36 / 3600
    assert found.total == pytest.approx(total)
    assert found.break_even == -(-total // saved)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_judge_has_its_own_price_and_is_in_no_request(is_own: bool, run: RunFolder) -> None:  # noqa: F811
    run.update_manifest({"judge_prompt_tokens": 8_000, "judge_completion_tokens": 234})
    reward = {"type": "judge", **({"engine": {"type": "fake"}} if is_own else {})}
    recipe = {"type": "self_critique", "query": "{{ q }}", "reward": reward}
    plan = {
        "teacher": PER_TOKEN,
        "judge": {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 5.0},
    }
    found = costs(Facts(run, config(plan=plan, recipe=recipe)))
    without = 40_000 * 2e-6 + 1_000 * 10e-6
    assert found.teacher_per_request == pytest.approx(without / 120)
    assert found.teacher == pytest.approx(without if is_own else 48_000 * 2e-6 + 1_234 * 10e-6)
    assert found.judge == pytest.approx(8_000 * 1e-6 + 234 * 5e-6 if is_own else 0.0)
    hourly = costs(Facts(run, config(plan={"judge": {"price_per_hour": 2.0}}, recipe=recipe)))
    assert hourly.judge == pytest.approx(61.0 / 3600 * 2.0 if is_own else 0.0)


def test_a_replica_of_several_gpus_is_so_many_times_as_much(run: RunFolder) -> None:  # noqa: F811
    teacher = {"type": "vllm", "model": "m", "gpus": 4}
    one, four = (of(run, {"price_per_hour": 1.0}, {}, **more) for more in ({}, {"teacher": teacher}))
    assert four.teacher == pytest.approx(4 * (one.teacher or 0))


def test_several_samples_of_a_row_are_several_requests(run: RunFolder) -> None:  # noqa: F811
    teacher = {"type": "fake", "sampling": {"n": 2}}
    one, two = (of(run, PER_TOKEN, {}, **more).teacher_per_request for more in ({}, {"teacher": teacher}))
    assert two == pytest.approx((one or 0) / 2)


def test_nothing_is_guessed(run: RunFolder) -> None:  # noqa: F811
    found = of(run, {"gpu": "H100"}, {})
    assert (found.teacher, found.training, found.total, found.break_even) == (None, None, None, None)


def test_nobody_is_paid_where_nobody_was_asked(run: RunFolder) -> None:  # noqa: F811
    recipe = {"type": "step_by_step", "query": "{{ q }}", "label_column": "l", "rationale_column": "r"}
    found = of(run, PER_TOKEN, {}, recipe=recipe, teacher={"type": "none"})
    assert found.teacher == 0.0
    assert found.teacher_per_request is None  # there is no teacher to save


@given(st.floats(0.01, 1e6), st.floats(1e-6, 1e3), st.floats(0, 1e3))
def test_it_has_paid_for_itself_after_that_many_requests_and_not_one_earlier(
    total: float, teacher: float, student: float
) -> None:
    found = Costs(total, 0.0, 0.0, 0.0, teacher, student)
    if teacher <= student:
        assert found.break_even is None
        return
    assert found.break_even is not None
    saved = teacher - student
    assert found.break_even * saved >= total * (1 - 1e-9)
    assert (found.break_even - 1) * saved <= total * (1 + 1e-9)


def test_who_judges_the_evaluation_is_paid_by_the_token_or_by_the_hour(run: RunFolder) -> None:  # noqa: F811
    judged = {"seconds": 90.0, "replica_seconds": 72.0, "calls": 40, "prompt_tokens": 6_000, "completion_tokens": 200}
    run.update_manifest({"spent": {"evaluate": {"seconds": 36.0, "replica_seconds": 36.0}, "judge": judged}})
    student, students = {"price_per_hour": 1.0}, 36 / 3600
    by_hour = of(run, {"price_per_hour": 10.0}, student)
    assert by_hour.evaluation == pytest.approx(students + 72 / 3600 * 10)
    assert of(run, PER_TOKEN, student).evaluation == pytest.approx(students + 6_000 * 2e-6 + 200 * 10e-6)
    own = {"judge": {"type": "fake"}}
    assert of(run, PER_TOKEN, student, evaluate=own).evaluation is None  # plan.judge has no price
    plan = {"teacher": PER_TOKEN, "student": student, "judge": {"price_per_hour": 2.0}}
    found = costs(Facts(run, config(plan=plan, evaluate=own)))
    assert found.evaluation == pytest.approx(students + 72 / 3600 * 2)
    assert "| prompt and completion tokens paid, judge | 6,000 and 200 |" in written(run, plan=plan)


def test_the_report_says_it_or_why_not(run: RunFolder) -> None:  # noqa: F811
    run.update_manifest({"spent": {"evaluate": {"seconds": 36.0, "replica_seconds": 36.0}}})
    prices = {"teacher": {"price_per_hour": 10.0}, "student": {"price_per_hour": 1.0}}
    assert "The run has paid for itself after 146 requests to the student." in written(run, plan=prices)
    cheap = {"teacher": {"price_per_hour": 0.01}, "student": {"price_per_hour": 10.0}}
    assert "the student saves nothing" in written(run, plan=cheap)
    assert "cannot be said: a price or a figure is missing" in written(run, plan={"teacher": PER_TOKEN})


def test_what_was_stopped_and_what_failed_counts_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with spending(folder, "train", 2):
        pass
    with contextlib.suppress(KeyboardInterrupt), spending(folder, "generate", 0) as spent:
        spent.update(replica_seconds=3.5, calls=7)
        raise KeyboardInterrupt
    with spending(folder, "generate", 0) as spent:
        spent.update(replica_seconds=1.5, calls=2)
    found = folder.manifest()["spent"]
    assert (found["generate"]["replica_seconds"], found["generate"]["calls"]) == (5.0, 9)
    assert found["train"]["replica_seconds"] == pytest.approx(2 * found["train"]["seconds"], abs=0.02)


def test_what_went_wrong_is_said_even_where_nothing_can_be_noted(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ZeroDivisionError), spending(RunFolder(tmp_path / "run"), "train"):
        raise ZeroDivisionError
