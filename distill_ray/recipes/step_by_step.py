"""Distilling Step-by-Step: rationales as a second task.

    teacher sees   ([system: instruction]) + worked examples + [user: query]
                   and says   <rationale> <marker> <label>          (or a column has its answer already)

    student sees   predict: <query>   and learns the label          weight alpha
                   explain: <query>   and learns the rationale      weight 1 - alpha

Paper: Hsieh et al. 2023 (arXiv 2305.02301, section 3). Only the label is asked for in service, so the rationale costs
nothing there. Both examples of a row have its id, so the trainer takes them in one optimizer step, and each task is
averaged over its own tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from distill_ray.config import StepByStepRecipeConfig
from distill_ray.errors import RowError
from distill_ray.recipes.answers import checked_text, good_ones, is_blank, rejected, show, text_column
from distill_ray.recipes.base import Engines
from distill_ray.recipes.patterns import last_match
from distill_ray.recipes.template import TextTemplate
from distill_ray.records import Completion, Example, Message, Reject, RejectReason, Row, Split


@dataclass(frozen=True, slots=True)
class Explained:
    """What the teacher said, taken apart."""

    rationale: str
    label: str | None  # None where it gave none
    teacher: str
    sample: Completion | None = None


class StepByStepRecipe:
    """One call to the teacher per row, two examples per good sample. No call where a column has the rationales, or
    where gold labels alone are learnt: that is one example, whatever is or is not in the column.

    Raises:
        ConfigError: a template does not compile.
    """

    def __init__(self, config: StepByStepRecipeConfig) -> None:
        self.config = config
        self._query = TextTemplate(config.query, key="recipe.query")
        self._label_prompt = TextTemplate(config.label_prompt, key="recipe.label_prompt")
        self._rationale_prompt = TextTemplate(config.rationale_prompt, key="recipe.rationale_prompt")
        named = {"recipe.rationale_column": config.rationale_column, "recipe.label_column": config.label_column}
        if config.learns_gold_only:
            del named["recipe.rationale_column"]
        self._columns = {name: key for key, name in named.items() if name is not None}
        self.columns = dict.fromkeys(self._query.columns, "recipe.query") | self._columns
        for template in (self._label_prompt, self._rationale_prompt) if config.mode == "task_prefix" else ():
            for column in template.columns - {"query"}:
                self.columns.setdefault(column, template.key)
        self._before: list[Message] = []
        if config.instruction is not None:
            self._before.append({"role": "system", "content": config.instruction})
        for example in config.examples:
            self._before.append({"role": "user", "content": example.query})
            answer = f"{example.rationale} {config.marker} {example.label}"
            self._before.append({"role": "assistant", "content": answer})

    def columns_for(self, split: Split) -> dict[str, str]:
        """The columns that rows of a split need: what is only measured needs no rationale."""
        column = self.config.rationale_column
        if not self._label_is_enough(split) or column in self._query.columns | self._label_prompt.columns:
            return self.columns
        return {name: key for name, key in self.columns.items() if name != column}

    @property
    def fingerprint(self) -> str:
        """Hash of the config."""
        return hashlib.blake2b(self.config.model_dump_json().encode(), digest_size=16).hexdigest()

    def query(self, columns: Mapping[str, object]) -> str:
        """Render the row's problem. Raises RowError: the row lacks a column, or its value is not text."""
        return self._query.render(columns)

    def teacher_messages(self, row: Row) -> list[Message]:
        """What the teacher sees."""
        return [*self._before, *row.history, {"role": "user", "content": row.query}]

    def student_messages(self, row: Row) -> list[Message]:
        """What the student sees in service, and in training for the label."""
        if self.config.mode != "task_prefix":
            return [*row.history, {"role": "user", "content": row.query}]
        return self._prompt(self._label_prompt, row)

    async def distill(self, row: Row, engines: Engines) -> list[Example] | Reject:
        """Ask the teacher, or read its answer from the row; every good sample gives the examples of `mode`."""
        try:
            gold = self._gold(row)
            if self.config.learns_gold_only:
                return self._examples(row, Explained("", None, "data"), gold)
            explained = await self._explained(row, engines)
            return [example for each in explained for example in self._examples(row, each, gold)]
        except RowError as error:
            return rejected(row, error)

    # -- what the teacher says -------------------------------------------------------------------------------------

    async def _explained(self, row: Row, engines: Engines) -> list[Explained]:
        """All good samples. Raises RowError: there is none (with the first one's reason)."""
        column = self.config.rationale_column
        if column is not None and self._label_is_enough(row.split) and is_blank(row.columns.get(column)):
            return [Explained("", None, "data")]
        if column is not None:
            return [self._taken_apart(self._text(row, column), "data")]
        teacher = engines.teacher

        def explained(sample: Completion) -> Explained:
            # A completion model that runs on into the next question is cut off there, not here.
            text = sample.text if self._runs_on(sample.text) else checked_text(sample, self.config.refusals)
            return self._taken_apart(text, teacher.name, sample)

        return good_ones(await teacher.generate(self.teacher_messages(row)), explained)

    def _label_is_enough(self, split: Split) -> bool:
        """Whether rows of a split can do without a rationale: their label is the data's own."""
        if self.config.label_source != "gold" or split == "train":
            return False
        return split == "test" or self.config.mode != "single"

    def _runs_on(self, text: str) -> bool:
        return self.config.cut_at is not None and self.config.cut_at in text

    def _taken_apart(self, text: str, teacher: str, sample: Completion | None = None) -> Explained:
        """Rationale and label. Raises RowError: a label is needed and there is none, or there is no rationale."""
        if self.config.cut_at is not None:
            text = text.partition(self.config.cut_at)[0]
        rationale, marker, rest = text.strip().rpartition(self.config.marker)
        if not marker:
            rationale, rest = text.strip(), ""
        label = self._label(rest)
        if label is None and self.config.label_source == "teacher":
            what = f"nothing that recipe.label_pattern finds behind {self.config.marker!r}" if marker else "no marker"
            raise RowError(RejectReason.UNPARSABLE_ANSWER, f"{what} ({self.config.marker!r}) in: {show(text)}")
        rationale = rationale.strip()
        if not rationale and self.config.mode != "standard":
            raise RowError(RejectReason.UNPARSABLE_ANSWER, f"no rationale before the label in: {show(text)}")
        return Explained(rationale, label, teacher, sample)

    def _label(self, text: str) -> str | None:
        if self.config.label_pattern is not None:
            found = last_match(self.config.label_pattern, text)
            return found.strip() or None if found is not None else None
        return text.strip().removeprefix(":").strip().rstrip(".") or None

    # -- what the student learns -----------------------------------------------------------------------------------

    def _examples(self, row: Row, explained: Explained, gold: str | None) -> list[Example]:
        label = gold if self.config.label_source == "gold" else explained.label
        assert label is not None  # `_gold` and `_taken_apart` have seen to it
        answer = self._example(row, explained, "label", self.student_messages(row), label)
        answer.teacher_answer = explained.label
        if self.config.mode == "standard":
            return [answer]
        if self.config.mode == "single":
            answer.task, answer.completion = "answer", f"{explained.rationale} {self.config.marker} {label}".lstrip()
            return [answer]
        answer.weight = self.config.alpha
        if not explained.rationale:  # of a held-out row: `_label_is_enough`
            return [answer]
        prompt = self._prompt(self._rationale_prompt, row)
        rationale = self._example(row, explained, "rationale", prompt, explained.rationale)
        rationale.weight = 1.0 - self.config.alpha
        return [answer, rationale]

    def _example(self, row: Row, explained: Explained, task: str, messages: list[Message], completion: str) -> Example:
        sample = explained.sample
        return Example(
            row_id=row.row_id,
            split=row.split,
            messages=messages,
            completion=completion,
            task=task,
            finish_reason=sample.finish_reason if sample else "stop",
            teacher=explained.teacher,
            sample_index=sample.sample_index if sample else 0,
            reasoning=sample.reasoning if sample else None,
            reference=row.reference,
        )

    def _prompt(self, template: TextTemplate, row: Row) -> list[Message]:
        asked = template.render({**row.columns, "query": row.query})
        return [*row.history, {"role": "user", "content": asked}]

    def _gold(self, row: Row) -> str | None:
        """The data's own label. Raises RowError: it is needed and not there."""
        column = self.config.label_column
        if column is None or (self.config.label_source == "teacher" and row.columns.get(column) in (None, "")):
            return None
        value = row.columns.get(column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return self._text(row, column)

    def _text(self, row: Row, column: str) -> str:
        return text_column(row.columns, column, self._columns[column]).strip()
