"""The call ledger: every finished teacher call, kept so that no run pays for it twice.

One ledger per partition. A finished call is buffered, and all that is buffered is written as one small immutable
segment (`calls/00003/<random>.arrow`) every `flush_s`; when the partition is done the segments become one
`calls/00003.parquet`. Segments appear whole or not at all, so kill -9 costs the calls in flight and those of the last
interval, and never damages what was written.

The key is a hash of (engine identity, rendered prompt, sampling parameters, seed, sample index): a rerun finds the
calls whose question is still the same, and asks only the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from distill_ray.config.engine import SamplingConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import EngineError, RunFolderError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.records import Completion, Message, with_arrays

KEY_BYTES = 16

OnCall = Callable[[bool, Sequence[Completion]], None]
"""Told (replayed, completions) of every answer that is given: paid for now, or kept or shared."""

CALL_SCHEMA = pa.schema(
    [
        ("key", pa.binary(KEY_BYTES)),
        ("text", pa.string()),
        ("reasoning", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("sample_index", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("topk_width", pa.int32()),  # K; the two below are [T x K], row by row
        ("topk_ids", pa.list_(pa.int32())),
        ("topk_logprobs", pa.list_(pa.float32())),
    ]
)


def call_key(identity: str, prompt_key: bytes, sampling: SamplingConfig, sample_index: int) -> bytes:
    """The identity of one sample. `n` is left out on purpose: asking for more samples keeps those there are."""
    parameters = sampling.model_dump_json(exclude={"n", "seed"})
    parts = f"{identity}\0{parameters}\0{sampling.seed}\0{sample_index}\0".encode()
    return hashlib.blake2b(parts + prompt_key, digest_size=KEY_BYTES).digest()


class Ledger:
    """Finished calls of one partition. Thread-safe: the event loop puts, a flusher thread writes.

    Args:
        folder: the run folder.
        name: of the partition, or of who else keeps its calls.

    Raises:
        RunFolderError: a merged file is damaged. (A torn segment cannot exist.)
    """

    def __init__(self, folder: RunFolder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._lock = threading.Lock()  # of the buffer
        self._writing = threading.Lock()  # of the files: a segment must not land while others are merged
        self._fresh: list[tuple[bytes, Completion]] = []  # not yet written
        self._tables = list(self._load(self._segments()))
        self._where: dict[bytes, tuple[int, int]] = {}  # key -> (table, row)
        for number, table in enumerate(self._tables):
            for row, key in enumerate(table["key"].to_pylist()):
                self._where[key] = (number, row)
        self._recent: dict[bytes, Completion] = {}  # written or not, of this process

    def _segments(self) -> list[str]:
        return self._folder.list("calls", self._name, suffix=".arrow")

    def _load(self, segments: Sequence[str]) -> Iterator[pa.Table]:
        merged = f"{self._name}.parquet"
        if self._folder.exists("calls", merged):
            yield self._checked(self._folder.read_table("calls", merged), merged)
        for segment in segments:
            data = self._folder.read_bytes("calls", self._name, segment)
            try:
                table = pa.ipc.open_file(io.BytesIO(data)).read_all()
            except (pa.ArrowInvalid, OSError) as error:
                raise self._folder.damaged(error, "calls", self._name, segment) from error
            yield self._checked(table, self._name, segment)

    def _checked(self, table: pa.Table, *parts: str) -> pa.Table:
        if table.schema != CALL_SCHEMA:
            raise RunFolderError(
                f"{self._folder.path('calls', *parts)}: written by another version of distill-ray; "
                "go on with that version, or start a new --run-dir"
            )
        return table

    def __len__(self) -> int:
        return len(self._where.keys() | self._recent.keys())

    def get(self, key: bytes) -> Completion | None:
        """The finished call with this key, or None."""
        if key in self._recent:
            return self._recent[key]
        place = self._where.get(key)
        if place is None:
            return None
        return _completion(self._tables[place[0]].slice(place[1], 1).to_pylist()[0])

    def put(self, key: bytes, completion: Completion) -> None:
        """Keep a finished call; it is on disk after the next `flush`."""
        with self._lock:
            self._recent[key] = completion
            self._fresh.append((key, completion))

    def flush(self) -> None:
        """Write what is buffered as one segment. Whatever is raised, nothing is lost from the buffer.

        Raises:
            RunFolderError: the disk is full or the folder is not writable.
        """
        with self._writing:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            fresh = list(self._fresh)
        if not fresh:
            return
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, CALL_SCHEMA) as writer:
            writer.write_table(_table(fresh))
        self._folder.write_bytes(buffer.getbuffer(), "calls", self._name, f"{secrets.token_hex(8)}.arrow")
        with self._lock:
            del self._fresh[: len(fresh)]

    def merge(self) -> None:
        """Write everything as one Parquet file and drop the segments. Killed in between, the next load sees both."""
        with self._writing:
            self._flush()
            segments = self._segments()
            if not segments:
                return
            merged = pa.concat_tables(list(self._load(segments)))
            first = {key: row for row, key in reversed(list(enumerate(merged["key"].to_pylist())))}
            self._folder.write_table(merged.take(sorted(first.values())), "calls", f"{self._name}.parquet")
            self._folder.delete("calls", self._name)


class LedgeredEngine:
    """An engine in a role, seen through a ledger: what was asked before is replayed, the rest is asked and kept.

    Equal prompts that are in flight at the same time share one call.

    Args:
        name: model and revision, recorded on examples.
        engine: who answers.
        sampling: how.
        ledger: of the partition at work.
        ready: awaited before the engine is asked, so not for what is replayed: starts it, once, whoever asks first.
        on_call: see `OnCall`.
        may_pay: raises when no more may be spent; asked before every call that is not replayed.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        sampling: SamplingConfig,
        ledger: Ledger,
        ready: Callable[[], Awaitable[None]],
        on_call: OnCall,
        may_pay: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._engine, self._sampling, self._ledger = engine, sampling, ledger
        self._ready, self._on_call, self._may_pay = ready, on_call, may_pay
        self._in_flight: dict[tuple[bytes, int], asyncio.Future[list[Completion]]] = {}

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        """All n samples, in order. Raises what `Engine.generate` raises."""
        sampling = self._sampling if num_samples is None else self._sampling.model_copy(update={"n": num_samples})
        prompt = self._engine.prompt_key(messages)
        keys = [call_key(self._engine.identity, prompt, sampling, i) for i in range(sampling.n)]
        found: list[Completion] = []
        for key in keys:
            completion = self._ledger.get(key)
            if completion is None:
                break
            found.append(completion)
        if found:
            self._on_call(True, found)
        if len(found) == len(keys):
            return found
        in_flight = self._in_flight.get((keys[0], len(keys)))
        if in_flight is not None:
            shared = await asyncio.shield(in_flight)
            self._on_call(True, shared)
            return found + shared
        self._may_pay()
        return found + await self._ask_for_all(messages, sampling, keys, first_sample=len(found))

    async def score(self, messages: Sequence[Message], answer: str) -> Completion:
        """The top k at each token of a given answer. Raises what `Engine.score` raises."""
        k = self._sampling.top_logprobs
        asked = hashlib.blake2b(f"score\0{k}\0{answer}\0".encode() + self._engine.prompt_key(messages), digest_size=16)
        key = call_key(self._engine.identity, asked.digest(), self._sampling, 0)
        completion = self._ledger.get(key)
        is_replayed = completion is not None
        if completion is None:
            self._may_pay()
            await self._ready()
            completion = await self._engine.score(messages, answer, k)
            self._ledger.put(key, completion)
        self._on_call(is_replayed, [completion])
        return completion

    async def _ask_for_all(
        self, messages: Sequence[Message], sampling: SamplingConfig, keys: list[bytes], *, first_sample: int
    ) -> list[Completion]:
        """Ask, and hand answer or error to all who ask the same meanwhile.

        In the first row's own task, not in a new one: that would stand behind all rows that are only beginning.
        """
        shared = self._in_flight[keys[0], len(keys)] = asyncio.get_running_loop().create_future()
        try:
            completions = await self._ask(messages, sampling, keys, first_sample=first_sample)
        except BaseException as error:
            if isinstance(error, Exception):
                shared.set_exception(error)
                shared.exception()  # seen: nobody else may be waiting
            else:
                shared.cancel()
            raise
        finally:
            del self._in_flight[keys[0], len(keys)]
        shared.set_result(completions)
        return completions

    async def _ask(
        self, messages: Sequence[Message], sampling: SamplingConfig, keys: list[bytes], *, first_sample: int
    ) -> list[Completion]:
        await self._ready()
        try:
            completions = await self._engine.generate(messages, sampling, first_sample=first_sample)
        except EngineError as error:
            self._keep(keys, error.paid)
            raise
        self._keep(keys, completions)
        return completions

    def _keep(self, keys: list[bytes], completions: Sequence[Completion]) -> None:
        for completion in completions:
            if completion.finish_reason != "abort":  # not an answer: the next run asks again
                self._ledger.put(keys[completion.sample_index], completion)
        if completions:
            self._on_call(False, completions)


def _table(calls: Sequence[tuple[bytes, Completion]]) -> pa.Table:
    records = []
    for key, c in calls:
        records.append(
            {
                "key": key,
                "text": c.text,
                "reasoning": c.reasoning,
                "finish_reason": c.finish_reason,
                "prompt_tokens": c.prompt_tokens,
                "completion_tokens": c.completion_tokens,
                "sample_index": c.sample_index,
                "token_ids": c.token_ids,
                "topk_width": c.topk_logprobs.shape[1] if c.topk_logprobs is not None else None,
            }
        )
    return with_arrays(
        pa.Table.from_pylist(records, schema=CALL_SCHEMA),
        {"topk_ids": [c.topk_ids for _, c in calls], "topk_logprobs": [c.topk_logprobs for _, c in calls]},
    )


def _completion(record: dict) -> Completion:
    width = record["topk_width"]

    def array(name: str, dtype: type) -> np.ndarray | None:
        values = record[name]
        return None if width is None or values is None else np.asarray(values, dtype=dtype).reshape(-1, width)

    return Completion(
        text=record["text"],
        reasoning=record["reasoning"],
        finish_reason=record["finish_reason"],
        prompt_tokens=record["prompt_tokens"],
        completion_tokens=record["completion_tokens"],
        sample_index=record["sample_index"],
        token_ids=record["token_ids"],
        topk_ids=array("topk_ids", np.int32),
        topk_logprobs=array("topk_logprobs", np.float32),
    )


class Flusher:
    """A thread that flushes the open ledgers every `interval_s`, so that a busy event loop cannot delay it."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._open: set[Ledger] = set()
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger-flusher", daemon=True)
        self._thread.start()

    def add(self, ledger: Ledger) -> None:
        """Flush this ledger from now on."""
        self._open.add(ledger)

    def remove(self, ledger: Ledger) -> None:
        """Stop flushing this ledger."""
        self._open.discard(ledger)

    def check(self) -> None:
        """Raise the error of a failed write, if there was one: paying on without a ledger would be waste."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            for ledger in list(self._open):
                try:
                    ledger.flush()
                except Exception as error:  # whatever it is, the run has to hear of it: `check` raises it there
                    self._failure = error
