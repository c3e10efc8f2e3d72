"""The step that makes the bundle: what was learnt in clusters that passed, and a threshold for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from distill_ray.config import StudentConfig
from distill_ray.flywheel.gate import learnt, measurements
from distill_ray.flywheel.students import candidate_spec
from distill_ray.flywheel.work import Work
from distill_ray.models import prompts_of
from distill_ray.serving.calibration.assemble import Basis, make_bundle
from distill_ray.serving.calibration.calibrate import served_form
from distill_ray.serving.calibration.measured import Measured
from distill_ray.serving.routing.manifest import NEVER, PromptForm

COUNTED = 500  # prompts whose tokens are counted for the savings shown


def bundle(work: Work) -> dict[str, Any]:
    """Make the bundle of a candidate that passed the gate."""
    form, context = served_form(work.config)
    trained = work.cycle.needed("train")
    is_here = "student" in trained  # and not at a vendor
    student = StudentConfig.model_validate(trained["student"]) if is_here else None
    config = work.config.model_copy(update={"student": student}) if student is not None else work.config
    candidate, _ = measurements(work, form)
    passed = set(json.loads(work.cycle.run.read_bytes("train", "passed.json")))
    basis = Basis(
        student=work.cycle.run.local("student") if student is not None else None,
        spec=candidate_spec(work.config, trained, form),
        context=context,
        trained=[each for each in learnt(work) if each.example_id in passed],
        measured=candidate.measured,
        good_P=candidate.good_P,
        agree_P=candidate.good_P,  # nobody knows more than the teacher said
        split="held-out",
        more="wait for more pairs, or raise flywheel.holdout",
        tokens=_tokens(work, student, form, candidate.measured),
        data=f"{work.config.name} cycle {work.cycle.number}, store batch {work.cycle.needed('snapshot')['until']}",
        reports={"gate.json": without_texts(work.cycle.content("gate"))},
    )
    made = make_bundle(config, work.embedder, basis, work.cycle.folder / "bundle")
    summary = made.manifest.summary
    figures = {
        "version": made.manifest.version,
        "moves": work.bundles.num_moves(),  # so far
        "trained": len(basis.trained),
        "threshold": made.manifest.threshold,
        **{name: summary[name] for name in ("share", "error", "error_low", "error_high")},
    }
    if made.manifest.threshold >= NEVER:
        return {**figures, "outcome": "unclear", "why": [str(summary["why"])]}
    return {**figures, "outcome": "go_on"}


def without_texts(gate: Mapping[str, Any]) -> bytes:
    """`gate.json` as it goes into the bundle: nobody finds what is deleted there, since a bundle never changes."""
    worst = [{"pair_id": each["pair_id"], "set": each["set"]} for each in gate["worst"]]
    clusters = [{name: value for name, value in each.items() if name != "name"} for each in gate["clusters"]]
    return (json.dumps({**gate, "worst": worst, "clusters": clusters}, indent=1, ensure_ascii=False) + "\n").encode()


def _tokens(
    work: Work, student: StudentConfig | None, form: PromptForm, measured: Sequence[Measured]
) -> dict[str, float]:
    """Mean tokens of a request: the teacher's as its server counted them, the student's prompt by its own tokenizer.

    Of a student at a vendor nobody here can count; {} then, and where the teacher's server does not.
    """
    records = work.cycle.table("pairs").to_pylist()
    counted = [r for r in records if r["prompt_tokens"] is not None and r["completion_tokens"] is not None]
    if not counted or not measured or student is None:
        return {}
    prompts = prompts_of(student, key="student.model")
    lengths = [len(prompts.prompt_ids(form.messages(each.messages))) for each in measured[:COUNTED]]  # type: ignore[arg-type]
    return {
        "teacher_prompt": sum(r["prompt_tokens"] for r in counted) / len(counted),
        "teacher_completion": sum(r["completion_tokens"] for r in counted) / len(counted),
        "student_prompt": sum(lengths) / len(lengths),
    }
