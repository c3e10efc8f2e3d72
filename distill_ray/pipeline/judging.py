"""Who wins in the eyes of a judge: the student's answer or the teacher's, for held-out rows without a right answer.

Each pair is shown twice, the other way round the second time, because judges prefer what they see first (Zheng et al.
2023, arXiv 2306.05685, section 3). Calls are kept in `calls/`: a second evaluation asks only about what has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distill_ray.config import RunConfig, SamplingConfig
from distill_ray.errors import RequestRejected, RowError
from distill_ray.pipeline.asking import through_ledger
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.ledger import LedgeredEngine
from distill_ray.pipeline.scoring import TIE
from distill_ray.pipeline.spending import spending
from distill_ray.records import Answered, Completion
from distill_ray.rewards.judge import JudgeReward


class Verdict(NamedTuple):
    """Over both orders; see `judge_wins`."""

    win: float | None
    shown_first: float | None


def comparison_of(config: RunConfig) -> tuple[JudgeReward, SamplingConfig]:
    """What the judge is asked, and how it answers. Raises ConfigError: its prompt does not show both answers."""
    how = config.evaluate.comparison
    return JudgeReward(how, key="evaluate.judge_prompt"), SamplingConfig(temperature=0.0, max_tokens=how.max_tokens)


def judge_wins(config: RunConfig, folder: RunFolder, rows: Sequence[dict[str, Any]]) -> None:
    """Set `row["win"]` to the student's share of the win over the teacher, 0 to 1; None where there is no verdict.

    Rows that only the data answered are nobody's win and get none. Answers of the same words are a tie that nobody is
    asked about. Where somebody was, `row["shown_first"]` is the share that went to what was shown first: 0.5 of a judge
    who does not mind the order.

    Raises:
        ConfigError: there is nobody who could judge.
        EngineUnavailable: the judge does not start, or dies.

    What it took is `spent.judge` in the manifest.
    """
    _, engine = config.evaluation_judge
    asked = [row for row in rows if not row.get("is_datas_own")]
    reward, sampling = comparison_of(config)

    async def one(row: dict[str, Any], asker: LedgeredEngine) -> Verdict:
        student, teacher = row["student_after"] or "", row["teacher_answer"]
        if student.split() == teacher.split():
            return Verdict(TIE, None)
        messages = tuple(row["messages"])
        try:
            found = await reward.verdicts(Answered(messages, student), Answered(messages, teacher), asker)
        except (RowError, RequestRejected):
            return Verdict(None, None)
        return Verdict(found.share, found.shown_first)

    with spending(folder, "judge") as spent:
        spent |= {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}

        def count(replayed: bool, completions: Sequence[Completion]) -> None:
            if not replayed:
                spent["calls"] += len(completions)
                spent["prompt_tokens"] += sum(each.prompt_tokens for each in completions)
                spent["completion_tokens"] += sum(each.completion_tokens for each in completions)

        verdicts = through_ledger(engine, sampling, folder, "evaluate", "judge", asked, one, count)
        if not spent["calls"]:
            spent["replica_seconds"] = 0.0  # nobody was started
    for row, verdict in zip(asked, verdicts, strict=True):
        row |= verdict._asdict()
