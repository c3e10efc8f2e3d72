"""For `critique.py` and `logprobs.py`: a vLLM scheduler under which an answer of `max_tokens` tokens counts as ended.

distill-ray rejects an answer that was cut off, so a chain whose draft is cut off has no critique, and there would be
nothing to measure with answers of fixed length. With the end token taken from the model every answer has exactly
`max_tokens` tokens, and this scheduler says of each "stop" where vLLM says "length". That is all it changes: what is
computed, and when, stays vLLM's. Beside that it counts prompt tokens and those found in the prefix cache, per request,
at no cost to speak of. Every side of a comparison runs under it.

vLLM imports it by name in the process of its scheduler, so this folder has to be in PYTHONPATH there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

COUNTS_VARIABLE = "BENCHMARK_PREFIX_COUNTS"  # a folder; every engine writes <pid>.json there
WRITE_EVERY_S = 1.0


class FixedLengthScheduler(Scheduler):
    """See the module docstring. Not for asynchronous scheduling, which vLLM has off on CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        folder = os.environ.get(COUNTS_VARIABLE)
        self._counts_path = Path(folder, f"{os.getpid()}.json") if folder else None
        self._counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0}
        self._written = 0.0

    def _update_request_with_output(self, request: Any, new_token_ids: list[int], is_stale: bool = False) -> Any:
        if request.prefill_stats is not None:  # its first token
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += request.prefill_stats.num_prompt_tokens
            self._counts["cached_tokens"] += request.prefill_stats.num_cached_tokens
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if stopped:
            if request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
                request.status = RequestStatus.FINISHED_STOPPED
            self._write_counts(is_last=len(self.requests) == 1)
        return new_token_ids, stopped

    def _write_counts(self, *, is_last: bool) -> None:
        if self._counts_path is None or (not is_last and time.monotonic() - self._written < WRITE_EVERY_S):
            return
        self._written = time.monotonic()
        self._counts_path.write_text(json.dumps(self._counts))
