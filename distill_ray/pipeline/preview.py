"""Preview: a few rows through the real teacher, nothing kept: prompt, raw answers, what the student would learn.

teacher (watched) -> calls -> `turns`, the result -> `outcome` -> one panel of parts per row
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from distill_ray.config import RunConfig, SamplingConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import DistillError, RequestRejected, RowError, TransientEngineError
from distill_ray.pipeline.capacity import of_one_actor
from distill_ray.pipeline.cluster import connected, own_error, raised_by, redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.helpers import Helpers, Roles, require_generation, start_helpers
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.pipeline.synthesize import with_queries
from distill_ray.pipeline.teacher import Teacher, member_actors, worker_resources
from distill_ray.recipes import make_recipe
from distill_ray.records import Completion, Example, Message, Reject, RejectReason, Row, row_from_record


@dataclass(frozen=True)
class Part:
    """One piece of a row's panel."""

    title: str
    text: str
    colour: str = ""


Call = tuple[Sequence[Message], list[Completion]]


class _Watched:
    """An engine in a role that remembers what it was asked and answered."""

    def __init__(self, engine: Any, sampling: SamplingConfig) -> None:
        self.name = engine.identity
        self.calls: list[Call] = []
        self._engine, self._sampling = engine, sampling

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        sampling = self._sampling if num_samples is None else self._sampling.model_copy(update={"n": num_samples})
        completions = await self._engine.generate(messages, sampling)
        self.calls.append((list(messages), completions))
        return completions

    async def score(self, messages: Sequence[Message], answer: str) -> Completion:
        return await self._engine.score(messages, answer, self._sampling.top_logprobs)


def turns(calls: Sequence[Call], names: Sequence[str] = ()) -> list[Part]:
    """What was said, turn by turn: of the first call the answers alone, for its prompt is shown by itself.

    Args:
        calls: conversations and their answers, in order; those after the first go on from it.
        names: what the recipe calls the first answer and each turn behind it; the later ones repeat, round by round.
    """
    parts: list[Part] = []
    for messages, answers in calls:
        place = len(messages) - len(calls[0][0])
        if place > 0:
            parts.append(Part(_title(names, place - 1, "asked"), messages[-1]["content"]))
        for number, answer in enumerate(answers, start=1):
            of = f" ({number} of {len(answers)})" if answers[1:] else ""
            parts.append(Part(_title(names, place, "raw answer") + of, answer.text, "cyan"))
    return parts


def _title(names: Sequence[str], place: int, default: str) -> str:
    if place < 0 or not names:
        return default
    if place == 0:
        return names[0]
    number, index = divmod(place - 1, len(names) - 1)
    return names[1 + index] + (f" {number + 1}" if number else "")


def outcome(result: list[Example] | Reject, *, was_asked: bool) -> list[Part]:
    """What became of a row: rewards and the decision where there are any, and what the student learns."""
    if isinstance(result, Reject):
        chains = [result.row] if result.reason is RejectReason.NOT_ACCEPTED else []
        parts = [part for chain in chains for part in _draft_and_revision(chain["draft"], chain["revision"])]
        learnt = [Part("the student learns", f"(nothing: {result.reason.value}: {result.detail})", "green")]
        return (parts if not was_asked else []) + learnt
    parts = []
    for example in result:
        if example.draft is not None and not was_asked:
            parts += _draft_and_revision(example.draft, example.completion)
        if example.reward_before is not None or example.reward_after is not None:
            parts.append(
                Part("reward", f"{_number(example.reward_before)} before, {_number(example.reward_after)} after")
            )
        if example.accepted is not None:
            kept = "accepted" if example.accepted else "not accepted; kept, for the evaluation alone"
            parts.append(Part("decision", kept))
    learnt = "\n---\n".join(example.completion for example in result)
    title = "the student learns" if result[0].split != "test" else "the student is held against"
    return [*parts, Part(title, learnt, "green")]


def _draft_and_revision(draft: str, revision: str) -> list[Part]:
    return [Part("draft", draft, "cyan"), Part("revision", revision, "cyan")]


def _number(reward: float | None) -> str:
    return "none" if reward is None else f"{reward:.4g}"


def preview(config: RunConfig, num_rows: int, console: Console) -> None:
    """Print the first `num_rows` rows as teacher and student would see them."""
    recipe = make_recipe(config.recipe)
    with tempfile.TemporaryDirectory(prefix="distill-ray-preview-") as scratch:
        folder = RunFolder(scratch)
        plan_rows(with_queries(config, folder, num_rows), recipe, folder, limit=num_rows)
        records = [record for table in folder.read_tables("rows") for record in table.to_pylist()][:num_rows]
        rows = [row_from_record(record) for record in records if record["reject_reason"] is None]
        with connected():
            require_generation(config)
            helpers = start_helpers(config, folder)
            with member_actors(config, folder) as members:
                options = of_one_actor(worker_resources(config))
                helpers = dataclasses.replace(helpers, members=members)
                try:
                    answers = ray.get(ray.remote(_answer).options(**options).remote(config, folder, rows, helpers))
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
        row, parts = by_id[record["row_id"]]
        try:
            prompt = recipe.teacher_messages(row)
        except RowError:  # the last part says what is wrong with this row's own context
            prompt = recipe.student_messages(row)
        _show(console, [*(Part(m["role"], m["content"]) for m in prompt), *parts], row)


def _show(console: Console, parts: list[Part], row: Row) -> None:
    texts = []
    for part in parts:
        style = f"bold {part.colour}".strip()
        texts.append(f"[{style}]{escape(part.title)}[/{style}]\n{escape(part.text)}")
    panel = Panel("\n\n".join(texts), title=escape(f"{row.source} ({row.split})"), title_align="left")
    console.print(panel, soft_wrap=False)  # else a line longer than the terminal is cut


def _answer(config: RunConfig, folder: RunFolder, rows: list[Row], helpers: Helpers) -> list[list[Part]]:
    """Inside Ray: what was asked and answered, and what becomes of it, per row."""
    redirect_output(folder, "preview")
    recipe = make_recipe(config.recipe)
    names: Sequence[str] = getattr(recipe, "turns", ())

    async def all_rows() -> list[list[Part]]:
        teacher = Teacher(config, helpers.members)
        if config.recipe.asks_teacher and not helpers.members:  # those start when they are asked
            await asyncio.gather(*(engine.start() for engine in teacher.engines))
        roles = Roles(config, helpers)
        try:
            return list(await asyncio.gather(*(one_row(teacher.of_row(recipe, row), roles, row) for row in rows)))
        finally:
            if not helpers.members:
                await asyncio.gather(*(engine.close() for engine in teacher.engines))

    async def one_row(engine: Engine, roles: Roles, row: Row) -> list[Part]:
        engines = roles.engines(lambda own, sampling, _: _Watched(own or engine, sampling))
        watched = engines.teacher
        assert isinstance(watched, _Watched)
        try:
            end = outcome(await recipe.distill(row, engines), was_asked=bool(watched.calls))
        except (RequestRejected, RowError, TransientEngineError) as error:
            end = [Part("the student learns", f"(nothing: {error})", "green")]
        return turns(watched.calls, names) + end

    return asyncio.run(all_rows())
