"""The actor of the generation stage: the teacher, several open partitions, the recipe of many rows at once.

The teacher's engine lives here, or, where it is a mixture, in actors that all workers ask (`teacher.py`). There is no
barrier: a row that finishes leaves, the next one enters, and all turns of a row meet the same engine, so its prefix
cache is warm.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_ray.config import RunConfig, SamplingConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import DistillError, RequestRejected, RowError, TransientEngineError
from distill_ray.pipeline.cluster import own_error, redirect_output
from distill_ray.pipeline.folder import RunFolder, partition_name
from distill_ray.pipeline.helpers import Helpers, Roles
from distill_ray.pipeline.ledger import Flusher, Ledger, LedgeredEngine
from distill_ray.pipeline.teacher import Teacher
from distill_ray.recipes import Engines, make_recipe
from distill_ray.records import (
    RETRYABLE_REASONS,
    ROW_SCHEMA,
    Completion,
    Example,
    Reject,
    RejectReason,
    examples_table,
    preferences_table,
    rejects_table,
    row_from_record,
)

REPORT_EVERY_S = 0.5  # of one partition
REPORTS_PER_S = 500  # of all: one actor takes them

EnginesWith = Callable[[Engine], Engines]  # whoever is the teacher -> who may be asked


class TokenBudgetSpent(Exception):
    """Inside the worker only: `generate.max_teacher_tokens` is reached, the row waits for the next run."""


@dataclass
class Figures:
    """Counts of one partition."""

    rows: int = 0
    rows_with_examples: int = 0
    examples: int = 0
    calls: int = 0
    replayed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    judge_prompt_tokens: int = 0  # these two are among the two above
    judge_completion_tokens: int = 0
    paid_tokens: int = 0
    rejects: Counter[str] = field(default_factory=Counter)

    def add_call(self, replayed: bool, completions: Sequence[Completion]) -> None:
        """Count the samples of one answered request."""
        prompt = sum(c.prompt_tokens for c in completions)
        completion = sum(c.completion_tokens for c in completions)
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if replayed:
            self.replayed += len(completions)
        else:
            self.calls += len(completions)
            self.paid_tokens += prompt + completion

    def add_judgement(self, replayed: bool, completions: Sequence[Completion]) -> None:
        """Count those of a judge."""
        self.add_call(replayed, completions)
        self.judge_prompt_tokens += sum(c.prompt_tokens for c in completions)
        self.judge_completion_tokens += sum(c.completion_tokens for c in completions)


class PartitionWorker:
    """Callable class for `ray.data`: takes batches of one partition index, yields one row of figures each.

    Args:
        config: the whole YAML.
        folder: of the run.
        fingerprint: of the generation, for the markers.
        tally: a handle of the `Tally`.
        row_shas: of all partitions' rows, for the markers.
        helpers: who answers beside the teacher, and the members of a mixture.
        open_partitions: that report to the tally, of all workers together.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        fingerprint: str,
        tally: Any,
        row_shas: Sequence[str],
        helpers: Helpers | None = None,
        open_partitions: int = 1,
    ) -> None:
        redirect_output(folder, f"engine-{os.getpid()}")
        self._name = secrets.token_hex(8)
        self._config, self._folder, self._fingerprint = config, folder, fingerprint
        self._tally, self._row_shas = tally, row_shas
        self._recipe = make_recipe(config.recipe)
        if not config.recipe.asks_teacher:
            tally.engine_started.remote()  # nothing to wait for
        helpers = helpers or Helpers()
        self._teacher, self._roles = Teacher(config, helpers.members), Roles(config, helpers)
        self._counts_starts = not helpers.members  # else they do it themselves: several workers ask them
        self._starting: dict[Engine, asyncio.Task[None]] = {}
        # Of each engine its own, so that the rows of a slow member do not keep those of the others waiting.
        self._rows_in_progress = {
            engine: asyncio.Semaphore(own.max_concurrency) for engine, own in self._teacher.engines.items()
        }
        self._flusher = Flusher(config.generate.flush_s or (0.1 if folder.is_local else 5.0))
        self._report_every_s = max(REPORT_EVERY_S, open_partitions / REPORTS_PER_S)
        self._budget_spent = False

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Work through the partitions of a batch; yields each one's index when its files are written."""
        for partition in batch["partition"].tolist():
            await self._run(partition)
            yield {"partition": [partition]}

    async def _run(self, partition: int) -> None:
        # Asked of a store in threads: the loop has other partitions' rows to feed to the engine.
        name = f"{partition_name(partition)}.parquet"
        rows = await asyncio.to_thread(self._folder.read_table, "rows", name, columns=ROW_SCHEMA.names)
        ledger = await asyncio.to_thread(Ledger, self._folder, partition_name(partition))
        self._flusher.add(ledger)
        figures = Figures()
        samples: list[str] = []
        engines = self._engines(ledger, figures)
        tasks = [asyncio.create_task(self._row(record, engines, figures, samples)) for record in rows.to_pylist()]
        try:
            await self._until_done(partition, tasks, figures, samples)
        finally:
            for task in tasks:
                task.cancel()
            self._flusher.remove(ledger)
            ledger.flush()
        await asyncio.to_thread(self._write, partition, [task.result() for task in tasks], figures, ledger)

    def _engines(self, ledger: Ledger, figures: Figures) -> EnginesWith:
        """Who the recipe may ask, by who is its teacher, each through this partition's ledger."""

        @functools.cache
        def engines_with(teacher: Engine) -> Engines:
            def ledgered(engine: Engine | None, sampling: SamplingConfig, is_judge: bool) -> LedgeredEngine:
                ready = functools.partial(self._ready, teacher) if engine is None else engine.start
                engine = engine or teacher
                name = engine.identity.partition(":")[2] or engine.identity
                on_call = figures.add_judgement if is_judge else figures.add_call
                return LedgeredEngine(name, engine, sampling, ledger, ready, on_call, self._may_pay)

            return self._roles.engines(ledgered)

        return engines_with

    async def _ready(self, engine: Engine) -> None:
        """Start an engine once, whichever partition comes first."""
        if engine not in self._starting:
            self._starting[engine] = asyncio.create_task(self._start(engine))
        await asyncio.shield(self._starting[engine])

    async def _start(self, engine: Engine) -> None:
        await engine.start()
        if self._counts_starts:
            self._tally.engine_started.remote()

    async def _until_done(
        self, partition: int, tasks: list[asyncio.Task[Any]], figures: Figures, samples: list[str]
    ) -> None:
        pending, every, last = set(tasks), self._report_every_s, 0.0
        while pending:
            done, pending = await asyncio.wait(pending, timeout=every, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()  # an engine that is unavailable, a broken disk: ends the run
            self._flusher.check()
            if time.monotonic() - last >= every or not pending:
                last = time.monotonic()
                shown, samples[:] = list(samples), []
                retries = (self._name, sum(engine.num_retries for engine in self._teacher.engines))
                try:
                    self._budget_spent = await self._tally.report.remote(partition, _plain(figures), shown, retries)
                except DistillError as error:  # Ray's copy of it, whose message is a whole traceback
                    raise own_error(error) or error from None

    async def _row(
        self, record: dict[str, Any], engines: EnginesWith, figures: Figures, samples: list[str]
    ) -> list[Example] | Reject:
        result = await self._distill(record, engines)
        figures.rows += 1
        if isinstance(result, Reject):
            figures.rejects[result.reason.value] += 1
            if len(samples) < 3:
                samples.append(f"{record['source'] or record['row_id']}: {result.reason.value}: {result.detail}")
        else:
            figures.rows_with_examples += 1
            figures.examples += len(result)
        return result

    async def _distill(self, record: dict[str, Any], engines_with: EnginesWith) -> list[Example] | Reject:
        """One row to its examples or its reject. Only what concerns all rows is raised."""
        if record["reject_reason"] is not None:
            return _reject(record, "read", RejectReason(record["reject_reason"]), record["reject_detail"])
        row = row_from_record(record)
        teacher = self._teacher.of_row(self._recipe, row)
        async with self._rows_in_progress[teacher]:
            try:
                result = await self._recipe.distill(row, engines_with(teacher))
            except RequestRejected as error:
                return _reject(record, "generate", RejectReason(error.reason), error.detail)
            except RowError as error:
                return _reject(record, "generate", RejectReason(error.reason), error.detail)
            except TransientEngineError as error:
                return _reject(record, "generate", RejectReason.ENGINE_ERROR, str(error))
            except TokenBudgetSpent:
                return _reject(record, "generate", RejectReason.TOKEN_BUDGET, "generate.max_teacher_tokens is spent")
        return result

    def _may_pay(self) -> None:
        if self._budget_spent:
            raise TokenBudgetSpent
        self._flusher.check()

    def _write(self, partition: int, results: list[list[Example] | Reject], figures: Figures, ledger: Ledger) -> None:
        """Outputs first, marker last: a partition killed in between is done again, from the ledger."""
        name = partition_name(partition)
        self._folder.remove("done", f"{name}.json")
        examples = [example for result in results if isinstance(result, list) for example in result]
        rejects = [result for result in results if isinstance(result, Reject)]
        ledger.merge()
        self._folder.write_table(examples_table(examples), "examples", f"{name}.parquet")
        self._folder.write_table(rejects_table(rejects), "rejects", f"{name}.parquet")
        if getattr(self._config.recipe, "preference_pairs", False):
            self._folder.write_table(preferences_table(examples), "preferences", f"{name}.parquet")
        retry = any(reject.reason in RETRYABLE_REASONS for reject in rejects)
        marker = {
            "rows_sha": self._row_shas[partition],
            "fingerprint": self._fingerprint,
            "retry": retry,
            **_plain(figures),
        }
        self._folder.write_json(marker, "done", f"{name}.json")


def _reject(record: dict[str, Any], stage: str, reason: RejectReason, detail: str) -> Reject:
    return Reject(record["row_id"], stage, reason, detail, json.loads(record["columns"]))


def _plain(figures: Figures) -> dict[str, Any]:
    return {**vars(figures), "rejects": dict(figures.rejects)}
