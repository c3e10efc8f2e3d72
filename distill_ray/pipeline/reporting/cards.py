"""Cards for what leaves a run: examples/README.md for the data set, student/README.md for the model.

They hold what was run and measured, and nothing that changes when the same is run again. Licences are left to fill in:
who may use a model that learnt from another one and from somebody's data, no program knows.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distill_ray.config import RunConfig
from distill_ray.models import DEMO_MODELS
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.recipe_figures import figure_lines
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.markdown import cell, code, table, text_table
from distill_ray.pipeline.reporting.result import figure, result_rows, role_titles
from distill_ray.pipeline.reporting.wording import changed, learned, source, teacher, without_place

METHODS = {
    "context": "Context distillation: the teacher answers with a context that the student never sees (Askell et al. "
    "2021, arXiv 2112.00861; Snell et al. 2022, arXiv 2209.15189).",
    "self_critique": "Distilled Self-Critique: the teacher drafts, criticises its draft and revises it; what a reward "
    "accepts is learnt as if it had been the first answer (arXiv 2312.01957).",
    "step_by_step": "Distilling Step-by-Step: the student learns labels, and rationales as a second task (Hsieh et al. "
    "2023, arXiv 2305.02301).",
}
COLUMNS = {
    "messages": "what the student sees",
    "completion": "what it is to answer",
    "split": "train, validation, or test, which is only measured on",
    "task": "answer, or rationale",
    "weight": "of the example in training",
    "teacher": "who said it",
    "teacher_answer": "what the teacher said, where something else is learnt",
    "reference": "the right answer, where the data has one",
}
ALL = "examples"
"""What `datasets` is to call the files of a run's folder. Not `train`: what is only measured on is among them."""

_TO_FILL = {"license": "other", "license_name": "fill-in"}
_TAGS = ["distillation", "distill-ray"]


def write_cards(facts: Facts) -> None:
    """Write the cards of what is there: the examples of a finished generation, and the student of a finished training.

    Raises:
        RunFolderError: one of them cannot be written.
    """
    folder = facts.folder
    if facts.manifest.get("generation_complete"):
        counts = Counter[str]()
        for found in folder.read_tables("examples", columns=["split"]):
            counts.update(found["split"].to_pylist())
        if counts:
            folder.write_bytes(dataset_card(facts, counts).encode(), "examples", "README.md")
    if facts.train and folder.exists("student"):
        folder.write_bytes(model_card(facts).encode(), "student", "README.md")


def dataset_card(facts: Facts, counts: Mapping[str, int], files: Mapping[str, str] | None = None) -> str:
    """The card of the examples.

    Args:
        facts: of the run.
        counts: examples by split.
        files: pattern of each split's files, where every split has its own; tells `datasets` what is what.
    """
    config = facts.config
    patterns = [{"split": split, "path": path} for split, path in (files or {ALL: "*.parquet"}).items()]
    head = {
        **_TO_FILL,
        "task_categories": ["text-generation"],
        "tags": _TAGS,
        "configs": [{"config_name": "default", "data_files": patterns}],
    }
    origin = {
        "queries": ", ".join(map(without_place, source(config))),
        "teacher": teacher(config),
        "sampling": changed(config.teacher.sampling),
    }
    return _rendered(
        "dataset_card.md",
        facts,
        head,
        splits=table(["split", "examples"], [[cell(split), f"{counts[split]:,}"] for split in sorted(counts)]),
        columns=text_table(["column", ""], list(COLUMNS.items())) if files is None else "",
        origin=text_table(["", ""], list(origin.items())),
        quality=_quality(facts),
    )


def model_card(facts: Facts) -> str:
    """The card of the student, with the evaluation where there was one."""
    config, trained, metrics = facts.config, facts.train, facts.metrics
    model, lora = config.student.model, config.student.lora
    is_adapter = lora is not None and not lora.merge
    is_public = model not in DEMO_MODELS and not os.path.exists(model) and without_place(model) == model
    head = {
        **_TO_FILL,
        **({"base_model": model} if is_public else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": _TAGS,
    }
    loss = trained.get("validation_loss")
    training = {
        "base model": without_place(model),
        "weights": f"LoRA, rank {lora.rank}" if lora else "all",
        "examples": f"{trained.get('examples', 0):,}",
        "steps": f"{trained.get('steps', 0):,}; the weights of step {trained.get('kept_step')} were kept",
        "validation loss": f"{loss:.4f} nats per token" if isinstance(loss, float) else "no validation examples",
        "settings": changed(config.train),
    }
    return _rendered(
        "model_card.md",
        facts,
        head,
        base=cell(without_place(model)),
        teacher=cell(teacher(config)),
        is_adapter=is_adapter,
        use=code(_use(facts, is_adapter), "python"),
        training=text_table(["", ""], list(training.items())),
        result=table(["", *role_titles(metrics)], result_rows(metrics)) if metrics else "",
        num_rows=metrics.get("num_rows", 0),
    )


def _rendered(template: str, facts: Facts, head: Mapping[str, Any], **values: Any) -> str:
    return (
        _templates()
        .get_template(template)
        .render(
            head=yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True),
            config=facts.config,
            manifest=facts.manifest,
            version=facts.manifest.get("versions", {}).get("distill-ray", ""),
            learned=learned(facts.config, facts.metrics),
            method=_method(facts.config),
            **values,
        )
    )


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: what is foreign goes through `cell`
    )


def _method(config: RunConfig) -> str:
    return METHODS.get(config.recipe.type, f"Recipe `{config.recipe.type}`.")


def _quality(facts: Facts) -> list[str]:
    lines = list(figure_lines(facts.manifest.get("recipe_figures", {})))
    if judged := facts.metrics.get("teacher"):
        lines.append(
            f"the teacher, on held-out rows whose answer is known: exact match {figure(judged, 'exact_match')}"
        )
    return lines


def _use(facts: Facts, is_adapter: bool) -> str:
    """How to load and ask it: adapters find their base model by themselves."""
    auto = "AutoModelForSeq2SeqLM" if _is_seq2seq(facts.folder, is_adapter) else "AutoModelForCausalLM"
    tokenizer = "from transformers import AutoTokenizer"
    if is_adapter:
        auto = auto.replace("AutoModel", "AutoPeftModel")
        imports = [f"from peft import {auto}", tokenizer]
    else:
        imports = [tokenizer.replace("import ", f"import {auto}, ")]
    if "Seq2Seq" in auto:
        prompt, start = 'tokenizer(question, return_tensors="pt")', ""
    else:
        asked = '[{"role": "user", "content": question}]'
        kwargs = "".join(f", {name}={value!r}" for name, value in facts.config.student.chat_template_kwargs.items())
        prompt = f"tokenizer.apply_chat_template(\n    {asked}, add_generation_prompt=True, return_dict=True"
        prompt += f', return_tensors="pt"{kwargs}\n)'
        start = '[prompt["input_ids"].shape[1] :]'
    most = facts.config.evaluate.max_tokens or facts.config.teacher.sampling.max_tokens
    return "\n".join(
        [
            *imports,
            "",
            'tokenizer = AutoTokenizer.from_pretrained("student")',
            f'model = {auto}.from_pretrained("student")',
            'question = "..."',
            f"prompt = {prompt}",
            f"answer = model.generate(**prompt, do_sample=False, max_new_tokens={most})",
            f"print(tokenizer.decode(answer[0]{start}, skip_special_tokens=True))",
        ]
    )


def _is_seq2seq(folder: RunFolder, is_adapter: bool) -> bool:
    if is_adapter:
        return folder.read_json("student", "adapter_config.json").get("task_type") == "SEQ_2_SEQ_LM"
    return bool(folder.read_json("student", "config.json").get("is_encoder_decoder"))
