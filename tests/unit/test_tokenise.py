"""Examples to tokens: which soft targets belong to the text, and what becomes of those that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill_ray.config import parse_config
from distill_ray.config.train import StudentConfig
from distill_ray.errors import TrainingError
from distill_ray.models import ChatTokenizer
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.training.tokenise import Limits, tokenise, tokenise_partition
from distill_ray.pipeline.training.train import _require_examples
from distill_ray.records import Example, examples_table

LIMITS = Limits(longest=100, topk=2)


def example(row_id: str, text: str, ids: list[int] | None) -> Example:
    found = Example(row_id, "train", [{"role": "user", "content": "q"}], text, completion_ids=ids)
    if ids is not None:
        found.topk_ids = np.array([[i, i] for i in ids], dtype=np.int32)
        found.topk_logprobs = np.log(np.full((len(ids), 2), 0.5, dtype=np.float32))
    return found


@pytest.fixture
def student(tiny_model: Path) -> StudentConfig:
    return StudentConfig(model=str(tiny_model))


def test_ids_that_spell_another_text_in_the_students_tokenizer_are_rejects(
    student: StudentConfig, tmp_path: Path
) -> None:
    chat = ChatTokenizer(student.model)
    right = chat.completion_ids("fr")
    examples = [
        example("right", "fr", right),
        example("accented", "caf\u00e9", chat.completion_ids("caf\u00e9")),
        example("behind a stop string", "fr", chat.completion_ids("fr\nQ:")),
        example("another vocabulary", "fr", [i + 1 for i in right]),
        example("a larger one", "fr", [100_000, 100_001]),
        example("reasoning in front", "fr", chat.completion_ids("it is french: fr")),
        example("none", "fr", None),
    ]
    folder = RunFolder(tmp_path)
    folder.write_table(examples_table(examples), "examples", "00000.parquet")
    kept, rejects = tokenise_partition(student, folder, "00000.parquet", LIMITS)
    assert {e.row_id for e in kept["train"]} == {"right", "accented", "behind a stop string"}
    learnt = {e.row_id: e.completion_ids for e in kept["train"]}
    assert learnt["behind a stop string"] == learnt["right"] == right  # and what it is not to say is not learnt
    assert all(len(e.topk_ids) == len(e.topk_logprobs) == len(e.completion_ids) for e in kept["train"])
    assert {r.row_id: (r.reason.value, "another text" in r.detail) for r in rejects} == {
        "another vocabulary": ("no_soft_targets", True),
        "a larger one": ("no_soft_targets", True),
        "reasoning in front": ("no_soft_targets", True),
        "none": ("no_soft_targets", False),
    }


def test_nothing_to_train_on_says_why(student: StudentConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_table(examples_table([example("none", "fr", None)]), "examples", "00000.parquet")
    config = parse_config(
        {
            "recipe": {"context": {"text": "-"}},
            "data": {"source": "-"},
            "teacher": {"type": "fake"},
            "student": student.model_dump(),
        }
    )
    with pytest.raises(TrainingError, match="all 1 examples are rejected, the first one as no_soft_targets: the teac"):
        _require_examples(config, folder, tokenise(student, folder, LIMITS))
