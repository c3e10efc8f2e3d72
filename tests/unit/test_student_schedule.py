"""The learning rate, step by step."""

from __future__ import annotations

import pytest

from distill_ray.student.schedule import Schedule, learning_rate


def rates(schedule: Schedule, *, warmup_ratio: float, total_steps: int = 4) -> list[float]:
    return [
        learning_rate(s, total_steps=total_steps, peak=1.0, warmup_ratio=warmup_ratio, schedule=schedule)
        for s in range(total_steps)
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_rate_falls_from_the_peak(schedule: Schedule, expected: list[float]) -> None:
    assert rates(schedule, warmup_ratio=0.0) == pytest.approx(expected)


def test_warm_up_climbs_to_the_peak_and_its_first_step_is_not_zero() -> None:
    assert rates("linear", warmup_ratio=0.5) == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_a_warm_up_as_long_as_the_run_is_no_division_by_zero() -> None:
    assert rates("cosine", warmup_ratio=0.99, total_steps=1) == [1.0]
