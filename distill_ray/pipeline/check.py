"""Check: everything that can be found wrong before anything is paid for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import ray

from distill_ray.config import OpenAIEngineConfig, RunConfig, SynthesizeDataConfig, VllmEngineConfig
from distill_ray.config.engine import FakeEngineConfig, HfEngineConfig, NoEngineConfig
from distill_ray.config.train import TopkKlConfig
from distill_ray.engines import make_engine
from distill_ray.errors import ConfigError, DataError
from distill_ray.models import Prompts, prompts_of, require_safetensors
from distill_ray.pipeline.cluster import connected, engine_resources
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.pipeline.synthesize import Requests
from distill_ray.pipeline.training.train import training_resources
from distill_ray.recipes import Recipe, make_recipe

SAMPLE_ROWS = 100


def check(config: RunConfig) -> Iterator[str]:
    """Yield one line per thing found in order.

    Raises:
        InputError: the first thing that is wrong.
    """
    recipe = make_recipe(config.recipe)
    yield f"recipe `{config.recipe.type}`: template and context"
    yield _check_data(config, recipe)
    yield _check_teacher(config)
    yield check_student(config)
    with connected():
        yield check_resources(config)


def _check_data(config: RunConfig, recipe: Recipe) -> str:
    """Its first rows, or what the teacher will be asked to write. Raises InputError."""
    if isinstance(config.data, SynthesizeDataConfig):
        Requests(config.data)
        return f"data: the teacher will write {config.data.count} queries, in {config.data.calls_needed} calls or more"
    with tempfile.TemporaryDirectory(prefix="distill-ray-check-") as scratch:
        plan = plan_rows(config, recipe, RunFolder(scratch), limit=SAMPLE_ROWS)
        bad, first = _problems(RunFolder(scratch))
    if bad == plan.rows_in:
        raise DataError(f"data: none of the {bad} first rows can be used, for example {first}")
    return f"data: {plan.rows_in} first rows read, {bad} of them unusable" + (f", for example {first}" if bad else "")


def check_student(config: RunConfig) -> str:
    """What the student's training needs of its model. Raises ConfigError."""
    student = config.student
    prompts = prompts_of(student, key="student.model")
    require_safetensors(student.model, key="student.model")
    if isinstance(config.train.loss, TopkKlConfig) and isinstance(config.teacher, VllmEngineConfig | HfEngineConfig):
        _require_same_tokens(prompts_of(config.teacher, key="teacher.model"), prompts)
    return f"student `{student.model}`: tokenizer, chat template and weights"


def _require_same_tokens(teacher: Prompts, student: Prompts) -> None:
    """Raises ConfigError: a token id means one text to the teacher and another to the student."""
    theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    different = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if different:
        raise ConfigError(
            f"train.loss: topk_kl needs one tokenizer for both, and teacher and student differ in {len(different)} "
            f"tokens (for example {different[0]!r}); take a student of the teacher's family, or cross_entropy"
        )


def check_resources(config: RunConfig) -> str:
    """What the stages ask Ray for, held against what there is. Raises ConfigError."""
    engine_resources(config)
    training_resources(config)
    resources = ray.cluster_resources()
    return f"Ray: {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs are enough to start"


def _problems(folder: RunFolder) -> tuple[int, str]:
    """How many planned rows are unusable, and the first of them in words."""
    tables = folder.read_tables("rows", columns=["source", "reject_reason", "reject_detail"])
    bad = [row for table in tables for row in table.to_pylist() if row["reject_reason"] is not None]
    return len(bad), "{source}: {reject_reason}: {reject_detail}".format(**bad[0]) if bad else ""


def _check_teacher(config: RunConfig) -> str:
    teacher = config.teacher
    if isinstance(teacher, FakeEngineConfig | NoEngineConfig):
        return f"teacher `{teacher.type}`"
    if isinstance(teacher, OpenAIEngineConfig):
        if teacher.api_key_env and not os.environ.get(teacher.api_key_env):
            raise ConfigError(
                f"teacher.api_key_env: the environment variable {teacher.api_key_env} is not set; "
                f"run `export {teacher.api_key_env}=...`, or set `api_key_env: null` for a server without keys"
            )
        return f"teacher `{teacher.model}` at {teacher.base_url}: key is set (the server was not asked)"
    if not isinstance(teacher, VllmEngineConfig | HfEngineConfig):  # of another package, which knows what to look at
        return f"teacher `{teacher.type}`: {make_engine(teacher).identity} (nothing else was checked)"
    prompts_of(teacher, key="teacher.model")
    if not (isinstance(teacher, VllmEngineConfig) and "load_format" in teacher.engine_kwargs):
        require_safetensors(teacher.model, key="teacher.model")
    where = f"{teacher.num_gpus} GPUs per replica" if teacher.num_gpus else "CPU"
    pool = (
        f", {teacher.replicas.min} to {teacher.replicas.max} replicas" if isinstance(teacher, VllmEngineConfig) else ""
    )
    return f"teacher `{teacher.model}` on {teacher.type}: tokenizer and chat template; {where}{pool}"
