"""Distilled Self-Critique: draft, critique, revise; keep what a reward likes better; learn it directly.

    user: query            -> draft
    user: critique request -> critique          one conversation, so the engine's prefix cache is warm
    user: revision request -> revision
    reward(draft), reward(revision) -> accepted or not          `rounds` times; a round proposes, acceptance decides
    student sees [user: query] and learns the accepted revision

Paper: Distilled Self-Critique of LLMs with Synthetic Data, arXiv 2312.01957: revising is a step of a Markov chain whose
proposals the model makes, and the reward's filter is its acceptance step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distill_ray.config import AcceptConfig, SelfCritiqueRecipeConfig
from distill_ray.errors import RowError
from distill_ray.recipes.answers import checked_text, good_ones, rejected, text_column
from distill_ray.recipes.base import Engines
from distill_ray.recipes.template import TextTemplate, kind_of
from distill_ray.records import Answered, Completion, Example, Message, Reject, RejectedChain, RejectReason, Row


@dataclass(slots=True)
class Chain:
    """What came of one draft. `current` is the draft until a revision is accepted. Without a reward they are NaN."""

    draft: str
    current: str
    last: str  # the last revision that was proposed, accepted or not
    reward_draft: float = math.nan
    reward_current: float = math.nan
    reward_last: float = math.nan
    num_accepted: int = 0
    sample: Completion | None = None


def accepts(config: AcceptConfig, before: float, after: float, draw: float) -> bool:
    """Whether a proposal with reward `after` takes the place of a text with reward `before`.

    Args:
        config: `recipe.accept`.
        before: reward of the text as it is.
        after: reward of the proposal.
        draw: uniform in [0, 1); for `metropolis`.
    """
    match config.type:
        case "always":
            return True
        case "improve":
            return after > before
        case "threshold":
            return after >= config.threshold
        case "metropolis":
            return after >= before or draw < math.exp((after - before) / config.temperature)


class SelfCritiqueRecipe:
    """One chain per sample of the draft; an example per chain of which a revision was accepted.

    A row of the `test` split is always an example, its last revision accepted or not: nothing is learnt from it, and
    leaving out those that were not accepted would make the evaluation look better than it is.

    Raises:
        ConfigError: a template does not compile.
    """

    turns = ("draft", "critique request", "critique", "revision request", "revision")
    """What `preview` calls the first answer and the turns behind it; from the second on they repeat with each round."""

    def __init__(self, config: SelfCritiqueRecipeConfig) -> None:
        self.config = config
        self._query = TextTemplate(config.query, key="recipe.query")
        self._critique = TextTemplate(config.critique_request, key="recipe.critique_request")
        self._revise = TextTemplate(config.revision_request, key="recipe.revision_request")
        self._before: list[Message] = []
        if config.instruction is not None:
            self._before.append({"role": "system", "content": config.instruction})
        self.columns = dict.fromkeys(self._query.columns, "recipe.query")
        if config.chains is not None:
            for name, column in config.chains.model_dump(exclude_none=True).items():
                self.columns.setdefault(column, f"recipe.chains.{name}")
            return
        for template in (self._critique, self._revise):
            for column in template.columns - {"query"}:
                self.columns.setdefault(column, template.key)

    @property
    def fingerprint(self) -> str:
        """Hash of the config."""
        return hashlib.blake2b(self.config.model_dump_json().encode(), digest_size=16).hexdigest()

    def query(self, columns: Mapping[str, object]) -> str:
        """Render the row's query. Raises RowError: the row lacks a column, or its value is not text."""
        return self._query.render(columns)

    def teacher_messages(self, row: Row) -> list[Message]:
        """What the teacher is asked for its draft."""
        return [*self._before, *self.student_messages(row)]

    def student_messages(self, row: Row) -> list[Message]:
        """What the student sees."""
        return [*row.history, {"role": "user", "content": row.query}]

    async def distill(self, row: Row, engines: Engines) -> list[Example] | Reject:
        """Run the chains, or read one from the row, and decide by reward."""
        try:
            chains = [self._read(row)] if self.config.chains is not None else await self._drafts(row, engines)
            for chain in chains:
                await self._run(row, chain, engines)
        except RowError as error:
            return rejected(row, error)
        accepted = [chain for chain in chains if chain.num_accepted or row.split == "test"]
        others = [_as_record(chain) for chain in chains if not (chain.num_accepted or row.split == "test")]
        if accepted:
            examples = [self._example(row, chain, engines) for chain in accepted]
            examples[0].rejected_chains = others or None
            return examples
        chain, kept = chains[0], {**row.columns, **others[0]}
        if others[1:]:
            kept["rejected_chains"] = others[1:]
        detail = f"reward {chain.reward_draft:.4g} before, {chain.reward_last:.4g} after ({self.config.accept.type})"
        return Reject(row.row_id, "generate", RejectReason.NOT_ACCEPTED, detail, kept)

    # -- the chain -------------------------------------------------------------------------------------------------

    async def _drafts(self, row: Row, engines: Engines) -> list[Chain]:
        """One chain per good draft. Raises RowError: there is none (with the first one's reason)."""
        samples = await engines.teacher.generate(self.teacher_messages(row))
        good = good_ones(samples, lambda sample: (sample, checked_text(sample, self.config.refusals)))
        return [Chain(draft, draft, draft, sample=sample) for sample, draft in good]

    async def _run(self, row: Row, chain: Chain, engines: Engines) -> None:
        """The rounds of one chain, each accepted or not."""
        conversation = [*self.teacher_messages(row), _said(chain.draft)]
        for number in range(self.config.rounds):
            if self.config.chains is None:
                conversation = await self._propose(row, chain, conversation, engines)
            before, after = await self._rewards(row, chain, engines)
            if number == 0:
                chain.reward_draft = before
            chain.reward_last = after
            if accepts(self.config.accept, before, after, self._draw(row, chain, number)):
                chain.current, chain.reward_current = chain.last, after
                chain.num_accepted += 1
            elif self.config.restart:
                return
            if self.config.restart:
                conversation = [*self.teacher_messages(row), _said(chain.current)]

    async def _propose(self, row: Row, chain: Chain, conversation: list[Message], engines: Engines) -> list[Message]:
        """One critique and one revision; returns the conversation with both."""
        values = {**row.columns, "query": row.query}
        for request, is_revision in ((self._critique, False), (self._revise, True)):
            conversation = [*conversation, {"role": "user", "content": request.render(values)}]
            [sample] = await engines.teacher.generate(conversation, num_samples=1)
            # What a critique quotes may look like a refusal.
            text = checked_text(sample, self.config.refusals if is_revision else ())
            conversation.append(_said(text))
        chain.last = text
        return conversation

    async def _rewards(self, row: Row, chain: Chain, engines: Engines) -> tuple[float, float]:
        """Of the text as it is and of the proposal. Raises RowError: one of them is no number."""
        given = self._given_rewards(row)
        if given is not None:
            return given
        if engines.reward is None:
            return math.nan, math.nan  # accept: always, and nothing to compare by
        messages = tuple(self.student_messages(row))
        before, after = await engines.reward.score_pair(
            Answered(messages, chain.current), Answered(messages, chain.last)
        )
        for what, value in (("before", before), ("after", after)):
            if not math.isfinite(value):
                raise RowError(RejectReason.NO_REWARD, f"the reward {what} the revision is {value}")
        return before, after

    def _draw(self, row: Row, chain: Chain, number: int) -> float:
        index = chain.sample.sample_index if chain.sample else 0
        key = hashlib.blake2b(row.row_id.encode(), digest_size=8).digest()
        seed = [self.config.accept.seed, number, index, int.from_bytes(key, "big")]
        return float(np.random.default_rng(seed).random())

    # -- chains from columns ---------------------------------------------------------------------------------------

    def _read(self, row: Row) -> Chain:
        """The chain that the row has. Raises RowError: it lacks a part."""
        chains = self.config.chains
        assert chains is not None
        draft, revision = (
            text_column(row.columns, column, "recipe.chains").strip() for column in (chains.draft, chains.revision)
        )
        return Chain(draft, draft, revision)

    def _given_rewards(self, row: Row) -> tuple[float, float] | None:
        chains = self.config.chains
        if chains is None or chains.reward_before is None or chains.reward_after is None:
            return None
        return self._number(row, chains.reward_before), self._number(row, chains.reward_after)

    def _number(self, row: Row, column: str) -> float:
        """The reward in a column. Raises RowError: there is none, and something is decided by it."""
        value = row.columns.get(column)
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
        if self.config.accept.type == "always":
            return math.nan
        kind = f"{value}" if isinstance(value, float) else kind_of(value)
        raise RowError(RejectReason.NO_REWARD, f"column `{column}` (recipe.chains) is {kind}, expected a finite number")

    # -- what the student learns -----------------------------------------------------------------------------------

    def _example(self, row: Row, chain: Chain, engines: Engines) -> Example:
        sample = chain.sample
        is_accepted = chain.num_accepted > 0
        return Example(
            row_id=row.row_id,
            split=row.split,
            messages=self.student_messages(row),
            completion=chain.current if is_accepted else chain.last,
            teacher=engines.teacher.name if sample else "data",
            sample_index=sample.sample_index if sample else 0,
            reference=row.reference,
            draft=chain.draft,
            accepted=is_accepted,
            reward_before=_number_or_none(chain.reward_draft),
            reward_after=_number_or_none(chain.reward_current if is_accepted else chain.reward_last),
        )


def _as_record(chain: Chain) -> RejectedChain:
    """A chain of which no revision was accepted."""
    return {
        "draft": chain.draft,
        "revision": chain.last,
        "reward_before": chain.reward_draft,
        "reward_after": chain.reward_last,
    }


def _number_or_none(reward: float) -> float | None:
    return None if math.isnan(reward) else reward


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}
