"""The report: what it says, and that nothing a model wrote can break the page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from distill_ray.config import RunConfig, parse_config
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.costs import costs
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.markdown import cell, code, table
from distill_ray.pipeline.reporting.report import write_report
from distill_ray.pipeline.reporting.result import summary_table
from distill_ray.pipeline.scoring import PREDICTION_SCHEMA, score_predictions

NASTY = "a | b\n`code` <script>alert(1)</script> *x* [l](u) \x1b[31m"


def config(**keys: Any) -> RunConfig:
    return parse_config(
        {
            "name": "language-id",
            "recipe": {"context": {"text": "x"}},
            "data": {"source": "/data/q.jsonl"},
            "teacher": {"type": "fake", "model": "big-model"},
            "student": {"model": "small-model", "lora": {"rank": 8}},
            **keys,
        }
    )


def predictions(reference: bool = True) -> list[dict[str, Any]]:
    rows = []
    for number in range(20):
        label = ["fr", "de"][number % 2]
        answer = NASTY if number == 3 else label
        rows.append(
            {
                "row_id": f"r{number:02d}",
                "query": NASTY if number == 3 else f"query {number}",
                "reference": label if reference else None,
                "teacher_answer": label,
                "student_before": "dunno",
                "student_after": answer,
                "loss_before": 2.0,
                "loss_after": 0.1,
                "prompt_tokens_before": 400,
                "prompt_tokens_after": 20,
                "completion_ids": [7] * (1 + number % 3),
            }
        )
    return rows


MANIFEST = {
    "rows_in": 120,
    "rows_with_examples": 117,
    "rows_rejected": 3,
    "rejects": {"empty_answer": 1, "cut_off": 2},
    "teacher_calls": 100,
    "teacher_calls_replayed": 17,
    "prompt_tokens": 48_000,
    "completion_tokens": 1_234,
    "spent": {
        "generate": {"seconds": 61.0, "replica_seconds": 122.0, "working_seconds": 90.0, "calls": 100},
        "train": {"seconds": 5.0, "replica_seconds": 10.0},
    },
    "student_answering": {"answers": 20, "seconds": 2.0},
    "versions": {"ray": "2.60.0"},
    "seeds": {"sampling": 11},
    "train": {
        "examples": 97,
        "steps": 30,
        "kept_step": 20,
        "validation_loss": 0.25,
        "rejects": 2,
        "fingerprint": "abc123",
    },
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run."""
    folder = RunFolder(tmp_path / "run")
    put_evaluation(folder, config(), predictions())
    folder.write_bytes(b"name: language-id\n", "config.yaml")
    for step in range(1, 41):  # 31..40 are of an earlier, longer training
        folder.append_metrics({"stage": "train", "step": step, "loss": 4.0 / step})
        if step % 10 == 0:
            folder.append_metrics({"stage": "train", "step": step, "validation_loss": 8.0 / step})
    with open(folder.path("metrics.jsonl"), "a") as file:
        file.write('{"stage": "train", "st')  # killed while writing
    return folder


def put_evaluation(folder: RunFolder, config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write what `evaluate` leaves of such rows, beside a manifest; returns the metrics."""
    metrics, records = score_predictions(config, rows)
    folder.write_json(MANIFEST, "manifest.json")
    folder.write_json(metrics, "eval", "metrics.json")
    folder.write_table(pa.Table.from_pylist(records, schema=PREDICTION_SCHEMA), "eval", "predictions.parquet")
    return metrics


def written(folder: RunFolder, **keys: Any) -> str:
    write_report(folder, config(**keys))
    return folder.read_bytes("report.md").decode()


@pytest.mark.parametrize(
    "text",
    [
        "# language-id\n",
        "Exact match on 20 held-out rows: teacher, with context 1.000; student before 0.000; student after 0.950.",
        "from 400 to 20 tokens (95 % fewer)",
        "| exact match | 1.000 [1.000, 1.000] | 0.000 [0.000, 0.000] | 0.950 [",
        "| agreement with the teacher | - | 0.000 [",
        "| prompt tokens per request | 400.0 | 20.0 | 20.0 (95 % fewer) |",
        "| teacher | big-model (fake) |",
        "| student | small-model (LoRA, rank 8) |",
        "120 rows read, 117 gave examples, 3 were rejected",
        "| `cut_off` | 2 |\n| `empty_answer` | 1 |",
        "2 examples were too long to train on",
        "97 examples, 30 steps; the weights of step 20 were kept (validation loss 0.2500).",
        "| 10 | 0.4000 | 0.8000 |\n| 20 | 0.2000 | 0.4000 |\n| 30 | 0.1333 | 0.2667 |\n\n",
        "| **de** | 9 |  | 1 |\n| **fr** |  | 10 |  |",
        "1 of 20 rows are wrong",
        "| teacher calls made by the last command | 100 |",
        "| answers that cost it nothing (`calls/`, or shared by equal prompts) | 17 |",
        "| prompt tokens of all these answers | 48,000 |",
        "| time, generate | 1m 01s |",
        "| engines or workers, generate | 0.0339 hours |",
        "| prompt tokens saved per request | 380.0 |",
        "No prices are given.",
        "config.yaml --run-dir runs/language-id-again",
        "| hash of the training | abc123 |",
        "| ray version | 2.60.0 |",
        "| sampling seed | 11 |",
    ],
)
def test_the_report_says(text: str, run: RunFolder) -> None:
    assert text in written(run)


def test_what_a_model_wrote_stays_in_its_cell(run: RunFolder) -> None:
    report = written(run)
    [line] = [line for line in report.splitlines() if line.startswith("| r03 |")]
    assert line.count("|") - line.count("\\|") == 7  # six cells
    assert "<script>" not in report
    assert "\x1b" not in report
    assert "\\`code\\` &lt;script&gt;" in line


def test_the_number_of_worst_examples_is_the_configs(run: RunFolder) -> None:
    assert "| r03 |" in written(run, evaluate={"worst": 1})
    assert "Worst examples" not in written(run, evaluate={"worst": 0})


def test_without_references_the_report_says_what_exact_match_is_against(run: RunFolder) -> None:
    put_evaluation(run, config(), predictions(reference=False))
    report = written(run)
    assert "exact match is against the teacher's answer" in report
    assert "| row | query | teacher | student before | student after |" in report


def test_a_run_that_has_hardly_begun_has_a_report_too(tmp_path: Path) -> None:
    report = written(RunFolder(tmp_path / "run"))
    assert "Not evaluated yet" in report
    assert "Nothing generated yet." in report
    assert "Nothing trained yet." in report


def test_the_terminal_shows_the_same_table(run: RunFolder) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(run.read_json("eval", "metrics.json")))
    shown = console.export_text()
    assert "20 held-out rows" in shown
    assert "[0.850, 1.000]" in shown
    assert "95 % fewer" in shown


@given(st.text())
def test_a_cell_is_one_line_and_cannot_end_itself(text: str) -> None:
    shown = cell(text)
    assert not set(shown) & {"\n", "\r", "\x1b", "\x00"}
    assert "|" not in shown.replace("\\\\", "").replace("\\|", "")
    assert "<" not in shown.replace("<br>", "")


@given(st.text(alphabet="`a\n"))
def test_a_fence_is_longer_than_what_it_holds(text: str) -> None:
    fence, *_, last = code(text).split("\n")
    assert fence == last
    assert fence not in text


def test_a_table_has_a_rule_below_its_header() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_metrics_json_is_json(run: RunFolder) -> None:
    json.loads(run.read_bytes("eval", "metrics.json"))


def test_a_report_without_a_context_or_a_teacher_speaks_of_neither(tmp_path: Path) -> None:
    recipe = {"type": "step_by_step", "query": "{{ q }}", "label_column": "label", "rationale_column": "why"}
    no_teacher = config(recipe=recipe, teacher={"type": "none"})
    folder = RunFolder(tmp_path)
    metrics = put_evaluation(folder, no_teacher, predictions())
    write_report(folder, no_teacher)
    text = folder.read_bytes("report.md").decode()
    assert "`small-model` learned the labels, with rationales, from answers that were in the data." in text
    assert "context" not in text.partition("## Rows")[0]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(summary_table(metrics))
    assert "teacher, with context" not in shown.get()


def test_a_report_on_gold_labels_alone_speaks_of_no_teacher_and_of_no_rationales(tmp_path: Path) -> None:
    recipe = {"type": "step_by_step", "query": "{{ q }}", "label_column": "label", "mode": "standard"}
    labels_only = config(recipe=recipe)  # the teacher is there, and was not asked
    folder = RunFolder(tmp_path)
    put_evaluation(folder, labels_only, [{**row, "is_datas_own": True} for row in predictions()])
    write_report(folder, labels_only)
    text = folder.read_bytes("report.md").decode()
    assert "`small-model` learned the labels, from answers that were in the data." in text
    assert "The labels are the data's own: no teacher was asked." in text
    assert "agreement with the teacher" not in text
    assert "names no reference" not in text


def test_where_no_answer_is_the_right_one_the_report_speaks_of_rewards(tmp_path: Path) -> None:
    critique = config(recipe={"type": "self_critique", "query": "{{ q }}", "reward": {"type": "length"}})
    rows = [
        {**row, "reward_draft": -5.0, "reward_teacher": -1.0, "reward_student_before": -9.0, "reward_student_after": -n}
        for n, row in enumerate(predictions(reference=False), start=1)
    ]
    folder = RunFolder(tmp_path)
    put_evaluation(folder, critique, rows)
    write_report(folder, critique)
    text = folder.read_bytes("report.md").decode()
    shown = "the teacher's draft -5.000; its revision -1.000; student before -9.000; student after -10.500."
    assert f"Mean reward on 20 held-out rows: {shown}" in text
    worst = text.partition("The lowest rewards first.")[2]
    assert worst.index("r19") < worst.index("r18") < worst.index("r00")
    assert "rows are wrong" not in text


# -- every number ----------------------------------------------------------------------------------------------------


NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")


def numbers_of(value: Any) -> list[float]:
    """All that a file holds, in texts too."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, str):
        return [float(found.replace(",", "")) for found in NUMBER.findall(value)]
    inner = value.values() if isinstance(value, dict) else value
    return [number for each in inner for number in numbers_of(each)]


def is_one_of(text: str, known: list[float]) -> bool:
    """Whether a number as it is printed is one of the known ones, rounded like it."""
    digits = len(text.partition("e")[0].partition(".")[2])
    shown = float(text.replace(",", ""))
    return any(abs(shown - number) <= 0.5000001 * 10**-digits for number in known)


def test_every_number_of_the_report_is_one_of_the_files_or_follows_from_them(run: RunFolder) -> None:
    run.update_manifest({"spent": {"evaluate": {"seconds": 36.0, "replica_seconds": 36.0}}})
    keys: dict[str, Any] = {"plan": {"teacher": {"price_per_hour": 10.0}, "student": {"price_per_hour": 1.0}}}
    report = written(run, **keys)
    files = [
        run.manifest(),
        run.read_json("eval", "metrics.json"),
        run.read_table("eval", "predictions.parquet").to_pylist(),
        [json.loads(line) for line in run.read_bytes("metrics.jsonl").splitlines()[:-1]],
        config(**keys).model_dump(mode="json"),
    ]
    found = costs(Facts(run, config(**keys)))
    follow = [
        *numbers_of([dataclasses.asdict(found), found.total, found.saved_per_request, found.break_even]),
        *(1000 * n for n in (found.teacher_per_request, found.student_per_request, found.saved_per_request) if n),
        *(seconds / 3600 for seconds in (122.0, 10.0, 36.0)),  # hours of engines and workers
        *(1.0, 1.0, 5.0, 36.0),  # minutes and seconds of stages: 61, 5 and 36 seconds
        *(95.0, 400 - 20, 1.0, 1000.0),  # per cent and tokens fewer; wrong rows; "1,000 requests"
    ]
    known = numbers_of(files) + follow
    hashes = re.compile(r"[0-9a-f]{32}")
    printed = NUMBER.findall(hashes.sub("", re.sub(r"(\d+)[ms]\b", r"\1 ", report.replace(run.root, ""))))
    assert len(printed) > 90
    strangers = [text for text in printed if not is_one_of(text, known)]
    assert strangers == []
    # And the other way round: another number in a file is another one in the report.
    run.update_manifest({"teacher_calls": 7_654_321, "train": {"validation_loss": 0.98765}})
    again = written(run, **keys)
    assert "7,654,321" in again
    assert "validation loss 0.9877" in again
