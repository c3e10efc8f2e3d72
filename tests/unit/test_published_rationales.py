"""The rationale files that Distilling Step-by-Step published, and its generic format, read as they are.

They lie beside the project on some machines only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_ray.config import RunConfig, parse_config
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.recipe_figures import recipe_figures
from tests.unit.test_worker import run_worker

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT.parent / "shared" / "data" / "step_by_step"
pytestmark = pytest.mark.skipif(not PUBLISHED.exists(), reason="the paper's files are not beside the project")


def generated(config: RunConfig, run: Path) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, int]]:
    """Examples, reject counts, and how the teacher's labels compare with the data's."""
    folder = RunFolder(run)
    state = run_worker(config, folder).state()
    examples = [e for table in folder.read_tables("examples") for e in table.to_pylist()]
    return examples, state["rejects"], recipe_figures(config, folder)["labels"]


def test_palms_word_problems_with_the_shipped_config(tmp_path: Path) -> None:
    shipped = ROOT / "distill_ray" / "recipes" / "configs" / "rationales_from_file.yaml"
    config = parse_config(yaml.safe_load(shipped.read_text()), base=PUBLISHED)
    examples, rejects, labels = generated(config, tmp_path)
    assert sum(e["task"] == "label" for e in examples) + sum(rejects.values()) == 800
    assert rejects.get("unparsable_answer", 0) < 40  # answers that begin with the marker have no rationale
    assert not any("Q:" in e["completion"] or "The answer is" in e["completion"] for e in examples)
    first = {
        e["task"]: e["completion"] for e in examples if "Luke scored 84 points after" in e["messages"][0]["content"]
    }
    assert first == {
        "label": "( 84.0 / 2.0 )",
        "rationale": "Luke scored 84 points after 2 rounds. So he scored 84 points in 2 rounds. 84 / 2 = 42.",
    }
    assert labels["compared"] > 700
    assert labels["same_or_equal"] / labels["compared"] > 0.5
    assert labels["same"] == 0  # PaLM writes (84 / 2) where the data has ( 84.0 / 2.0 ): only the value can tell


def test_palms_commonsense_questions_with_the_config_of_the_docs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    [block] = [b for b in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "Answer Choices" in b]
    raw = yaml.safe_load(block)
    raw["data"]["source"] = "cqa_train_head2000.json"  # the first rows, to which the two files belong
    examples, rejects, labels = generated(parse_config(raw, base=PUBLISHED), tmp_path)
    assert sum(e["task"] == "label" for e in examples) + sum(rejects.values()) == 2000
    [first] = [
        e for e in examples if "10 apples on an apple tree" in e["messages"][0]["content"] and e["task"] == "label"
    ]
    assert first["messages"][0]["content"].endswith(
        "example of?\nAnswer Choices:\n(a) park\n(b) coloring book\n(c) garden center\n(d) math problem\n(e) gravity\n"
    )
    assert (first["completion"], first["teacher_answer"]) == ("math problem", "math problem")
    assert labels["compared"] > 1900
    assert labels["same"] / labels["compared"] > 0.5


def test_the_generic_format_is_read_as_it_is(tmp_path: Path) -> None:
    recipe = {"type": "step_by_step", "label_column": "label", "rationale_column": "rationale"}
    config = parse_config({"recipe": recipe, "data": {"source": "generic_train.json"}}, base=PUBLISHED)
    examples, rejects, labels = generated(config, tmp_path)
    assert rejects == {}
    assert len(examples) >= 2
    assert {e["task"] for e in examples} == {"label", "rationale"}
    assert all(e["completion"].startswith("Patient?") for e in examples if e["task"] == "label")
    assert (labels["compared"], labels["without_label"]) == (0, len(examples) // 2)  # it has rationales without labels
