"""Check: everything that can be found wrong before anything is paid for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

from distill_ray.config import OpenAIEngineConfig, RunConfig, VllmEngineConfig
from distill_ray.config.engine import FakeEngineConfig
from distill_ray.errors import ConfigError
from distill_ray.models import ChatTokenizer
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.recipes import make_recipe

SAMPLE_ROWS = 100


def check(config: RunConfig) -> Iterator[str]:
    """Yield one line per thing found in order.

    Raises:
        InputError: the first thing that is wrong.
    """
    recipe = make_recipe(config.recipe)
    yield f"recipe `{config.recipe.type}`: template and context"
    with tempfile.TemporaryDirectory(prefix="distill-ray-check-") as scratch:
        plan = plan_rows(config, recipe, RunFolder(scratch), limit=SAMPLE_ROWS)
        bad = sum(
            sum(reason is not None for reason in table["reject_reason"].to_pylist())
            for table in RunFolder(scratch).read_tables("rows", columns=["reject_reason"])
        )
    yield f"data: {plan.rows_in} first rows read, {bad} of them unusable"
    yield _check_teacher(config)
    student = config.student
    ChatTokenizer.of(student, key="student.model")
    yield f"student `{student.model}`: tokenizer and chat template"


def _check_teacher(config: RunConfig) -> str:
    teacher = config.teacher
    if isinstance(teacher, FakeEngineConfig):
        return "teacher `fake`"
    if isinstance(teacher, OpenAIEngineConfig):
        if teacher.api_key_env and not os.environ.get(teacher.api_key_env):
            raise ConfigError(
                f"teacher.api_key_env: the environment variable {teacher.api_key_env} is not set; "
                f"run `export {teacher.api_key_env}=...`, or set `api_key_env: null` for a server without keys"
            )
        return f"teacher `{teacher.model}` at {teacher.base_url}: key is set (the server was not asked)"
    ChatTokenizer.of(teacher, key="teacher.model")
    where = f"{teacher.num_gpus} GPUs per replica" if teacher.num_gpus else "CPU"
    pool = (
        f", {teacher.replicas.min} to {teacher.replicas.max} replicas" if isinstance(teacher, VllmEngineConfig) else ""
    )
    return f"teacher `{teacher.model}` on {teacher.type}: tokenizer and chat template; {where}{pool}"
