"""Context distillation: the teacher answers with a context in view, the student learns to answer without it.

    teacher sees   [system: context] + few-shot turns + [user: query]
    student sees   ([system: student_context]) + [user: query]        and learns the teacher's (parsed) answer

Papers: Askell et al. 2021 (arXiv 2112.00861, section 2.3), Snell et al. 2022 (arXiv 2209.15189). The first
trains on the teacher's distribution over tokens. Here sampled answers are the default, as they work across
tokenizers and through any API; top-k logprobs are an option (`teacher.sampling.top_logprobs`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from distill_ray.config import ContextRecipeConfig, ContextSource
from distill_ray.errors import ConfigError, RowError
from distill_ray.nearby import neighbours
from distill_ray.object_store import reach
from distill_ray.recipes.answers import checked_text, good_ones, rejected, show, text_column
from distill_ray.recipes.base import Engines
from distill_ray.recipes.parse import parse_answer
from distill_ray.recipes.template import TextTemplate
from distill_ray.records import Completion, Example, Message, Reject, RejectReason, Row

MIN_SAID = 1e-3  # probability of each token of an answer that the teacher might give
MIN_TAIL = 1e-10  # probability left outside the top k at least: rounding can take their sum to 1


class ContextRecipe:
    """One call to the teacher per row, one example per good sample.

    Raises:
        ConfigError: the query does not compile, or the context is missing, empty or not UTF-8.
    """

    def __init__(self, config: ContextRecipeConfig) -> None:
        self.config = config
        self._query = TextTemplate(config.query, key="recipe.query")
        self._fixed_context = None if config.context.column is not None else _load_context(config.context)
        self._few_shot: list[Message] = []
        for example in config.examples:
            self._few_shot.append({"role": "user", "content": example.query})
            self._few_shot.append({"role": "assistant", "content": example.answer})
        self.columns = dict.fromkeys(self._query.columns, "recipe.query")
        if config.context.column is not None:
            self.columns.setdefault(config.context.column, "recipe.context.column")

    @property
    def fingerprint(self) -> str:
        """Hash of the config and of the context's text: what a changed prompt changes."""
        # The text counts, not where it lies: moving the project's folder changes nothing.
        config = self.config.model_dump_json(exclude={"context": {"file"}})
        parts = f"{config}\0{self._fixed_context}"
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def query(self, columns: Mapping[str, object]) -> str:
        """Render the row's query. Raises RowError: the row lacks a column, or its value is not text."""
        return self._query.render(columns)

    @property
    def context_messages(self) -> list[Message]:
        """What stands in front of every conversation: system prompt and few-shot turns, where all rows share them."""
        assert self._fixed_context is not None, "a context of each row's own"
        return [{"role": "system", "content": self._fixed_context}, *self._few_shot]

    def teacher_messages(self, row: Row) -> list[Message]:
        """What the teacher sees. Raises RowError where the row's own context is missing or not text."""
        user: Message = {"role": "user", "content": row.query}
        return [{"role": "system", "content": self._context(row)}, *self._few_shot, *row.history, user]

    def student_messages(self, row: Row) -> list[Message]:
        """What the student sees, in training and in service."""
        user: Message = {"role": "user", "content": row.query}
        if self.config.student_context is None:
            return [*row.history, user]
        return [{"role": "system", "content": self.config.student_context}, *row.history, user]

    async def distill(self, row: Row, engines: Engines) -> list[Example] | Reject:
        """Ask the teacher once; every good sample is an example.

        A row without one is a Reject with the first sample's reason. Errors of the engine pass through.
        """
        teacher = engines.teacher
        try:
            messages = self.teacher_messages(row)
            good = good_ones(await teacher.generate(messages), lambda sample: (sample, self._good_text(sample)))
        except RowError as error:
            return rejected(row, error)
        examples: list[Example] = []
        for sample, text in good:
            if sample.topk_logprobs is not None and self.config.parse is None:
                text = sample.text  # not stripped: the log-probabilities are of these very tokens
            elif sample.topk_logprobs is not None:  # a part of the answer is another token sequence: scored anew
                scored = await teacher.score(messages, text)
                if _would_be_said(scored):
                    sample = dataclasses.replace(scored, sample_index=sample.sample_index, reasoning=sample.reasoning)
            examples.append(self._example(row, sample, text, teacher.name))
        return examples

    def _context(self, row: Row) -> str:
        if self._fixed_context is not None:
            return self._fixed_context
        column = self.config.context.column or ""
        return text_column(row.columns, column, "recipe.context.column", if_empty=RejectReason.EMPTY_CONTEXT)

    def _good_text(self, sample: Completion) -> str:
        """The completion to learn. Raises RowError: why this sample is no good."""
        text = checked_text(sample, self.config.refusals)
        if self.config.parse is None:
            return text
        found = parse_answer(text, self.config.parse)
        if found is None:
            raise RowError(RejectReason.UNPARSABLE_ANSWER, f"recipe.parse finds nothing in: {show(text)}")
        return found

    def _example(self, row: Row, sample: Completion, completion: str, teacher: str) -> Example:
        example = Example(
            row_id=row.row_id,
            split=row.split,
            messages=self.student_messages(row),
            completion=completion,
            finish_reason=sample.finish_reason,
            teacher=teacher,
            sample_index=sample.sample_index,
            reasoning=sample.reasoning,
            reference=row.reference,
        )
        if completion == sample.text:
            example.completion_ids = sample.token_ids
            example.topk_ids = sample.topk_ids
            example.topk_logprobs = sample.topk_logprobs
            example.tail_logprob = _tail_logprob(sample.topk_logprobs)
        return example


def _load_context(source: ContextSource) -> str:
    """The fixed context, stripped: a file's last newline is the editor's, not the author's."""
    if source.file is None:
        text, where = source.text or "", "recipe.context.text"
    else:
        text, where = _read_text(source.file), f"recipe.context.file: {source.file}"
    if not text.strip():
        raise ConfigError(f"{where}: empty; write down the context that the teacher should see")
    return text.strip()


def _read_text(path: str) -> str:
    where = f"recipe.context.file: {path}"
    try:
        fs, name = reach(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{where}: cannot open this location ({error}); check the address") from error
    try:
        data = fs.cat_file(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no such file{neighbours(fs, name)}") from error
    except ValueError as error:  # a NUL
        raise ConfigError(f"{where}: no name of a file ({error}); give a readable text file") from error
    except OSError as error:
        raise ConfigError(f"{where}: cannot read it ({error.strerror or error}); give a readable text file") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def _would_be_said(scored: Completion) -> bool:
    """Whether the teacher might say an answer just so, each of its tokens and the end.

    Where it reasons first, its distribution over the bare result is that of the first words of its reasoning: a student
    that matches it never gives a result. Such an example has no soft targets.
    """
    if scored.token_ids is None or scored.topk_ids is None or scored.topk_logprobs is None:
        return False
    is_own = scored.topk_ids == np.asarray(scored.token_ids)[:, None]
    own = np.where(is_own, scored.topk_logprobs, -np.inf).max(axis=1)
    return bool((own >= np.log(MIN_SAID)).all())


def _tail_logprob(topk_logprobs: np.ndarray | None) -> np.ndarray | None:
    """Log probability of everything outside the top k, per token. [T, K] -> [T] float32, natural log."""
    if topk_logprobs is None:
        return None
    tail = 1.0 - np.exp(topk_logprobs.astype(np.float64)).sum(axis=1)
    return np.log(np.maximum(tail, MIN_TAIL)).astype(np.float32)
