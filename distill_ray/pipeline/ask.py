"""Ask the student of a run: plain transformers in this process, on CPU or GPU, streaming."""

from __future__ import annotations

from collections.abc import AsyncIterator

from distill_ray.config import ContextRecipeConfig, ContextSource, HfEngineConfig, RecipeConfig, SamplingConfig
from distill_ray.engines.hf import HfEngine
from distill_ray.engines.hf_model import has_gpu
from distill_ray.errors import DistillError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import waiting
from distill_ray.pipeline.run import stored_config
from distill_ray.recipes import make_recipe
from distill_ray.records import Message, Row


def asked(recipe: RecipeConfig, question: str) -> list[Message]:
    """The question as the recipe puts it to the student."""
    if isinstance(recipe, ContextRecipeConfig):  # a context's file may be gone, and the student never sees it
        recipe = recipe.model_copy(update={"context": ContextSource(text="none")})
    return make_recipe(recipe).student_messages(Row("ask", "test", question, {}))


async def stream_answer(folder: RunFolder, question: str, max_tokens: int, temperature: float) -> AsyncIterator[str]:
    """The student's answer, piece by piece. The question is asked as the recipe asks: no template, no context."""
    if not folder.exists("student"):
        raise DistillError(f"{folder.root}: no student here yet; run `distill-ray train` first")
    config = stored_config(folder)
    has_adapter = config.student.lora is not None and not config.student.lora.merge
    student = folder.url("student")
    engine = HfEngine(
        HfEngineConfig(
            model=config.student.model if has_adapter else student,
            adapter=student if has_adapter else None,
            gpus=1 if has_gpu() else 0,
            revision=config.student.revision if has_adapter else None,
            chat_template=config.student.chat_template,
            chat_template_kwargs=config.student.chat_template_kwargs,
            trust_remote_code=config.student.trust_remote_code,
        )
    )
    messages = asked(config.recipe, question)
    with waiting("loading the student"):
        await engine.start()
    try:
        async for piece in engine.stream(messages, SamplingConfig(max_tokens=max_tokens, temperature=temperature)):
            yield piece
    finally:
        await engine.close()
