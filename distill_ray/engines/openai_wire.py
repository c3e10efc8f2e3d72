"""The bodies of a chat completion: what is asked, and an answer as `Completion`s. Knows nothing of HTTP or errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_ray.config.engine import OpenAIEngineConfig, SamplingConfig, StructuredOutput
from distill_ray.records import Completion, Message

_FINISH_REASONS = {
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
    "stop": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "eos": "stop",
}


def request_body(
    config: OpenAIEngineConfig,
    messages: Sequence[Message],
    sampling: SamplingConfig,
    seed: int,
    num_samples: int,
) -> dict[str, Any]:
    """The request, except for the limit on tokens (servers differ in its name) and `extra_body`."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [dict(m) for m in messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
    }
    if num_samples > 1:
        body["n"] = num_samples
    if sampling.stop:
        body["stop"] = sampling.stop
    if sampling.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    return body | (_structured_fields(sampling.structured) if sampling.structured else {})


def _structured_fields(structured: StructuredOutput) -> dict[str, Any]:
    if structured.json_schema is not None:
        schema = {"name": "answer", "schema": structured.json_schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"structured_outputs": structured.model_dump(include={"regex", "choice"}, exclude_none=True)}


def is_chat_completion(answer: object) -> bool:
    """Whether a parsed body has what `completions` needs."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(isinstance(c, dict) and isinstance(c.get("message"), dict) for c in choices)
    )


def completions(answer: Mapping[str, Any], first_sample: int, num_samples: int, top_logprobs: int) -> list[Completion]:
    """An answer's choices in order of their index, at most `num_samples`.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: the body is not what the protocol says.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)
    usage = answer.get("usage") or {}
    share, remainder = divmod(usage.get("completion_tokens") or 0, len(choices))
    completions = []
    for i, choice in enumerate(choices[:num_samples]):
        message = choice["message"]
        text, finish_reason = _text_and_finish_reason(choice)
        ids = choice.get("token_ids")  # vLLM, with extra_body {return_token_ids: true}
        topk_ids, topk_logprobs = _topk(choice, top_logprobs)
        completions.append(
            Completion(
                text=text,
                finish_reason=finish_reason,
                prompt_tokens=(usage.get("prompt_tokens") or 0) if i == 0 else 0,
                completion_tokens=len(ids) if ids else share + (i < remainder),
                sample_index=first_sample + i,
                reasoning=message.get("reasoning") or message.get("reasoning_content") or None,
                token_ids=ids or None,
                topk_ids=topk_ids,
                topk_logprobs=topk_logprobs,
            )
        )
    return completions


def _text_and_finish_reason(choice: Mapping[str, Any]) -> tuple[str, str]:
    message = choice["message"]
    content = message.get("content") or ""
    if isinstance(content, list):  # parts; those that are not text (thinking, tool use) are no answer
        content = "".join(part.get("text", "") for part in content if part.get("type") == "text")
    if not content and message.get("refusal"):
        return "", "content_filter"
    if not isinstance(content, str):
        raise TypeError(f"message.content is {type(content).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in content):
        return "", "abort"  # half of a surrogate pair: no text that a file can hold
    # A reason that we do not know (error, tool_calls, ...) is no promise that the answer is whole.
    return content, _FINISH_REASONS.get(choice.get("finish_reason") or "stop", "abort")


def _topk(choice: Mapping[str, Any], k: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The top k per position, best first: ids [T, K] int32, logprobs [T, K] float32 filled up with -inf.

    Ids only where the server names tokens by id: vLLM with extra_body {return_tokens_as_token_ids: true}.
    """
    positions = (choice.get("logprobs") or {}).get("content") or []
    if not k or not positions:
        return None, None
    ids = np.zeros((len(positions), k), dtype=np.int32)
    logprobs = np.full((len(positions), k), -np.inf, dtype=np.float32)
    has_ids = True
    for t, position in enumerate(positions):
        # vLLM puts the sampled token first, whatever its rank
        best = sorted(position.get("top_logprobs") or [], key=lambda top: -top["logprob"])[:k]
        for rank, top in enumerate(best):
            logprobs[t, rank] = top["logprob"]
            named = re.fullmatch(r"token_id:(\d+)", top["token"])
            has_ids = has_ids and named is not None
            ids[t, rank] = int(named.group(1)) if named else 0
    return (ids if has_ids else None), logprobs
