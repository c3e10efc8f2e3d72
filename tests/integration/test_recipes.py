"""Each recipe from rows to a trained and evaluated student, with real engines, rewards and DeepSpeed.

`context` has test_demo.py. Not covered here: models of a size that learns these tasks well; docs/results.md has that.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill_ray.config import ParseConfig, RunConfig, parse_config
from distill_ray.demo import INSTRUCTION_PATH, film_rows, language_rows, problem_rows
from distill_ray.demo.arithmetic import INSTRUCTION
from distill_ray.demo.reviews import CRITIQUE_PROMPT, REVISE_PROMPT
from distill_ray.models import prompts_of
from distill_ray.pipeline.evaluate import evaluate
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generate
from distill_ray.pipeline.run import run
from distill_ray.pipeline.training.train import train
from distill_ray.records import PREFERENCE_SCHEMA

pytestmark = pytest.mark.usefixtures("local_ray")

TRAIN = {"max_tokens_per_batch": 1024, "cpus_per_worker": 0.5, "threads_per_worker": 1, "learning_rate": 1e-3}
EVALUATE = {"engine": "hf", "max_tokens": 48, "max_rows": 20}


def config_of(folder: Path, rows: list[dict[str, str]], **sections: Mapping[str, Any]) -> RunConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "rows.jsonl", "id": "id", "holdout": 0.3, **sections.pop("data", {})}
    return parse_config({"data": data, "evaluate": EVALUATE, **sections}, base=folder)


def examples(folder: RunFolder) -> list[dict[str, Any]]:
    return [record for table in folder.read_tables("examples") for record in table.to_pylist()]


@pytest.mark.slow
def test_self_critique_learns_the_revisions_that_a_real_classifier_likes_better(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        film_rows(60),
        recipe={
            "type": "self_critique",
            "query": "Write a short review of the film {{ film }}.",
            "critique_request": CRITIQUE_PROMPT,
            "revision_request": REVISE_PROMPT,
            "reward": {
                "type": "classifier",
                "model": "demo-sentiment",
                "labels": {"negative": -1.0, "positive": 1.0},
                "cpus": 0.5,
            },
            "preference_pairs": True,
        },
        teacher={"type": "vllm", "model": "demo", "cpus": 0.5, "sampling": {"temperature": 0.7, "max_tokens": 80}},
        train={**TRAIN, "max_steps": 8},
    )
    folder = RunFolder(tmp_path / "run")
    metrics = run(config, folder)
    manifest = folder.manifest()
    assert manifest["rows_in"] == manifest["rows_with_examples"] + manifest["rows_rejected"] == 60
    assert manifest["teacher_calls"] == 3 * 60  # draft, critique, revision
    learnt = [e for e in examples(folder) if e["split"] != "test"]
    assert len(learnt) > 10
    assert all(e["reward_after"] > e["reward_before"] for e in learnt)
    assert all(e["draft"] != e["completion"] and len(e["messages"]) == 1 for e in learnt)

    rejects = [record for table in folder.read_tables("rejects") for record in table.to_pylist()]
    for reject in rejects:
        row = json.loads(reject["row"])
        assert reject["reason"] == "not_accepted"
        assert row["reward_after"] <= row["reward_before"]
        assert row["draft"]
        assert row["revision"]

    pairs = [record for table in folder.read_tables("preferences") for record in table.to_pylist()]
    assert {pair["row_id"] for pair in pairs} == {e["row_id"] for e in learnt}
    assert list(pairs[0]) == PREFERENCE_SCHEMA.names

    reward = metrics["reward"]
    assert reward["draft"]["mean"] < reward["teacher"]["mean"]
    assert {"student_before", "student_after"} <= reward.keys()
    assert "reward of its draft" in folder.read_bytes("report.md").decode()

    again = generate(config, folder)
    assert again.teacher_calls == 0


@pytest.mark.slow
def test_step_by_step_trains_a_t5_on_two_tasks_with_the_papers_loss(tmp_path: Path, tiny_t5: Path) -> None:
    alpha = 0.3
    student = without_dropout(tiny_t5, tmp_path / "t5")  # else the first loss is not the formula's
    config = config_of(
        tmp_path,
        problem_rows(60),
        recipe={
            "type": "step_by_step",
            "query": "{{ question }}",
            "instruction": INSTRUCTION,
            "label_column": "label",
            "alpha": alpha,
        },
        teacher={"type": "hf", "model": "demo", "cpus": 0.5, "sampling": {"temperature": 0.0, "max_tokens": 120}},
        student={"model": str(student)},
        # All of it in one step, so that the first loss can be held against the formula.
        train={**TRAIN, "workers": 2, "max_tokens_per_batch": 60_000, "max_steps": 2, "max_length": 1024},
        evaluate={**EVALUATE, "reference": "label", "metrics": ["exact_match", "equation", "loss"]},
        generate={"max_reject_frac": 0.5},
    )
    folder = RunFolder(tmp_path / "run")
    generate(config, folder)
    train(config, folder)
    found = [e for e in examples(folder) if e["split"] == "train"]
    assert {e["task"] for e in found} == {"label", "rationale"}
    expected = paper_loss(config, found, alpha)
    [first, *_] = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines() if b'"loss"' in line]
    assert first["loss"] == pytest.approx(expected, abs=1e-5)

    metrics = evaluate(config, folder)
    assert metrics["teacher"]["equation"] > 0.5  # the demo model really solves some
    assert metrics["teacher"]["equation"] >= metrics["teacher"]["exact_match"]
    assert metrics["completion_tokens"]["with_rationale"] > metrics["completion_tokens"]["answer"]
    assert "equation comes to the same" in folder.read_bytes("report.md").decode()


def without_dropout(model: Path, copy: Path) -> Path:
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    return copy


def paper_loss(config: RunConfig, found: list[dict[str, Any]], alpha: float) -> float:
    """alpha x mean token loss of the labels + (1 - alpha) x that of the rationales, by plain transformers."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(config.student.model).eval()
    prompts = prompts_of(config.student, key="student.model")
    sums = {"label": [0.0, 0], "rationale": [0.0, 0]}
    with torch.no_grad():
        for example in found:
            ids = torch.tensor([prompts.prompt_ids(example["messages"])])
            labels = torch.tensor([prompts.completion_ids(example["completion"])])
            loss = model(input_ids=ids, labels=labels).loss.item()
            sums[example["task"]][0] += loss * labels.shape[1]
            sums[example["task"]][1] += labels.shape[1]
    means = {task: total / count for task, (total, count) in sums.items()}
    return alpha * means["label"] + (1 - alpha) * means["rationale"]


@pytest.mark.slow
def test_soft_targets_are_captured_scored_and_trained_on(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        language_rows(40, seed=3),
        recipe={
            "type": "context",
            "context": {"file": str(INSTRUCTION_PATH)},
            "parse": {"regex": r"(?s)(.+)"},
        },
        teacher={
            "type": "vllm",
            "model": "demo",
            "cpus": 0.5,
            "sampling": {"temperature": 0.0, "max_tokens": 60, "top_logprobs": 8},
        },
        train={**TRAIN, "max_steps": 6, "max_tokens_per_batch": 60_000, "loss": {"type": "topk_kl"}, "warmup_ratio": 0},
    )
    folder = RunFolder(tmp_path / "run")
    first = generate(config, folder)
    found = [e for e in examples(folder) if e["split"] == "train" and e["topk_ids"]]
    assert len(found) > 10
    for example in found:
        ids, logprobs = np.array(example["topk_ids"]), np.array(example["topk_logprobs"])
        assert ids.shape == logprobs.shape == (len(example["completion_ids"]), 8)
        assert (np.exp(logprobs).sum(1) <= 1 + 1e-4).all()
    of_the_result = config.model_copy(
        update={"recipe": config.recipe.model_copy(update={"parse": ParseConfig(regex=r"Final Answer: (\w+)")})}
    )
    generate(of_the_result, RunFolder(tmp_path / "result"), limit=8)
    results = examples(RunFolder(tmp_path / "result"))
    assert results
    assert all(len(e["completion"]) == 2 and e["topk_ids"] is None for e in results)  # it reasons first
    train(config, folder)
    losses = [json.loads(line)["loss"] for line in folder.read_bytes("metrics.jsonl").splitlines() if b'"loss"' in line]
    assert losses[0] == pytest.approx(dense_kl(config, found), rel=1e-3)
    assert losses[-1] < losses[0]
    assert first.teacher_calls == 2 * first.rows_with_examples + first.rows_rejected  # generated, and scored


def dense_kl(config: RunConfig, found: list[dict[str, Any]]) -> float:
    """Mean KL per token from the teacher's nine outcomes to the student's, by numpy in double precision."""
    from transformers import AutoModelForCausalLM

    prompts = prompts_of(config.student, key="student.model")
    model = AutoModelForCausalLM.from_pretrained(prompts.tokenizer.name_or_path, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in found:
            prompt = prompts.prompt_ids(example["messages"])
            ids = torch.tensor([prompt + example["completion_ids"]])
            logprobs = F.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)[len(prompt) - 1 : -1].numpy()
            for t, (tokens, values) in enumerate(zip(example["topk_ids"], example["topk_logprobs"], strict=True)):
                p = np.exp(np.array(values, dtype=np.float64))
                q = np.exp(logprobs[t][tokens])
                p, q = np.append(p, max(1 - p.sum(), 1e-7)), np.append(q, max(1 - q.sum(), 1e-7))
                total += float((p * np.log(p / q)).sum())
                count += 1
    assert math.isfinite(total)
    return total / count
