"""Is one answer as good as another? The rule that calibration measures by and that second looks go on with.

| `metric`      | the student's answer scores                                                    |
|---------------|--------------------------------------------------------------------------------|
| `exact_match` | 1 if it is the same text                                                       |
| `token_f1`    | the overlap of words                                                           |
| `embedding`   | the cosine of both answers                                                     |
| `judge`       | 1 if a judge, asked in both orders, finds it no worse; in between, where it wavers |

From a mark on it is as good. Where the run knows what is right (`evaluate.reference`), both answers are held against
that, and the student's is as good if it scores no less than the teacher's: two wrong answers are equally good. A judge
compares the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from distill_ray.config.serve import CalibrateConfig
from distill_ray.errors import RequestRejected, RowError
from distill_ray.records import Answered, Message
from distill_ray.rewards.judge import JudgeReward

Score = Callable[[str, str], float]


class Answers(Protocol):
    """Both answers to a request."""

    @property
    def messages(self) -> Sequence[Message]: ...  # noqa: D102

    @property
    def student_answer(self) -> str: ...  # noqa: D102

    @property
    def teacher_answer(self) -> str: ...  # noqa: D102

    @property
    def reference(self) -> str | None: ...  # noqa: D102


def mark_of(config: CalibrateConfig) -> float:
    """The score from which an answer is as good."""
    return 1.0 if config.metric == "exact_match" else config.good_from


def is_as_good(each: Answers, score: Score, mark: float) -> bool:
    """Whether the student's answer scores the mark, or no less than the teacher's where what is right is known."""
    if not each.student_answer.strip():
        return False
    if each.reference is None:
        return score(each.student_answer, each.teacher_answer) >= mark
    return score(each.student_answer, each.reference) >= min(mark, score(each.teacher_answer, each.reference))


async def compared(each: Answers, reward: JudgeReward, judge: Any) -> float:
    """1 where the student's answer wins or ties over both orders, less where it loses; 0 without a verdict."""
    if each.student_answer.split() == each.teacher_answer.split():
        return 1.0
    messages = tuple(each.messages)
    try:
        student, _ = await reward.compare(
            Answered(messages, each.student_answer), Answered(messages, each.teacher_answer), judge
        )
    except (RowError, RequestRejected):
        return 0.0  # nothing shows that it is good
    return min(1.0, 2.0 * student)
