"""The built-in demo: its data keeps its promises, and the shipped folder is what the card says."""

import json
import random
import re
import subprocess
import sys

import pytest

from distill_ray.demo import (
    INSTRUCTION_PATH,
    LABELS,
    MODEL_PATH,
    film_rows,
    language_rows,
    problem_rows,
)
from distill_ray.demo.conversations import families
from distill_ray.demo.instructions import in_front_of, random_instruction, shipped_instruction
from distill_ray.demo.languages import LANGUAGES
from distill_ray.demo.reviews import names_person, review_chat
from distill_ray.demo.sentences import evidence, is_held_out

MAX_FOLDER_BYTES = 8 * 1024 * 1024


def test_importing_the_demo_imports_neither_torch_nor_transformers() -> None:
    heavy = "('torch', 'transformers', 'ray')"
    script = f"import sys, distill_ray.demo; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("rows_of", [language_rows, problem_rows, film_rows])
def test_the_same_arguments_give_the_same_rows(rows_of) -> None:
    assert rows_of(50, seed=3) == rows_of(50, seed=3)
    assert rows_of(50, seed=3) != rows_of(50, seed=4)


def test_rows_are_distinct() -> None:
    rows = language_rows(1600) + language_rows(400, held_out=True)
    assert len({row["text"] for row in rows}) == 2000
    assert len({row["id"] for row in rows}) == 2000


def test_every_label_is_present_and_none_other() -> None:
    assert {row["label"] for row in language_rows(500)} == set(LABELS)
    assert {row["label"] for row in language_rows(400, held_out=True)} == set(LABELS)
    assert set(LANGUAGES) | {"ot"} == set(LABELS)


def test_held_out_sentences_are_never_drawn_for_training() -> None:
    assert all(is_held_out(row["text"]) for row in language_rows(300, held_out=True))
    assert not any(is_held_out(row["text"]) for row in language_rows(300))


def test_held_out_sentences_are_never_in_a_training_conversation() -> None:
    rng = random.Random(0)
    contents = []
    for _ in range(100):
        family = families(rng)
        if family.shared and family.shared[0]["content"] == shipped_instruction():
            contents += [branch[0]["content"] for branch in family.branches]
    assert len(contents) > 50
    assert not any(map(is_held_out, contents))


def test_a_language_has_enough_words_and_templates() -> None:
    for label, language in LANGUAGES.items():
        assert len(language.templates) >= 12, label
        assert sum(map(len, language.slots.values())) >= 60, label


def test_evidence_is_in_the_text() -> None:
    for row in language_rows(300):
        if row["label"] != "ot":
            words = re.findall(r'"([^"]+)"', evidence(row["text"], row["label"]))
            assert words
            assert all(word in row["text"] for word in words)


def test_more_films_than_there_are_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="only 400 film titles"):
        film_rows(401)


def test_a_revision_names_no_person() -> None:
    rng = random.Random(0)
    chats = [review_chat(rng) for _ in range(200)]
    assert any(names_person(chat.draft) for chat in chats)
    assert not any(names_person(chat.revision) for chat in chats)


def test_equations_are_whole_numbers() -> None:
    for row in problem_rows(300):
        value = eval(row["label"])  # digits, brackets and signs of our own making
        assert value == int(value) >= 0


def test_the_instruction_names_every_label_and_the_answer_form() -> None:
    text = INSTRUCTION_PATH.read_text(encoding="utf-8")
    assert 1500 <= len(text) <= 2500
    assert all(f"- {label}: " in text for label in LABELS)
    assert "Final Answer:" in text


def test_instructions_are_paraphrased_and_keep_the_text_whole() -> None:
    rng = random.Random(0)
    assert len({random_instruction(rng) for _ in range(100)}) > 95
    assert in_front_of(" a text ", "Do it.", rng).endswith(" a text ")


def test_the_shipped_folder_is_complete_and_small() -> None:
    names = {path.name for path in MODEL_PATH.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert wanted | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) <= MAX_FOLDER_BYTES


def test_the_shipped_model_loads_as_float32_and_ends_at_its_end_token() -> None:
    config = json.loads((MODEL_PATH / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    generation = json.loads((MODEL_PATH / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert config["pad_token_id"] != config["eos_token_id"]


def test_the_chat_template_renders_content_verbatim() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    contents = ["  two blanks, a tab\tand a newline\n", "", " \n مرحبا 你好 {{ x }} ", "é\u00a0end "]
    chat = [
        {"role": role, "content": content}
        for role, content in zip(("system", "user", "assistant", "user"), contents, strict=True)
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        f"<|bos|><|system|>{contents[0]}<|end|><|user|>{contents[1]}<|end|><|assistant|>{contents[2]}<|end|>"
        f"<|user|>{contents[3]}<|end|><|assistant|>"
    )
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == rendered
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert tokenizer.eos_token == "<|end|>"
