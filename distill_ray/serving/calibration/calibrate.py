"""Calibrate: for which requests is the student as good as the teacher? A run folder becomes a bundle.

    run folder -> trained and measured requests (`measured`) -> outcomes (`comparing`) -> RUN/bundle (`assemble`)

Context, prompt form and parsing of the recipe go into the bundle, and requests are weighed by the router's own rule:
what was measured is what will be served.
"""

from __future__ import annotations

from distill_ray.config import ContextRecipeConfig, RunConfig, SamplingConfig, StudentConfig
from distill_ray.errors import ConfigError, DistillError, RowError
from distill_ray.models import ChatTokenizer, is_encoder_decoder, prompts_of
from distill_ray.pipeline.evaluate import require_these_examples, student_engine
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.training.train import require_current_student, trained_fingerprint
from distill_ray.recipes import Recipe, make_recipe
from distill_ray.records import Message, Row
from distill_ray.serving.calibration.assemble import Basis, Calibrated, calibrating_embedder, make_bundle
from distill_ray.serving.calibration.comparing import agreements, outcomes
from distill_ray.serving.calibration.measured import measured_requests, trained_requests
from distill_ray.serving.routing.manifest import PromptForm, StudentSpec

SENTINEL = "the Query itself 4f1c"
FOLDER = "bundle"  # of the run


def calibrate(config: RunConfig, folder: RunFolder) -> Calibrated:
    """Run the stage; safe to repeat: what did not change is kept.

    Raises:
        ConfigError: what the recipe does cannot be served with one context and one form of prompt.
        DistillError: no student, or no held-out request.
    """
    form, context = served_form(config)
    if not folder.exists("student"):
        raise DistillError(f"{folder.root}: no student here yet; run `distill-ray train CONFIG --run-dir ...` first")
    require_these_examples(config, folder)
    require_current_student(config, folder)
    trained = trained_requests(config, folder)
    split, measured = measured_requests(config, folder)
    embedder = calibrating_embedder(config)
    good_P = outcomes(config, folder, measured, embedder)
    basis = Basis(
        student=folder.local("student"),
        spec=student_spec(config.student, form, student_engine(config, folder).sampling),
        context=context,
        trained=trained,
        measured=measured,
        good_P=good_P,
        agree_P=agreements(config, measured, good_P, embedder),
        split=split,
        more="raise data.holdout, or give data.test",
        tokens=_tokens(folder),
        data=str(folder.manifest().get("generated_with", "")),
        origin=[trained_fingerprint(folder)],
    )
    return make_bundle(config, embedder, basis, folder.local(FOLDER))


# -- how it is served --------------------------------------------------------------------------------------------------


def served_form(config: RunConfig) -> tuple[PromptForm, list[Message]]:
    """How the student is asked around a client's query, and the context that the teacher gets.

    Raises:
        ConfigError: each row has a context of its own, or the student's prompt needs more than the query.
    """
    recipe = make_recipe(config.recipe)
    context: list[Message] = []
    row = Row("served", "test", SENTINEL, {})
    if isinstance(config.recipe, ContextRecipeConfig):
        if config.recipe.context.column is not None:
            raise ConfigError(
                f"recipe.context.column: {config.recipe.context.column}: each row has a context of its own, and a "
                "service has one for all requests; take context.text or context.file"
            )
        context = recipe.teacher_messages(row)[:-1]
    return _form(recipe, row), context


def _form(recipe: Recipe, row: Row) -> PromptForm:
    try:
        *before, last = recipe.student_messages(row)
    except RowError as error:
        raise ConfigError(
            f"recipe: the student's prompt needs more of a row than its query ({error.detail}), and a client sends "
            "nothing else; use only {{ query }} in it"
        ) from error
    prefix, found, suffix = last["content"].partition(SENTINEL)
    if not found or SENTINEL in suffix or [m["role"] for m in before] not in ([], ["system"]):
        raise ConfigError(
            "recipe: the student's prompt is not some text, the query, some text; a service can ask it only so"
        )
    return PromptForm(system=before[0]["content"] if before else None, prefix=prefix, suffix=suffix)


def student_spec(student: StudentConfig, form: PromptForm, sampling: SamplingConfig) -> StudentSpec:
    """What a bundle says about a student that was trained as `student` says."""
    is_adapter = student.lora is not None and not student.lora.merge
    prompts = prompts_of(student, key="student.model")
    tokens = prompts.tokenizer.added_tokens_decoder.values() if isinstance(prompts, ChatTokenizer) else ()
    return StudentSpec(
        kind="adapter" if is_adapter else "full",
        base=student.model if is_adapter else None,
        revision=student.revision if is_adapter else None,
        is_encoder_decoder=is_encoder_decoder(student, key="student.model"),
        form=form,
        sampling=sampling,
        chat_template="chat_template.jinja" if student.chat_template is not None else None,
        chat_template_kwargs=student.chat_template_kwargs,
        control_tokens=sorted({token.content for token in tokens if token.special and token.content}),
        trust_remote_code=student.trust_remote_code,
    )


def _tokens(folder: RunFolder) -> dict[str, float]:
    """Mean tokens of a request, the teacher's and the student's prompt. {} where nobody counted."""
    manifest = folder.manifest()
    calls = manifest.get("teacher_calls", 0) + manifest.get("teacher_calls_replayed", 0)
    if not calls or not folder.exists("eval", "metrics.json"):
        return {}
    return {
        "teacher_prompt": manifest["prompt_tokens"] / calls,
        "teacher_completion": manifest["completion_tokens"] / calls,
        "student_prompt": folder.read_json("eval", "metrics.json")["prompt_tokens_after"],
    }
