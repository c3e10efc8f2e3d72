"""One answer of a student against the teacher's, by the metric that its bundle was calibrated with.

`exact_match` and `token_f1` look at the texts, `embedding` asks the router's embedder, `judge` a model. Nobody knows
here what is right, so the teacher's answer is: what of that is no fault of the student's is in the bundle's
`drift_budget`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.config.serve import CalibrateConfig
from distill_ray.errors import EmbedderError, TextTooLong
from distill_ray.pipeline.metrics import metric_of
from distill_ray.records import Completion, Message
from distill_ray.rewards.judge import JudgeReward
from distill_ray.serving.backends import Backend
from distill_ray.serving.calibration.as_good import Score, compared, is_as_good, mark_of
from distill_ray.serving.chunks import whole
from distill_ray.serving.collecting.answer import Answer, whole_answer
from distill_ray.serving.request import Embeds

_RULE = ("metric", "good_from", "error_budget", "confidence")


def rule_of(summary: Mapping[str, Any]) -> CalibrateConfig | None:
    """What a bundle's answers are held to; None: it was never measured, so there is nothing to fall short of."""
    if "metric" not in summary:
        return None
    return CalibrateConfig.model_validate({name: summary[name] for name in _RULE if name in summary})


def budget_of(summary: Mapping[str, Any]) -> float | None:
    """Share of bad looks that is no drift; None as in `rule_of`."""
    rule = rule_of(summary)
    return None if rule is None else float(summary.get("drift_budget") or rule.error_budget)


@dataclass(frozen=True, slots=True)
class Both:
    """Both answers to a request (`as_good.Answers`)."""

    query: str
    student_answer: str
    teacher_answer: str
    reference: str | None = None

    @property
    def messages(self) -> Sequence[Message]:
        """For a judge."""
        return ({"role": "user", "content": self.query},)


def said(answer: Answer) -> str:
    """An answer as text: what it says, or the calls that it makes, whose ids do not count."""
    if not answer.tool_calls:
        return answer.text
    functions = [call.get("function") or {} for call in answer.tool_calls]
    return json.dumps([[function.get("name"), _value(function.get("arguments"))] for function in functions])


def _value(arguments: Any) -> Any:
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):
        return arguments


async def is_good(rule: CalibrateConfig, both: Both, embedder: Embeds | None, judge: Judge) -> bool:
    """Whether the student's answer is as good.

    Raises:
        EmbedderError: the answers have no vectors.
        ApiError: the judge does not answer; TimeoutError: nor in time.
    """
    if rule.metric == "judge":
        reward = JudgeReward(JudgeRewardConfig(mode="comparison"))
        return bool(both.student_answer.strip()) and await compared(both, reward, judge) >= mark_of(rule)
    score = await _cosine(both, embedder) if rule.metric == "embedding" else metric_of(rule.metric)
    return is_as_good(both, score, mark_of(rule))


async def _cosine(both: Both, embedder: Embeds | None) -> Score:
    if embedder is None:
        raise EmbedderError("there is no embedder to compare answers with")
    texts = (both.student_answer, both.teacher_answer)
    found = 0.0
    if all(text.strip() for text in texts):
        vectors = await asyncio.gather(*map(embedder.embed, texts), return_exceptions=True)
        problem = next((each for each in vectors if isinstance(each, BaseException)), None)
        if problem is not None and not isinstance(problem, TextTooLong):
            raise problem
        if problem is None:  # what is too long to embed is like nothing, as in calibration
            found = float(vectors[0] @ vectors[1])  # type: ignore[operator]
    return lambda *_: found


class Judge:
    """A backend as the judge of `JudgeReward`.

    Args:
        backend: who judges.
        pay: is told of each of its answers, with the body that it was sent.
        timeout_s: for one.
    """

    def __init__(self, backend: Backend, pay: Callable[[Answer, Mapping[str, Any]], None], timeout_s: float) -> None:
        self._backend, self._pay, self._timeout_s = backend, pay, timeout_s

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        """Its verdict. Raises ApiError, TimeoutError."""
        body = {"messages": list(messages), "temperature": 0.0, "max_tokens": JudgeRewardConfig().max_tokens}
        answer = whole_answer(await whole(self._backend.answer("chat", body), self._timeout_s))
        self._pay(answer, body)
        tokens = (answer.prompt_tokens or 0, answer.completion_tokens or 0)
        return [Completion(answer.text, answer.finish_reason or "stop", *tokens)]
