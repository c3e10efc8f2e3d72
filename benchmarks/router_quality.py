"""How good routers are on recorded pairs, as RouteLLM measures it: APGR, CPT(50) and CPT(80) over ten random halves.

    python benchmarks/router_quality.py                      # a simulated pair
    python benchmarks/router_quality.py --run runs/quality   # a real one: the demo, its student taught too little
    python benchmarks/router_quality.py --csv pairs.csv      # yours

The last is what `distill-ray calibrate --replay pairs.csv` does. The first two write such a file (`--pairs`, or into
the run) and measure it.

Simulated: sentences of the demo world. The small model knows each language as well as KNOWN says and each question
(a sentence with a question mark) less well, so that both the topic and the form of a request tell how hard it is; the
large one is right in LARGE of all. A wrong answer is another language's label, and its log-probability is lower on
average. "knows the odds" is a router that scores each request by the true probability: what no router that sees only
the request can beat but by luck.

Real: the demo run with 600 training queries, 45 optimizer steps instead of 225 and 2,500 held-out sentences; right is
who gives the label. The log-probability of the student's answer is measured afterwards (`student/score.py`). The run
is made if it is not there (some 3 minutes on two cores).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from distill_ray.config import RunConfig
from distill_ray.demo import language_rows
from distill_ray.serving.calibration.recorded import NEEDED, OPTIONAL, default_config, replay_file
from distill_ray.serving.calibration.replay import LEVELS, apgr, cpt, pgr_curve
from distill_ray.serving.calibration.table import replay_notes, replay_table

KNOWN = {
    **{"en": 0.99, "de": 0.97, "fr": 0.97, "es": 0.95, "zh": 0.93, "ru": 0.9},
    **{"el": 0.8, "tr": 0.7, "vi": 0.65, "ar": 0.55, "hi": 0.5, "ur": 0.4, "ot": 0.6},
}
QUESTION = 0.6  # times as often right
LARGE = 0.97
MEAN_LOGPROB = {True: -0.15, False: -0.6}  # of exponential distributions: they overlap
TRAINED, STEPS, HELD_OUT = 600, 45, 2500
Record = dict[str, Any]


def odds(row: Record) -> float:
    """Probability that the simulated small model is right."""
    return KNOWN[row["label"]] * (QUESTION if any(mark in row["text"] for mark in "?？؟;") else 1.0)


def simulated(num_rows: int, seed: int) -> tuple[list[Record], list[float]]:
    """Recorded pairs, and for each the true probability that the small model is as good as the large one."""
    rng = random.Random(f"router-quality-{seed}")
    labels = sorted(KNOWN)
    records, as_good = [], []
    for row in language_rows(num_rows, seed=seed, held_out=True):
        is_right = rng.random() < odds(row)
        wrong = labels[(labels.index(row["label"]) + rng.choice((1, 1, 2, 5))) % len(labels)]
        records.append(
            {
                "query": row["text"],
                "small_right": int(is_right),
                "large_right": int(rng.random() < LARGE),
                "small_answer": row["label"] if is_right else wrong,
                "small_logprob": round(-rng.expovariate(-1 / MEAN_LOGPROB[is_right]), 4),
            }
        )
        as_good.append(1 - (1 - odds(row)) * LARGE)
    return records, as_good


def of_run(place: Path) -> list[Record]:
    """Recorded pairs of a run that `weak_student` made, with the log-probability of each of the student's answers."""
    from distill_ray.models import prompts_of
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.run import stored_config
    from distill_ray.recipes import make_recipe
    from distill_ray.records import Row
    from distill_ray.student.score import answer_losses

    folder = RunFolder(place)
    config = stored_config(folder)
    recipe, chat = make_recipe(config.recipe), prompts_of(config.student, key="student.model")
    rows = folder.read_table("eval", "predictions.parquet").to_pylist()
    losses = answer_losses(
        config.student.model_copy(update={"model": str(folder.local("student"))}),
        None,
        [chat.prompt_ids(recipe.student_messages(Row(row["row_id"], "test", row["query"], {}))) for row in rows],
        [chat.completion_ids(row["student_after"]) for row in rows],
        max_tokens_per_batch=4096,
    )
    return [
        {
            "query": row["query"],
            "small_right": row["match"],
            "large_right": row["match_teacher"],
            "small_answer": row["student_after"],
            "small_logprob": -float(loss),
        }
        for row, loss in zip(rows, losses, strict=True)
    ]


def weak_student(place: Path) -> None:
    """The demo with a student that was taught too little; does nothing where that was done."""
    from distill_ray.demo.prepare import prepare_demo
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.run import run

    if (place / "eval" / "predictions.parquet").exists():
        return
    config = prepare_demo(place / "input", num_rows=TRAINED, overrides=[f"train.max_steps={STEPS}"])
    rows = language_rows(HELD_OUT, held_out=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (place / "input" / "held_out.jsonl").write_text(lines, encoding="utf-8")
    run(config, RunFolder(place))


def write(records: Iterable[Record], path: Path) -> Path:
    """As `calibrate --replay` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*NEEDED, *OPTIONAL))
        writer.writerows([record[name] for name in (*NEEDED, *OPTIONAL)] for record in records)
    return path


def show(path: Path, config: RunConfig) -> dict[str, Any]:
    """Measure a file and print the table, with the ratio to random. Returns the figures."""
    console = Console(highlight=False, soft_wrap=True)
    found = replay_file(path, config)
    console.print(replay_table(found.figures))
    for note in replay_notes(found.figures):
        print(note)
    ratios = {name: of["over_random"] for name, of in found.figures["routers"].items()}
    print("APGR over random's 0.5: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print("wrote: " + ", ".join(found.written))
    return found.figures


def show_truth(records: list[Record], as_good: list[float]) -> None:
    """What the true probabilities come to on all rows."""
    small, large = (np.array([float(record[name]) for record in records]) for name in ("small_right", "large_right"))
    curve = pgr_curve(np.array(as_good), small, large)
    shares = ", ".join(f"CPT({level:.0%}) {cpt(curve, level):.1%}" for level in LEVELS.values())
    print(f"knows the odds, on all rows: APGR {apgr(curve):.3f}, {shares}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--csv", type=Path, help="a file of recorded pairs")
    source.add_argument("--run", type=Path, help="folder of the real pair's run")
    parser.add_argument("--rows", type=int, default=2000, help="of the simulated pair")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated pair and of the random halves")
    parser.add_argument("--pairs", type=Path, default=Path("runs/router-quality.csv"), help="the simulated pair's file")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    config = default_config([f"calibrate.seed={options.seed}"])
    if options.csv is not None:
        figures = show(options.csv, config)
    elif options.run is not None:
        weak_student(options.run)
        figures = show(write(of_run(options.run), options.run / "recorded.csv"), config)
    else:
        records, as_good = simulated(options.rows, options.seed)
        figures = show(write(records, options.pairs), config)
        show_truth(records, as_good)
    if options.out:
        routers = {name: {key: of[key] for key in of if key != "pgr"} for name, of in figures["routers"].items()}
        kept = {key: figures[key] for key in figures if key not in ("file", "shares")} | {"routers": routers}
        options.out.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
