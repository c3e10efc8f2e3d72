"""The seam between recipes and models: one abstract class of four methods.

An engine turns a conversation into n samples. It retries by itself what may pass later, and translates its library's
errors once, into those of `distill_ray.errors`. It knows nothing of rows, recipes or the ledger.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence

from distill_ray.config.engine import SamplingConfig
from distill_ray.records import Completion, Message


class Engine(ABC):
    """A model that answers conversations.

    Life: construct (cheap, no I/O) -> `start` -> any number of concurrent `generate` -> `close`.
    """

    identity: str
    """What answers: engine type, model and revision, everything that changes the answer for the same prompt. Part of
    the ledger's key, so no URL, key or limit belongs here."""

    num_retries: int = 0
    """Requests made again after a failure that passed: what was paid, or computed, more than once."""

    @abstractmethod
    async def start(self) -> None:
        """Load the model or check the connection.

        Raises:
            ConfigError: the model or its arguments are wrong.
            EngineUnavailable: it cannot be reached or does not let us in.
        """

    @abstractmethod
    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        """Answer once: samples first_sample .. sampling.n - 1, in that order, each with its `sample_index`.

        Sample i is drawn with `request_seed(...) + i`, so asking for more samples later continues the same series.

        Raises:
            RequestRejected: this request can never be answered (too long, control tokens, bad request).
            TransientEngineError: still failing after this engine's own retries.
            EngineUnavailable: no request can be answered.
        """

    async def score(self, messages: Sequence[Message], answer: str, top_logprobs: int) -> Completion:
        """The top k log-probabilities at each token of an answer that is already there, as if it had been said.

        For engines with the capability `score`.

        Raises:
            RequestRejected, TransientEngineError, EngineUnavailable: as `generate`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot score")

    @abstractmethod
    async def close(self) -> None:
        """Free everything; calling it twice is harmless."""

    def prompt_key(self, messages: Sequence[Message]) -> bytes:
        """Hash of the prompt as this engine renders it: equal keys are the same prompt. 16 bytes.

        Engines that render the chat template themselves hash the token ids, so that a changed template is noticed.
        """
        return hash_messages(messages)


def hash_messages(messages: Sequence[Message]) -> bytes:
    """16 bytes that stand for a conversation."""
    return hashlib.blake2b(json.dumps(list(messages), ensure_ascii=False).encode(), digest_size=16).digest()


def request_seed(seed: int, prompt_key: bytes) -> int:
    """A request's own seed, below 2^31: with one seed for all of them, all prompts would draw the same numbers.

    Args:
        seed: `sampling.seed`.
        prompt_key: of the prompt. Sample i is drawn with what is returned, plus i.
    """
    mixed = hashlib.blake2b(prompt_key, digest_size=8, salt=(seed % 2**64).to_bytes(8, "big")).digest()
    return int.from_bytes(mixed, "big") % 2**31


def hash_ids(ids: Sequence[int]) -> bytes:
    """16 bytes that stand for token ids: the `prompt_key` of engines that tokenise themselves."""
    return hashlib.blake2b(array("i", ids).tobytes(), digest_size=16).digest()
