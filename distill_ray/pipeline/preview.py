"""Preview: a few rows through the real teacher, nothing kept: prompt, raw answer, what the student would learn."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from distill_ray.config import RunConfig, SamplingConfig
from distill_ray.engines import make_engine
from distill_ray.errors import DistillError, RequestRejected, RowError, TransientEngineError
from distill_ray.pipeline.cluster import connected, engine_resources, own_error, raised_by, redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.helpers import Helpers, Roles, start_helpers
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.pipeline.synthesize import with_queries
from distill_ray.recipes import make_recipe
from distill_ray.records import Completion, Message, Reject, Row, row_from_record


class _Watched:
    """An engine in a role that remembers what it answered."""

    def __init__(self, engine: Any, sampling: SamplingConfig) -> None:
        self.name = engine.identity
        self.answers: list[Completion] = []
        self._engine, self._sampling = engine, sampling

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        sampling = self._sampling if num_samples is None else self._sampling.model_copy(update={"n": num_samples})
        completions = await self._engine.generate(messages, sampling)
        self.answers += completions
        return completions

    async def score(self, messages: Sequence[Message], answer: str) -> Completion:
        return await self._engine.score(messages, answer, self._sampling.top_logprobs)


def preview(config: RunConfig, num_rows: int, console: Console) -> None:
    """Print the first `num_rows` rows as teacher and student would see them."""
    recipe = make_recipe(config.recipe)
    with tempfile.TemporaryDirectory(prefix="distill-ray-preview-") as scratch:
        folder = RunFolder(scratch)
        plan_rows(with_queries(config, folder, num_rows), recipe, folder, limit=num_rows)
        records = [record for table in folder.read_tables("rows") for record in table.to_pylist()][:num_rows]
        rows = [row_from_record(record) for record in records if record["reject_reason"] is None]
        with connected():
            resources = engine_resources(config)
            options = resources.pop("ray_remote_args_fn", dict)()
            helpers = start_helpers(config, folder)
            try:
                answers = ray.get(
                    ray.remote(_answer).options(**resources, **options).remote(config, folder, rows, helpers)
                )
            except ray.exceptions.RayError as error:
                raise own_error(error) or DistillError(f"preview failed inside Ray: {raised_by(error)}") from None
    by_id = {row.row_id: (row, answer) for row, answer in zip(rows, answers, strict=True)}
    for record in records:
        if record["row_id"] not in by_id:
            console.print(
                f"[red]rejected[/red] {escape(record['source'])}: {record['reject_reason']}: "
                f"{escape(record['reject_detail'])}"
            )
            continue
        row, (raw, learned) = by_id[record["row_id"]]
        try:
            prompt = recipe.teacher_messages(row)
        except RowError:  # `learned` says what is wrong with this row's own context
            prompt = recipe.student_messages(row)
        _show(console, prompt, row, raw, learned)


def _show(console: Console, prompt: list[Message], row: Row, raw: list[str], learned: str) -> None:
    parts = [f"[bold]{m['role']}[/bold]\n{escape(m['content'])}" for m in prompt]
    parts += [f"[bold cyan]raw answer[/bold cyan]\n{escape(text)}" for text in raw]
    parts += [f"[bold green]the student learns[/bold green]\n{escape(learned)}"]
    panel = Panel("\n\n".join(parts), title=escape(f"{row.source} ({row.split})"), title_align="left")
    console.print(panel, soft_wrap=False)  # else a line longer than the terminal is cut


def _answer(config: RunConfig, folder: RunFolder, rows: list[Row], helpers: Helpers) -> list[tuple[list[str], str]]:
    """Inside Ray: raw answers and what becomes of them, per row."""
    redirect_output(folder, "preview")

    async def all_rows() -> list[tuple[list[str], str]]:
        engine = make_engine(config.teacher)
        if config.recipe.asks_teacher:
            await engine.start()
        roles = Roles(config, helpers)
        try:
            return list(await asyncio.gather(*(one_row(engine, roles, row) for row in rows)))
        finally:
            await engine.close()

    async def one_row(engine: Any, roles: Roles, row: Row) -> tuple[list[str], str]:
        engines = roles.engines(lambda own, sampling: _Watched(own or engine, sampling))
        watched = engines.teacher
        assert isinstance(watched, _Watched)
        try:
            result = await make_recipe(config.recipe).distill(row, engines)
        except (RequestRejected, RowError, TransientEngineError) as error:
            return [answer.text for answer in watched.answers], f"(nothing: {error})"
        if isinstance(result, Reject):
            learned = f"(nothing: {result.reason.value}: {result.detail})"
        else:
            learned = "\n---\n".join(example.completion for example in result)
        return [answer.text for answer in watched.answers], learned

    return asyncio.run(all_rows())
