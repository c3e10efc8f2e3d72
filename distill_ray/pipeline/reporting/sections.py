"""What a report says, in Markdown. Runs nothing.

manifest.json, eval/metrics.json, eval/predictions.parquet, metrics.jsonl, rows/plan.json -> sections
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distill_ray.config import RunConfig
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import duration
from distill_ray.pipeline.recipe_figures import QUANTILES, figure_lines
from distill_ray.pipeline.reporting.costs import Costs, costs, has_prices, own_judge, thousand
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.markdown import cell, code, table, text_table
from distill_ray.pipeline.reporting.result import NOT_THERE, ROLES, has_context, result_rows, role_titles, saving
from distill_ray.pipeline.reporting.wording import changed, learned, source, teacher

CURVE_POINTS = 10


class Section(NamedTuple):
    """A part of the report."""

    title: str
    """"" stands at the top."""

    text: str
    """Markdown, in which other people's text is escaped."""


def sections(facts: Facts) -> list[Section]:
    """All that there is something to say about; sections whose files are missing say so."""
    config, manifest, metrics = facts.config, facts.manifest, facts.metrics
    found = [
        Section("", _summary(config, metrics)),
        Section("Result", _result(metrics)),
        Section("What was run", _what_was_run(config)),
        Section("Rows", _rows(manifest)),
        Section("What the teacher gave", _recipe_figures(manifest)),
        Section("Training", _training(facts)),
        Section("Who is taken for whom", _confusion(metrics)),
        Section("Worst examples", _worst(facts)),
        Section("Cost", _cost(facts)),
        Section("Reproduce", _reproduce(facts)),
    ]
    return [section for section in found if section.text]


# -- sections ---------------------------------------------------------------------------------------------


def _summary(config: RunConfig, metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "Not evaluated yet: run `distill-ray evaluate`."
    titles = dict(zip(ROLES, role_titles(metrics), strict=True))
    rewards = metrics.get("reward")
    if rewards and metrics.get("teacher") is None:  # no answer is the right one: what counts is the reward
        what = "Mean reward"
        titles = {"draft": "the teacher's draft", **titles, "teacher": "its revision"}
        scores = [f"{title} {rewards[who]['mean']:.3f}" for who, title in titles.items() if who in rewards]
    else:
        what = "Exact match"
        scores = [f"{title} {metrics[who]['exact_match']:.3f}" for who, title in titles.items() if metrics.get(who)]
    before, after = metrics["prompt_tokens_before"], metrics["prompt_tokens_after"]
    return (
        f"`{config.student.model}` learned {learned(config, metrics)}, from {teacher(config)}. "
        f"{what} on {metrics['num_rows']} held-out rows: {'; '.join(scores)}. "
        f"A request's prompt went from {before:.0f} to {after:.0f} tokens ({saving(before, after)} fewer)."
    )


def _result(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    notes = ["In brackets: 95 % interval, bootstrapped over rows."]
    notes += ["The student never sees the context."] if has_context(metrics) else []
    notes += ["Loss: of the answers to learn under the student."] if "loss" in metrics["student_after"] else []
    datas_own = metrics.get("num_rows_of_data_alone", 0)
    if metrics.get("gold_only"):
        notes.append("The labels are the data's own: no teacher was asked.")
    elif datas_own:
        notes.append(f"{datas_own} rows have no rationale, so they are held against the data's own label alone.")
    elif metrics.get("teacher") is None:
        notes.append("The data names no reference, so exact match is against the teacher's answer.")
    if tokens := metrics.get("completion_tokens"):
        notes.append(
            f"An answer takes {tokens['answer']:.1f} tokens; with the rationale, which is only trained on, it would "
            f"take {tokens['with_rationale']:.1f}."
        )
    if wins := metrics.get("wins"):
        notes.append(
            f"The judge, {cell(wins['judge'])}, saw each pair in both orders: {wins['won']} won, {wins['lost']} lost, "
            f"{wins['tied']} tied, {wins['turned']} judged one way and then the other (which counts half), "
            f"{wins['without_verdict']} without a verdict."
        )
        if wins["shown_first"] is not None:
            notes.append(f"What it saw first got {100 * wins['shown_first']:.0f} % of its verdicts; fair is 50 %.")
    if missing := metrics.get("num_rows_without_teacher"):
        notes.append(f"{missing} rows without a teacher's answer are left out.")
    return table(["", *role_titles(metrics)], result_rows(metrics)) + "\n\n" + " ".join(notes)


def _what_was_run(config: RunConfig) -> str:
    student = config.student
    trained = f"LoRA, rank {student.lora.rank}" if student.lora else "all weights"
    return text_table(
        ["", ""],
        [
            ["recipe", config.recipe.type],
            ["data", ", ".join(source(config))],
            ["teacher", teacher(config)],
            ["sampling", changed(config.teacher.sampling)],
            ["student", f"{student.model} ({trained})"],
            ["training", changed(config.train)],
        ],
    )


def _rows(manifest: Mapping[str, Any]) -> str:
    if manifest.get("generation_complete") is False:
        return "Generation was stopped before its end; `distill-ray generate` goes on and counts."
    if "rows_in" not in manifest:
        return "Nothing generated yet."
    text = (
        f"{manifest['rows_in']} rows read, {manifest['rows_with_examples']} gave examples, "
        f"{manifest['rows_rejected']} were rejected (see `rejects/`)."
    )
    rejects = manifest.get("rejects") or {}
    if rejects:
        counts = sorted(rejects.items(), key=lambda pair: (-pair[1], pair[0]))
        text += "\n\n" + table(["reason", "rows"], [[f"`{reason}`", str(count)] for reason, count in counts])
    if in_training := manifest.get("train", {}).get("rejects"):
        text += f"\n\n{in_training} examples were too long to train on (see `train/`)."
    return text


def _recipe_figures(manifest: Mapping[str, Any]) -> str:
    figures = manifest.get("recipe_figures", {})
    text = "\n\n".join(f"{line[0].upper()}{line[1:]}." for line in figure_lines(figures))
    revisions = figures.get("revisions", {})
    if not revisions.get("scored"):
        return text
    shown = {"mean": "mean", **{name: _quantile_title(name, share) for name, share in QUANTILES.items()}}
    rows = [
        [f"reward {when}", *(f"{revisions[f'reward_{when}'][name]:.4g}" for name in shown)]
        for when in ("before", "after")
    ]
    note = f"Over all {revisions['scored']} scored chains, accepted or not. 10 %: a tenth of them is at or below it."
    return f"{text}\n\n{table(['', *shown.values()], rows)}\n\n{note}"


def _quantile_title(name: str, share: float) -> str:
    return name if share in (0.0, 1.0) else f"{100 * share:.0f} %"


def _training(facts: Facts) -> str:
    figures = facts.train
    if not figures:
        return "Nothing trained yet."
    text = (
        f"{figures.get('examples', NOT_THERE)} examples, {figures.get('steps', NOT_THERE)} steps; "
        f"the weights of step {figures.get('kept_step', NOT_THERE)} were kept"
    )
    if figures.get("generated_with", now := facts.manifest.get("generated_with")) != now:
        text = f"The student is of earlier examples than these: `distill-ray train` takes these. {text}"
    loss = figures.get("validation_loss")
    text += f" (validation loss {loss:.4f})." if isinstance(loss, float) else "."
    curve = _curve(facts.training_points)
    if curve:
        rows = [[str(step), *(_loss(point.get(name)) for name in ("loss", "validation_loss"))] for step, point in curve]
        text += "\n\n" + table(["step", "training loss", "validation loss"], rows)
    return text


def _curve(points: Mapping[int, dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """At most CURVE_POINTS steps over the whole training, those with a validation first."""
    validated = [step for step in points if "validation_loss" in points[step]]
    chosen = validated if len(validated) > 1 else list(points)
    num_shown = min(CURVE_POINTS, len(chosen))
    indexes = {round(i * (len(chosen) - 1) / max(1, num_shown - 1)) for i in range(num_shown)}
    return [(chosen[index], points[chosen[index]]) for index in sorted(indexes)]


def _loss(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else NOT_THERE


def _confusion(metrics: Mapping[str, Any]) -> str:
    found = metrics.get("confusion")
    if not found:
        return ""
    labels = [cell(label) for label in found["labels"]]
    rows = [
        [f"**{label}**", *(str(count) if count else "" for count in counts), str(other) if other else ""]
        for label, counts, other in zip(labels, found["counts"], found["other"], strict=True)
    ]
    return "Rows: what is right; columns: what the student after training said.\n\n" + table(
        ["", *labels, "none of these"], rows
    )


def _worst(facts: Facts) -> str:
    most, predictions = facts.config.evaluate.worst, facts.predictions
    if not most or not predictions:
        return ""
    if all(row["reference"] is None and row.get("reward_student_after") is not None for row in predictions):
        return _least_rewarded(predictions, most)
    has_references = any(row["reference"] is not None for row in predictions)
    if not has_references and any(row.get("win") is not None for row in predictions):
        return _lost(predictions, most)
    wrong = [row for row in predictions if not row["match"]]
    if not wrong:
        return "The student after training is right on every row."
    wrong.sort(key=lambda row: (row["token_f1"], -(row["loss_after"] or 0.0), row["row_id"]))
    names = ["row_id", "query", "reference", "teacher_answer", "student_before", "student_after"]
    header = ["row", "query", "reference", "teacher", "student before", "student after"]
    if all(row["reference"] is None for row in wrong):
        names.remove("reference")
        header.remove("reference")
    shown = [[row[name] for name in names] for row in wrong[:most]]
    return f"{len(wrong)} of {len(predictions)} rows are wrong; the worst first.\n\n" + text_table(header, shown)


def _lost(predictions: list[dict[str, Any]], num_rows: int) -> str:
    judged = sorted((row for row in predictions if row.get("win") is not None), key=lambda r: (r["win"], r["row_id"]))
    lost = [row for row in judged if row["win"] < 0.5]
    if not lost:
        return "The judge prefers the teacher's answer on no row."
    shown = [[row[name] for name in ("row_id", "query", "teacher_answer", "student_after")] for row in lost[:num_rows]]
    header = ["row", "query", "teacher", "student after"]
    return f"The judge prefers the teacher's answer on {len(lost)} of {len(judged)} rows.\n\n" + text_table(
        header, shown
    )


def _least_rewarded(predictions: list[dict[str, Any]], num_rows: int) -> str:
    lowest = sorted(predictions, key=lambda row: (row["reward_student_after"], row["row_id"]))[:num_rows]
    header = ["row", "query", "teacher", "reward", "student after", "reward"]
    names = ["row_id", "query", "teacher_answer", "reward_teacher", "student_after", "reward_student_after"]
    shown = [[f"{row[n]:.4g}" if isinstance(row[n], float) else row[n] for n in names] for row in lowest]
    return "The lowest rewards first.\n\n" + text_table(header, shown)


def _cost(facts: Facts) -> str:
    manifest, metrics = facts.manifest, facts.metrics
    figures = [
        [title, f"{manifest[name]:,}"]
        for name, title in (
            ("teacher_calls", "teacher calls made by the last command"),
            ("teacher_calls_replayed", "answers that cost it nothing (`calls/`, or shared by equal prompts)"),
            ("prompt_tokens", "prompt tokens of all these answers"),
            ("completion_tokens", "completion tokens of all these answers"),
            ("judge_prompt_tokens", "of these a judge's prompt tokens"),
            ("judge_completion_tokens", "of these a judge's completion tokens"),
        )
        if manifest.get(name, 0) or (name in manifest and not name.startswith("judge"))
    ]
    for stage, spent in manifest.get("spent", {}).items():
        figures.append([f"time, {cell(stage)}", duration(spent["seconds"])])
        figures.append([f"engines or workers, {cell(stage)}", f"{spent['replica_seconds'] / 3600:.4f} hours"])
        if "prompt_tokens" in spent:
            tokens = f"{spent['prompt_tokens']:,} and {spent['completion_tokens']:,}"
            figures.append([f"prompt and completion tokens paid, {cell(stage)}", tokens])
    if metrics:
        before, after = metrics["prompt_tokens_before"], metrics["prompt_tokens_after"]
        figures.append(["prompt tokens saved per request", f"{before - after:.1f}"])
    if not figures:
        return ""
    return f"{table(['', ''], figures)}\n\n{_money(facts)}"


def _money(facts: Facts) -> str:
    """What that comes to at the prices given, and after how many requests it is saved."""
    if not has_prices(facts.config):
        return (
            "No prices are given. With `plan.teacher.price_per_million_prompt_tokens` and "
            "`price_per_million_completion_tokens`, or `price_per_hour`, and `plan.student.price_per_hour` this says "
            "after how many requests the run has paid for itself."
        )
    found = costs(facts)
    shown = {
        "teacher": found.teacher,
        **({"judge": found.judge} if own_judge(facts.config) is not None else {}),
        "training": found.training,
        "evaluation": found.evaluation,
        "the run": found.total,
        "1,000 requests to the teacher": thousand(found.teacher_per_request),
        "1,000 requests to the student": thousand(found.student_per_request),
        "saved by 1,000 requests": thousand(found.saved_per_request),
    }
    rows = [[title, NOT_THERE if amount is None else f"{amount:,.4g}"] for title, amount in shown.items()]
    return f"{table(['at the prices of `plan:`', ''], rows)}\n\n{_break_even(found, has_student=bool(facts.metrics))}"


def _break_even(found: Costs, *, has_student: bool) -> str:
    full_load = "Requests are priced at full load, as in this run: an idle engine costs more."
    if not has_student:
        return "After how many requests the run has paid for itself: see when this student is evaluated."
    if found.total == 0:
        return "At these prices nothing costs anything."
    if found.break_even is not None:
        return f"The run has paid for itself after {found.break_even:,} requests to the student. {full_load}"
    if found.saved_per_request is not None and found.saved_per_request <= 0:
        return f"At these prices the student saves nothing, so the run does not pay for itself. {full_load}"
    return "After how many requests the run has paid for itself cannot be said: a price or a figure is missing."


def _reproduce(facts: Facts) -> str:
    folder, config, manifest = facts.folder, facts.config, facts.manifest
    config_path, run_dir = shlex.quote(folder.url("config.yaml")), shlex.quote(f"runs/{config.name}-again")
    commands = [f"distill-ray run {config_path} --run-dir {run_dir}", "", "# or stage by stage"]
    commands += [f"distill-ray {name} {config_path} --run-dir {run_dir}" for name in ("generate", "train", "evaluate")]
    found: list[Sequence[object]] = [["hash of config.yaml", _hash_of(folder, "config.yaml")]]
    found += [["hash of the rows", _hash_of(folder, "rows", "plan.json")]]
    found += [["hash of the training", facts.train.get("fingerprint", NOT_THERE)]]
    found += [[f"{package} version", version] for package, version in manifest.get("versions", {}).items()]
    found += [[f"{name} seed", seed] for name, seed in _seeds(config, manifest).items()]
    return code("\n".join(commands), "bash") + "\n\n" + text_table(["", ""], found)


def _seeds(config: RunConfig, manifest: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "sampling": config.teacher.sampling.seed,
        "training": config.train.seed,
        "bootstrap": config.evaluate.seed,
    }
    return {**own, **manifest.get("seeds", {})}


def _hash_of(folder: RunFolder, *parts: str) -> str:
    """Hash of a small file's content; of `plan.json`, only what the rows are."""
    if not folder.exists(*parts):
        return NOT_THERE
    data = folder.read_bytes(*parts)
    if parts[-1] == "plan.json":
        data = json.dumps([p["sha"] for p in json.loads(data).get("partitions", [])]).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()
