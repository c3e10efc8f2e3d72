"""What the recipes gain on models this small: several training seeds of each variant, mean and spread.

    python benchmarks/recipes.py self_critique --work runs/recipes      # accept: improve against accept: always
    python benchmarks/recipes.py step_by_step --work runs/recipes       # mode: task_prefix against mode: standard
    python benchmarks/recipes.py soft_targets --work runs/recipes       # topk_kl against cross_entropy
    python benchmarks/recipes.py svamp --work runs/recipes --data DIR   # published rationales, a T5 from scratch

A trial is a whole run (generate, train, evaluate) in a folder of its own below --work. The teacher is asked once for
each experiment: trials start from a copy of its answers, and get theirs out of its ledger. A trial whose metrics are
there is not repeated, so a stopped command goes on where it was; --minutes stops it, --only picks trials by name.

What is held equal between variants: the rows, the optimizer steps and the rows a step. A step's size is given in
tokens, so a variant with two examples a row gets a larger one; what came of it is the column "rows a step". Nothing is
chosen by validation: the weights of the last step are evaluated. Spread is the standard deviation over seeds (data
order; for the T5 also its first weights). Answers are greedy, by plain transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill_ray.config import RunConfig, parse_config
from distill_ray.demo import INSTRUCTION_PATH, film_rows, language_rows, problem_rows
from distill_ray.demo.arithmetic import INSTRUCTION
from distill_ray.demo.reviews import CRITIQUE_PROMPT, REVISE_PROMPT
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generate, generated_with
from distill_ray.pipeline.metrics import exact_match
from distill_ray.pipeline.run import run, stage

Figures = dict[str, float]

TRAIN: dict[str, Any] = {
    "epochs": 10_000,  # max_steps ends the training
    "learning_rate": 5e-4,
    "threads_per_worker": 1,
    "precision": "fp32",
    "tensorboard": False,
}
EVALUATE: dict[str, Any] = {"engine": "hf", "bootstrap": 100}
FINAL_ANSWER = r"Final Answer: (\w+)"


@dataclass(frozen=True)
class Trial:
    """One run: the row of the table that it belongs to, its seed, its config."""

    variant: tuple[str, ...]
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join([*self.variant, f"seed{self.seed}"]).replace(" ", "_")


@dataclass(frozen=True)
class Experiment:
    """Trials, and what is shown of each."""

    keys: tuple[str, ...]  # what the parts of a variant are
    trials: list[Trial]
    figures: Callable[[Trial, RunFolder], Figures]
    tables: tuple[tuple[str, ...], ...]  # names of figures, one tuple a table


# -- the experiments -------------------------------------------------------------------------------------------------


def self_critique(work: Path, seeds: Sequence[int], data: Path | None) -> Experiment:
    """Film reviews by the demo model, made kinder; its sentiment classifier is the reward (0 negative, 1 positive).

    At the higher temperature revisions go wrong too, so that there is something for `accept` to refuse.
    """
    rows = film_rows(400)
    sources = write_sources(work, rows[:300], rows[300:])
    recipe = {
        "type": "self_critique",
        "query": "Write a short review of the film {{ film }}.",
        "critique_request": CRITIQUE_PROMPT,
        "revision_request": REVISE_PROMPT,
        "reward": {"type": "classifier", "model": "demo-sentiment", "labels": {"negative": 0.0, "positive": 1.0}},
    }
    trials = [
        Trial(
            (temperature, accept),
            seed,
            parse_config(
                {
                    "recipe": {**recipe, "accept": {"type": accept}},
                    "data": sources,
                    # transformers, because vLLM draws by the seed alone: all drafts would be much the same.
                    "teacher": {
                        "type": "hf",
                        "model": "demo",
                        "gpus": 0,
                        "sampling": {"temperature": float(temperature), "max_tokens": 80},
                    },
                    "train": {**TRAIN, **steps(60), "max_tokens_per_batch": 1024, "seed": seed},
                    "evaluate": {**EVALUATE, "metrics": ["exact_match", "reward"]},
                    "generate": {"max_reject_frac": 0.5},
                }
            ),
        )
        for temperature in ("0.8", "1.4")
        for accept in ("improve", "always")
        for seed in seeds
    ]
    return Experiment(
        ("temperature", "accept"),
        trials,
        self_critique_figures,
        (
            ("chains", "accepted", "draft", "revision", "accepted: draft", "accepted: revision"),
            ("held-out: draft", "held-out: revision", "student before", "student after", "student after - draft"),
        ),
    )


def self_critique_figures(trial: Trial, folder: RunFolder) -> Figures:
    """Rewards of what was generated for training, and of the held-out answers."""
    accepted = [
        (record["reward_before"], record["reward_after"])
        for record in records(folder, "examples", ["split", "reward_before", "reward_after"])
        if record["split"] == "train"
    ]
    refused = [
        (row["reward_before"], row["reward_after"])
        for record in records(folder, "rejects", ["reason", "row"])
        if record["reason"] == "not_accepted" and (row := json.loads(record["row"]))
    ]
    reward = folder.read_json("eval", "metrics.json")["reward"]
    means = {who: reward[who]["mean"] for who in ("draft", "teacher", "student_before", "student_after")}
    return {
        "chains": len(accepted) + len(refused),
        "accepted": len(accepted) / len(accepted + refused),
        "draft": statistics.mean(before for before, _ in accepted + refused),
        "revision": statistics.mean(after for _, after in accepted + refused),
        "accepted: draft": statistics.mean(before for before, _ in accepted),
        "accepted: revision": statistics.mean(after for _, after in accepted),
        "held-out: draft": means["draft"],
        "held-out: revision": means["teacher"],
        "student before": means["student_before"],
        "student after": means["student_after"],
        "student after - draft": means["student_after"] - means["draft"],
    }


def step_by_step(work: Path, seeds: Sequence[int], data: Path | None) -> Experiment:
    """Arithmetic problems: gold labels, rationales of the demo model; the student is the demo model."""
    held_out = [{**row, "id": f"held-out-{row['id']}"} for row in problem_rows(300, held_out=True)]
    sources = write_sources(work, problem_rows(1200), held_out)
    recipe = {
        "type": "step_by_step",
        "query": "{{ question }}",
        "instruction": INSTRUCTION,
        "label_column": "label",
    }
    teacher = {"type": "hf", "model": "demo", "gpus": 0, "sampling": {"temperature": 0.0, "max_tokens": 120}}
    trials = [
        Trial(
            (share, mode),
            seed,
            parse_config(
                {
                    "recipe": {**recipe, "mode": mode},
                    "data": {**sources, "subsample": float(share)},
                    "teacher": teacher,
                    "train": {**TRAIN, **steps(120), "max_tokens_per_batch": tokens, "seed": seed},
                    "evaluate": {
                        **EVALUATE,
                        "max_tokens": 32,
                        "reference": "label",
                        "metrics": ["exact_match", "equation"],
                    },
                    "generate": {"max_reject_frac": 0.5},
                }
            ),
        )
        for share in ("0.25", "0.5", "1.0")
        for mode, tokens in (("standard", 768), ("task_prefix", 2048))
        for seed in seeds
    ]
    return Experiment(
        ("share of 1,200 rows", "mode"),
        trials,
        equation_figures,
        (("rows", "rows a step", "exact match", "equation", "teacher's equation"),),
    )


def svamp(work: Path, seeds: Sequence[int], data: Path | None) -> Experiment:
    """SVAMP with the paper's PaLM rationales; the student is a T5 that begins with random weights."""
    if data is None:
        raise SystemExit("svamp: --data names the folder with svamp_train.json and svamp_palm_train_CoT_*.json")
    source = data / "svamp_train.json"
    rationales = [data / "svamp_palm_train_CoT_0.json", data / "svamp_palm_train_CoT_1.json"]
    texts = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    inputs = [text for row in map(json.loads, texts) for text in (row["input"], row["label"])]
    answers = [answer.partition("\nQ:")[0] for file in rationales for answer in json.loads(file.read_text("utf-8"))]
    recipe = {
        "type": "step_by_step",
        "query": "{{ input }}",
        "label_column": "label",
        "rationale_column": "answer",
    }
    trials = []
    for mode, tokens in (("standard", 1024), ("task_prefix", 3344)):
        for seed in seeds:
            student = new_t5(work / f"t5-{seed}", [*inputs, *answers], seed)
            config = parse_config(
                {
                    "recipe": {**recipe, "mode": mode},
                    "data": {
                        "source": str(source),
                        "alongside": {"answer": [str(file) for file in rationales]},
                        "holdout": 0.2,
                        "validation_holdout": 0.0,
                    },
                    "student": {"model": str(student)},
                    "train": {
                        **TRAIN,
                        **steps(400),
                        "learning_rate": 1e-3,
                        "max_tokens_per_batch": tokens,
                        "max_length": 512,
                        "seed": seed,
                    },
                    "evaluate": {
                        **EVALUATE,
                        "max_tokens": 40,
                        "reference": "label",
                        "metrics": ["exact_match", "equation"],
                    },
                    "generate": {"max_reject_frac": 0.5},
                }
            )
            trials.append(Trial((mode,), seed, config))
    return Experiment(
        ("mode",),
        trials,
        equation_figures,
        (("rows", "rows a step", "last loss", "exact match", "equation", "teacher's equation"),),
    )


def equation_figures(trial: Trial, folder: RunFolder) -> Figures:
    """Accuracy on the held-out rows, and what was trained on."""
    metrics = folder.read_json("eval", "metrics.json")
    return {
        **training_figures(folder),
        "exact match": metrics["student_after"]["exact_match"],
        "equation": metrics["student_after"]["equation"],
        # Of `standard`, which learns gold labels only and asks nobody, there is none.
        "teacher's equation": metrics["teacher"]["equation"] if metrics["teacher"] else math.nan,
    }


def soft_targets(work: Path, seeds: Sequence[int], data: Path | None) -> Experiment:
    """The demo's language task: the instruction distilled with hard and with soft targets.

    `whole` learns the teacher's answer with its line of reasoning, whose probabilities come in the pass that said it;
    `label` what `recipe.parse` leaves of it, which the teacher scores as if it had said nothing else.
    """
    sources = write_sources(work, language_rows(1000), language_rows(400, held_out=True))
    losses: dict[str, dict[str, Any]] = {"cross_entropy": {"type": "cross_entropy"}, "topk_kl": {"type": "topk_kl"}}
    trials = [
        Trial(
            (learns, share, loss),
            seed,
            parse_config(
                {
                    "recipe": {
                        "type": "context",
                        "context": {"file": str(INSTRUCTION_PATH)},
                        "parse": {"regex": FINAL_ANSWER} if learns == "label" else None,
                    },
                    "data": {**sources, "subsample": float(share)},
                    "teacher": {
                        "type": "vllm",
                        "model": "demo",
                        "gpus": 0,
                        "engine_kwargs": {"max_model_len": 1024, "dtype": "float32"},
                        "sampling": {"temperature": 0.15, "max_tokens": 64, "top_logprobs": 20},
                    },
                    "train": {**TRAIN, **steps(100), "loss": losses[loss], "max_tokens_per_batch": 768, "seed": seed},
                    "evaluate": {
                        **EVALUATE,
                        "max_tokens": 64,
                        "reference": "label",
                        "metrics": ["exact_match", "agreement"],
                    },
                    "generate": {"max_reject_frac": 0.5},
                }
            ),
        )
        for learns, shares in (("whole", ("0.25", "0.5", "1.0")), ("label", ("1.0",)))
        for share in shares
        for loss in losses
        for seed in seeds
    ]
    return Experiment(
        ("learns", "share of 1,000 rows", "loss"),
        trials,
        soft_target_figures,
        (("rows", "rows a step", "accuracy", "same label", "same answer", "teacher's accuracy"),),
    )


def soft_target_figures(trial: Trial, folder: RunFolder) -> Figures:
    """Accuracy of the label that the answer ends in, and agreement with the teacher in the label and in all of it."""
    names = ["reference", "teacher_answer", "student_after"]
    rows = folder.read_table("eval", "predictions.parquet", columns=names).to_pylist()
    find = label_of if trial.variant[0] == "whole" else str.strip
    labels = [(row["reference"], find(row["teacher_answer"]), find(row["student_after"])) for row in rows]
    return {
        **training_figures(folder),
        "accuracy": statistics.mean(float(gold == student) for gold, _, student in labels),
        "same label": statistics.mean(float(teacher == student) for _, teacher, student in labels),
        "same answer": statistics.mean(exact_match(row["student_after"], row["teacher_answer"]) for row in rows),
        "teacher's accuracy": statistics.mean(float(gold == teacher) for gold, teacher, _ in labels),
    }


def label_of(answer: str) -> str:
    """The label that an answer ends in, or something that is none."""
    found = re.findall(FINAL_ANSWER, answer)
    return found[-1] if found else "(none)"


EXPERIMENTS: dict[str, Callable[[Path, Sequence[int], Path | None], Experiment]] = {
    "self_critique": self_critique,
    "step_by_step": step_by_step,
    "soft_targets": soft_targets,
    "svamp": svamp,
}


# -- parts that they share -------------------------------------------------------------------------------------------


def steps(number: int) -> dict[str, int]:
    """So many optimizer steps, and one checkpoint, at their end."""
    return {"max_steps": number, "validate_every": number}


def write_sources(work: Path, train: list[dict[str, str]], test: list[dict[str, str]]) -> dict[str, Any]:
    """Write the rows, and return the `data:` that names them. An equal file is left alone."""
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = work / f"{name}.jsonl"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return {
        "source": str(work / "train.jsonl"),
        "test": str(work / "test.jsonl"),
        "id": "id",
        "validation_holdout": 0.0,
    }


def new_t5(folder: Path, texts: Sequence[str], seed: int) -> Path:
    """Write a T5 with random weights (2 + 2 layers, width 128) and a tokenizer trained on `texts`, and return it."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "dropout_rate": 0.0}
    settings |= {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=tokenizer.get_vocab_size(), **settings)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def records(folder: RunFolder, name: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The records of a run's Parquet files."""
    for table in folder.read_tables(name, columns=columns):
        yield from table.to_pylist()


def training_figures(folder: RunFolder) -> Figures:
    """Rows that were trained on, how many of them a step held in the mean, and the loss of the last ten steps."""
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    taken = [line for line in lines if "loss" in line]
    rows = {r["row_id"] for r in records(folder, "examples", ["row_id", "split"]) if r["split"] == "train"}
    [tokens] = [name for name in folder.list("train") if name.startswith("tokens-")]
    an_epoch = folder.read_json("train", tokens, "summary.json")["num_tokens"]["train"]
    return {
        "rows": len(rows),
        "rows a step": statistics.mean(line["tokens"] for line in taken) * len(rows) / an_epoch,
        "last loss": statistics.mean(line["loss"] for line in taken[-10:]),
    }


def asks_most(trials: Sequence[Trial], trial: Trial) -> RunConfig:
    """Of the trials with this one's teacher the one whose calls hold those of the others: all rows, last variant."""
    same = [other.config for other in reversed(trials) if other.config.teacher == trial.config.teacher]
    return max(same, key=lambda config: config.data.subsample)


def run_trial(trial: Trial, work: Path, first: RunConfig) -> None:
    """Run what is not done yet of a trial, from answers that trials with the same rows, recipe and teacher share."""
    folder = RunFolder(work / trial.name)
    if not folder.exists() and trial.config.recipe.asks_teacher:
        copy(answers(trial.config, work, first), folder)
    run(trial.config, folder)


def answers(config: RunConfig, work: Path, first: RunConfig) -> RunFolder:
    """A folder in which the examples of `config` are generated, with the calls of `first` in its ledger."""
    made_with = generated_with(config)
    folder = RunFolder(work / f"answers-{made_with[:12]}")
    if not folder.exists() and made_with != generated_with(first):
        copy(answers(first, work, first), folder)
    if folder.manifest().get("generated_with") != made_with or not folder.manifest()["generation_complete"]:
        with stage(config, folder):
            generate(config, folder)
    return folder


def copy(source: RunFolder, target: RunFolder) -> None:
    """Copy a run folder; the copy appears whole or not at all."""
    aside = target.local().with_name(f".tmp-{target.local().name}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source.root, aside)
    aside.rename(target.root)


def table(experiment: Experiment, found: Mapping[tuple[str, ...], Sequence[Figures]], names: Sequence[str]) -> str:
    """Markdown: a row per variant, mean and standard deviation over the seeds."""
    lines = [[*experiment.keys, "seeds", *names]]
    lines.append(["---"] * len(lines[0]))
    for variant, figures in sorted(found.items()):
        cells = [spread([each[name] for each in figures]) for name in names]
        lines.append([*variant, str(len(figures)), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, which is left out where it rounds to nothing; a dash where there is no figure."""
    if any(map(math.isnan, values)):
        return "-"
    mean = statistics.mean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    digits = 0 if mean >= 100 else 1 if mean >= 10 else 3
    shown = f"{mean:,.{digits}f}"
    return f"{shown} ± {deviation:.{digits}f}" if round(deviation, digits) else shown


def main() -> None:
    """Run the trials that are missing, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="runs and figures go below it")
    parser.add_argument("--data", type=Path, help="svamp: the folder of the published files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial after so many")
    parser.add_argument("--only", default="", help="run only trials in whose names this regular expression is found")
    options = parser.parse_args()
    work = (options.work / options.experiment).resolve()
    work.mkdir(parents=True, exist_ok=True)
    experiment = EXPERIMENTS[options.experiment](work, range(options.seeds), options.data)
    missing = run_missing(experiment, work, options.only, options.minutes)
    found: dict[tuple[str, ...], list[Figures]] = {}
    written = []
    for trial in experiment.trials:
        if trial not in missing:
            figures = experiment.figures(trial, RunFolder(work / trial.name))
            found.setdefault(trial.variant, []).append(figures)
            written.append({**dict(zip(experiment.keys, trial.variant, strict=True)), "seed": trial.seed, **figures})
    (work / "figures.json").write_text(json.dumps(written, indent=2) + "\n")
    for names in experiment.tables:
        print("\n" + table(experiment, found, names))
    if missing:
        print(f"\n{len(missing)} trials are still to be run: give the same command again")


def run_missing(experiment: Experiment, work: Path, only: str, minutes: float) -> list[Trial]:
    """Run the trials that have no metrics yet, for so many minutes; returns those that are left."""
    began = time.monotonic()
    missing = [t for t in experiment.trials if not RunFolder(work / t.name).exists("eval", "metrics.json")]
    chosen = [t for t in missing if re.search(only, t.name)]
    if chosen:
        with connected():
            for trial in chosen:
                if time.monotonic() - began > 60 * minutes:
                    break
                print(f"{trial.name}:", flush=True)
                run_trial(trial, work, asks_most(experiment.trials, trial))
                missing.remove(trial)
    return missing


if __name__ == "__main__":
    main()
