"""Figures of a recipe's answers: by hand from lists, and from the files that a generation leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.recipe_figures import (
    ENTROPY_BIN_NATS,
    Chain,
    figure_lines,
    label_figures,
    recipe_figures,
    revision_figures,
    soft_target_figures,
)
from distill_ray.pipeline.reporting.report import write_report
from distill_ray.records import (
    ROW_SCHEMA,
    Example,
    Message,
    Reject,
    RejectReason,
    examples_table,
    rejects_table,
)

QUERY: list[Message] = [{"role": "user", "content": "q"}]


def config(recipe: dict[str, Any], **sampling: Any) -> RunConfig:
    teacher = {"type": "vllm", "model": "demo", "sampling": sampling}
    return parse_config({"recipe": recipe, "data": {"source": "q.jsonl"}, "teacher": teacher})


CRITIQUE = {"type": "self_critique", "reward": {"type": "length"}}


def test_rewards_before_and_after_are_of_all_scored_chains_accepted_or_not() -> None:
    figures = revision_figures([Chain(True, 1.0, 5.0), Chain(True, 2.0, 6.0), Chain(False, 3.0, 1.0)])
    assert (figures["chains"], figures["accepted"], figures["scored"]) == (3, 2, 3)
    assert figures["reward_before"] == pytest.approx(
        {"mean": 2.0, "min": 1.0, "p10": 1.2, "p25": 1.5, "p50": 2.0, "p75": 2.5, "p90": 2.8, "max": 3.0}
    )
    assert figures["reward_after"]["mean"] == pytest.approx(4.0)
    assert figure_lines({"revisions": figures}) == ["revisions: 2 of 3 (67 %) accepted; mean reward 2 before, 4 after"]


def test_chains_without_a_reward_are_counted_and_have_no_distribution() -> None:
    figures = revision_figures([Chain(True, None, None)])
    assert (figures["chains"], figures["scored"], figures["reward_before"]) == (1, 0, None)
    assert figure_lines({"revisions": figures}) == ["revisions: 1 of 1 (100 %) accepted"]
    assert figure_lines({"revisions": revision_figures([])}) == ["revisions: 0 of 0 accepted"]


def test_chains_are_read_from_examples_and_rejects_and_other_rejects_are_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    learnt = Example("a", "train", QUERY, "new", draft="old", accepted=True, reward_before=1.0, reward_after=3.0)
    held_out = Example("b", "test", QUERY, "new", draft="old", accepted=False, reward_before=2.0, reward_after=2.0)
    row = {"reward_before": 4.0, "reward_after": 1.0}
    rejects = [
        Reject("c", "generate", RejectReason.NOT_ACCEPTED, "", row),
        Reject("d", "generate", RejectReason.EMPTY_ANSWER, "", {"reward_before": "the user's own column"}),
    ]
    folder.write_table(examples_table([learnt]), "examples", "00000.parquet")
    folder.write_table(examples_table([held_out]), "examples", "00001.parquet")
    folder.write_table(rejects_table(rejects), "rejects", "00000.parquet")
    figures = recipe_figures(config(CRITIQUE), folder)["revisions"]
    assert (figures["chains"], figures["accepted"], figures["scored"]) == (3, 1, 3)
    assert figures["reward_before"]["mean"] == pytest.approx(7 / 3)
    assert figures["reward_after"]["max"] == 3.0


def test_labels_are_compared_where_both_are_there() -> None:
    pairs = [("42", "42"), ("(84 / 2)", "( 84.0 / 2.0 )"), ("cat", "dog"), (None, "dog"), ("cat", None)]
    figures = label_figures(pairs)
    assert figures == {"compared": 3, "same": 1, "same_or_equal": 2, "without_label": 1}
    assert figure_lines({"labels": figures}) == [
        "labels: 1 of 3 (33 %) of the teacher's are the data's own, 2 of 3 (67 %) with equations that come to the same"
        "; answers without a label: 1"
    ]
    assert figure_lines({"labels": label_figures([(None, "dog")])}) == [
        "labels: none of the teacher's to hold against the data's own; answers without a label: 1"
    ]


def test_gold_labels_are_the_rows_own_whichever_label_is_learnt(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    gold = {"a": "1", "b": 2, "c": None, "d": "4"}
    rows = [{"row_id": name, "columns": json.dumps({"input": "q", "label": label})} for name, label in gold.items()]
    folder.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), "rows", "00000.parquet")
    examples = [
        Example("a", "train", QUERY, "1", task="label", teacher_answer="1"),
        Example("a", "train", QUERY, "because", task="rationale"),
        Example("b", "train", QUERY, "3", task="label", teacher_answer="3"),
        Example("c", "train", QUERY, "5", task="label", teacher_answer="5"),  # the data has none to hold it against
    ]
    folder.write_table(examples_table(examples), "examples", "00000.parquet")
    recipe = {"type": "step_by_step", "label_column": "label", "label_source": "teacher"}
    assert recipe_figures(config(recipe), folder) == {
        "labels": {"compared": 2, "same": 1, "same_or_equal": 1, "without_label": 0}
    }
    assert recipe_figures(config({**recipe, "label_column": None}), folder) == {}


def test_held_out_rows_without_a_rationale_are_no_answers_without_a_label(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    why = {"a": "because", "b": None, "c": " "}
    rows = [{"row_id": name, "columns": json.dumps({"why": text, "label": "1"})} for name, text in why.items()]
    folder.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), "rows", "00000.parquet")
    examples = [Example(name, "test", QUERY, "1", task="label") for name in why]
    folder.write_table(examples_table(examples), "examples", "00000.parquet")
    recipe = {"type": "step_by_step", "label_column": "label", "rationale_column": "why"}
    assert recipe_figures(config(recipe), folder)["labels"]["without_label"] == 1


def test_mass_and_entropy_are_those_of_the_top_k_and_a_bucket() -> None:
    first = np.log(np.array([[0.5, 0.25], [1.0, 0.0]], dtype=np.float32), where=[[True, True], [True, False]])
    first[1, 1] = -np.inf  # a place of the k that is not used
    figures = soft_target_figures([(1, first), (0, np.log(np.array([[0.9, 0.1]], dtype=np.float32)))])
    entropies = [1.5 * np.log(2), 0.0, -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))]
    assert (figures["tokens"], figures["k"], figures["examples_without"]) == (3, 2, 1)
    assert figures["mass"] == pytest.approx(2.75 / 3, abs=1e-6)
    assert figures["entropy_nats"] == pytest.approx(sum(entropies) / 3, abs=1e-5)
    counted, _ = np.histogram(entropies, bins=np.arange(len(figures["entropy_counts"]) + 1) * ENTROPY_BIN_NATS)
    assert figures["entropy_counts"] == counted.tolist()
    [line] = figure_lines({"soft_targets": figures})
    assert line.startswith("soft targets: 3 tokens, k 2 with 91.67 % of the probability; mean entropy ")
    assert line.endswith("; examples without: 1")


def test_soft_targets_are_read_from_the_examples_also_where_there_are_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    targets = np.log(np.full((3, 2), 0.25, dtype=np.float32))
    examples = [
        Example("a", "train", QUERY, "x", topk_ids=np.zeros((3, 2), np.int32), topk_logprobs=targets),
        Example("b", "train", QUERY, "y"),
    ]
    folder.write_table(examples_table(examples), "examples", "00000.parquet")
    folder.write_table(examples_table([examples[1]]), "examples", "00001.parquet")
    folder.write_table(examples_table([]), "examples", "00002.parquet")
    recipe = {"type": "context", "context": {"text": "."}}
    figures = recipe_figures(config(recipe, top_logprobs=2), folder)["soft_targets"]
    assert (figures["tokens"], figures["k"], figures["examples_without"]) == (3, 2, 2)
    assert figures["mass"] == pytest.approx(0.5)
    assert recipe_figures(config(recipe), folder) == {}
    nothing = soft_target_figures([(2, np.zeros((0, 0), np.float32))])
    assert figure_lines({"soft_targets": nothing}) == ["soft targets: none; examples without: 2"]
    assert json.loads(json.dumps(nothing, allow_nan=False))["mass"] is None


def test_the_report_has_a_section_with_the_distribution(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    revisions = revision_figures([Chain(True, -1.0, 0.5), Chain(False, 0.0, -0.5)])
    folder.write_json(
        {"recipe_figures": {"revisions": revisions, "labels": label_figures([("1", "1")])}}, "manifest.json"
    )
    write_report(folder, config(CRITIQUE))
    report = folder.read_bytes("report.md").decode()
    section = report.partition("## What the teacher gave\n\n")[2].partition("\n\n## ")[0]
    assert "Revisions: 1 of 2 (50 %) accepted; mean reward -0.5 before, 0 after." in section
    assert "Labels: 1 of 1 (100 %) of the teacher's are the data's own." in section
    assert "|  | mean | min | 10 % | 25 % | 50 % | 75 % | 90 % | max |" in section
    assert "| reward before | -0.5 | -1 | -0.9 | -0.75 | -0.5 | -0.25 | -0.1 | 0 |" in section
    assert "Over all 2 scored chains, accepted or not." in section


def test_a_recipe_without_such_figures_has_no_section(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json({"recipe_figures": {}}, "manifest.json")
    write_report(folder, config({"type": "context", "context": {"text": "."}}))
    assert "What the teacher gave" not in folder.read_bytes("report.md").decode()
