"""Cards of data set and model: their heads are read by machines, and what they say is what was run."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.cards import COLUMNS, METHODS, dataset_card, model_card, write_cards
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.recipes import RECIPES
from distill_ray.records import EXAMPLE_SCHEMA, Example, examples_table
from tests.unit.test_report import config, run  # noqa: F401  (a fixture)


@pytest.fixture
def trained(run: RunFolder) -> RunFolder:  # noqa: F811
    """The finished run, with the files that cards stand beside."""
    asked: list[Any] = [{"role": "user", "content": "q"}]
    examples = [Example("a", "train", asked, "x"), Example("b", "test", asked, "y"), Example("c", "train", asked, "z")]
    run.write_table(examples_table(examples), "examples", "00000.parquet")
    run.write_json({"task_type": "CAUSAL_LM"}, "student", "adapter_config.json")
    run.write_json({"is_encoder_decoder": False}, "student", "config.json")
    run.update_manifest({"generation_complete": True, "versions": {"distill-ray": "9.9"}})
    return run


def head_of(card: str) -> dict[str, Any]:
    before, head, _ = card.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(head)


def card_of(folder: RunFolder, **keys: Any) -> str:
    return model_card(Facts(folder, config(**keys)))


def test_both_are_written_beside_what_they_speak_of_and_are_the_same_when_written_again(trained: RunFolder) -> None:
    write_cards(Facts(trained, config()))
    cards = [trained.read_bytes(name, "README.md") for name in ("examples", "student")]
    trained.update_manifest({"spent": {"evaluate": {"seconds": 99.0, "replica_seconds": 99.0}}})
    write_cards(Facts(trained, config()))
    assert cards == [trained.read_bytes(name, "README.md") for name in ("examples", "student")]
    assert b"| test | 1 |\n| train | 2 |" in cards[0]


def test_a_run_that_has_hardly_begun_gets_none(run: RunFolder) -> None:  # noqa: F811
    write_cards(Facts(run, config()))
    assert not run.exists("examples", "README.md")
    assert not run.exists("student", "README.md")


def test_the_models_card_has_its_figures_with_their_intervals(trained: RunFolder) -> None:
    card = card_of(trained)
    assert "| exact match | 1.000 [1.000, 1.000] | 0.000 [0.000, 0.000] | 0.950 [0.850, 1.000] |" in card
    assert "On 20 held-out rows." in card
    assert "| examples | 97 |" in card
    assert "| validation loss | 0.2500 nats per token |" in card
    assert "arXiv 2112.00861" in card
    assert "Made by distill-ray 9.9." in card


def test_a_model_that_was_not_measured_says_so(trained: RunFolder) -> None:
    trained.delete("eval")
    assert "Not measured yet." in card_of(trained)


def test_licences_are_left_to_fill_in(trained: RunFolder) -> None:
    for card in (card_of(trained), dataset_card(Facts(trained, config()), {"train": 2})):
        assert (head_of(card)["license"], head_of(card)["license_name"]) == ("other", "fill-in")
        assert "To be filled in" in card


def test_a_base_model_is_named_where_it_is_public(trained: RunFolder) -> None:
    assert head_of(card_of(trained, student={"model": "org/small"}))["base_model"] == "org/small"
    assert "base_model" not in head_of(card_of(trained, student={"model": str(trained.root)}))
    assert "base_model" not in head_of(card_of(trained, student={"model": "s3://bucket/small"}))
    assert "base_model" not in head_of(card_of(trained, student={"model": "demo"}))


def test_cards_do_not_say_where_things_lie(trained: RunFolder) -> None:
    keys: dict[str, Any] = {
        "student": {"model": "s3://secret-bucket/small"},
        "teacher": {"type": "fake", "model": "/home/me/big"},
        "data": {"source": ["/home/me/q.jsonl", "s3://secret-bucket/more.parquet"]},
    }
    for card in (card_of(trained, **keys), dataset_card(Facts(trained, config(**keys)), {"train": 2})):
        assert "secret-bucket" not in card
        assert "/home/me" not in card
    assert "q.jsonl, more.parquet |" in dataset_card(Facts(trained, config(**keys)), {"train": 2})


def test_how_to_load_it_is_by_what_it_is(trained: RunFolder) -> None:
    adapters, whole = card_of(trained), card_of(trained, student={"model": "small-model"})
    assert (head_of(adapters)["library_name"], head_of(whole)["library_name"]) == ("peft", "transformers")
    assert "AutoPeftModelForCausalLM" in adapters
    assert "vllm serve student" not in adapters
    assert "AutoModelForCausalLM" in whole
    assert "vllm serve student" in whole
    trained.write_json({"is_encoder_decoder": True}, "student", "config.json")
    assert "AutoModelForSeq2SeqLM" in card_of(trained, student={"model": "small-model"})


def test_what_the_chat_template_was_given_is_in_the_code(trained: RunFolder) -> None:
    card = card_of(trained, student={"model": "m", "chat_template_kwargs": {"enable_thinking": False}})
    assert "enable_thinking=False" in card


def test_every_recipe_of_ours_has_its_paper() -> None:
    assert METHODS.keys() == RECIPES.keys()
    assert all("arXiv" in method for method in METHODS.values())


def test_the_columns_are_those_of_the_examples() -> None:
    assert COLUMNS.keys() <= set(EXAMPLE_SCHEMA.names)


def test_other_peoples_text_is_no_markup(trained: RunFolder) -> None:
    card = card_of(trained, student={"model": "</b>|`x`"})
    assert "</b>" not in card.split("---\n", 2)[2].replace('"student"', "")
    assert head_of(card)["base_model"] == "</b>|`x`"
