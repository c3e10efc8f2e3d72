"""Win rates by a judge: both orders, ties that nobody is asked about, no verdict."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import ConfigError, RequestRejected
from distill_ray.pipeline import judging
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.judging import judge_wins
from distill_ray.pipeline.scoring import score_predictions
from distill_ray.records import Completion, Message, RejectReason
from tests.unit.test_report import config as report_config
from tests.unit.test_report import predictions


class Judge:
    """Says what `verdict` makes of the two answers that it sees, in their order."""

    def __init__(self, verdict: Callable[[str, str], str]) -> None:
        self.verdict = verdict
        self.asked: list[tuple[str, str]] = []

    async def generate(self, messages: Sequence[Message]) -> list[Completion]:
        text = messages[0]["content"]
        a = text.partition("Answer A:\n")[2].partition("\n")[0]
        b = text.partition("Answer B:\n")[2].partition("\n")[0]
        self.asked.append((a, b))
        return [Completion(text=self.verdict(a, b), finish_reason="stop", prompt_tokens=1, completion_tokens=1)]


def wins(
    monkeypatch: pytest.MonkeyPatch, judge: Judge, rows: list[dict[str, Any]], config: RunConfig | None = None
) -> list[float | None]:
    def here(
        engine: Any, sampling: Any, folder: Any, ledger: str, role: str, items: Any, work: Any, on_call: Any
    ) -> list[Any]:
        async def all_of_them() -> list[Any]:
            asked: list[Awaitable[Any]] = [work(item, judge) for item in items]
            return await asyncio.gather(*asked)

        return asyncio.run(all_of_them())

    monkeypatch.setattr(judging, "through_ledger", here)
    with tempfile.TemporaryDirectory() as folder:
        judge_wins(config or report_config(), RunFolder(folder), rows)
    return [row.get("win") for row in rows]


def row(student: str | None, teacher: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "q"}]
    return {"messages": messages, "student_after": student, "teacher_answer": teacher, **more}


def test_the_better_answer_wins_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(lambda a, b: "[[A]]" if a == "good" else "[[B]]")
    assert wins(monkeypatch, judge, [row("good", "bad"), row("bad", "good")]) == [1.0, 0.0]
    assert sorted(judge.asked) == [("bad", "good"), ("bad", "good"), ("good", "bad"), ("good", "bad")]


def test_a_judge_that_always_takes_the_first_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("x", "y")]
    assert wins(monkeypatch, Judge(lambda *_: "[[A]]"), rows) == [0.5]
    assert rows[0]["shown_first"] == 1.0


def test_a_tie_in_one_order_is_half_a_win(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(lambda a, b: "[[A]]" if a == "good" else "[[C]]")
    assert wins(monkeypatch, judge, [row("good", "bad")]) == [0.75]


def test_the_same_words_are_a_tie_that_nobody_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(lambda *_: "[[A]]")
    assert wins(monkeypatch, judge, [row("x  y", "x y\n")]) == [0.5]
    assert judge.asked == []


def test_no_verdict_is_none_and_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(*_: str) -> str:
        raise RequestRejected(RejectReason.PROMPT_TOO_LONG, "too long")

    assert wins(monkeypatch, Judge(lambda *_: "hm"), [row("x", "y")]) == [None]
    assert wins(monkeypatch, Judge(too_long), [row("x", "y")]) == [None]


def test_no_answer_is_judged_as_one_and_the_datas_own_label_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(lambda a, b: "[[A]]" if a else "[[B]]")
    assert wins(monkeypatch, judge, [row(None, "y"), row("x", "y", is_datas_own=True)]) == [0.0, None]


def test_a_prompt_of_ones_own_has_to_show_both_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = report_config(evaluate={"judge_prompt": "Which? {{ a }}"})
    with pytest.raises(ConfigError, match=r"evaluate.judge_prompt: a comparison has to show b \(\{\{ b \}\}\)"):
        wins(monkeypatch, Judge(lambda *_: ""), [row("x", "y")], config)


def test_somebody_has_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"type": "step_by_step", "query": "{{ q }}", "label_column": "l", "rationale_column": "r"}
    config = report_config(recipe=raw, teacher={"type": "none"})
    with pytest.raises(ConfigError, match=r"teacher: none .* cannot judge; name an engine in evaluate.judge"):
        wins(monkeypatch, Judge(lambda *_: ""), [row("x", "y")], config)
    two = {"type": "mixture", "members": [{"engine": {"type": "fake"}, "weight": 1}, {"engine": {"type": "fake"}}]}
    with pytest.raises(ConfigError, match=r"evaluate.judge: missing, and the teacher, a mixture, cannot stand in"):
        _ = parse_config(
            {"recipe": {"context": {"text": "x"}}, "data": {"source": "q.jsonl"}, "teacher": two}
        ).evaluation_judge


def test_the_win_rate_has_an_interval_and_its_verdicts_are_counted() -> None:
    shares = [1.0] * 8 + [0.5] * 6 + [0.25] * 4 + [None] * 2
    first = [0.5] * 8 + [0.5, None, 1.0, 1.0, 1.0, 0.0] + [0.75] * 4 + [None] * 2
    verdicts = [{"win": win, "shown_first": shown_first} for win, shown_first in zip(shares, first, strict=True)]
    rows = [each | verdict for each, verdict in zip(predictions(), verdicts, strict=True)]
    metrics, records = score_predictions(report_config(evaluate={"metrics": ["win_rate"]}), rows)
    counts = {"won": 8, "tied": 2, "turned": 4, "lost": 4, "without_verdict": 2}
    shown_first = pytest.approx((8 * 0.5 + 0.5 + 3 * 1.0 + 4 * 0.75) / 17)
    assert metrics["wins"] == {**counts, "shown_first": shown_first, "judge": "the teacher itself"}
    after = metrics["student_after"]
    assert after["win_rate"] == pytest.approx(12 / 18)
    assert 0 < after["win_rate_low"] < 12 / 18 < after["win_rate_high"] < 1
    assert "win_rate" not in metrics["student_before"]
    assert [record["win"] for record in records] == shares
