"""Rewards against values worked out by hand and by plain transformers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_ray.config.reward import (
    ClassifierRewardConfig,
    EntitiesRewardConfig,
    JudgeRewardConfig,
    LengthRewardConfig,
    RegexRewardConfig,
    RewardModelConfig,
)
from distill_ray.errors import ConfigError, RowError
from distill_ray.records import Answered, Completion, Message
from distill_ray.rewards import make_reward
from distill_ray.rewards.judge import JudgeReward


def answered(answer: str, query: str = "question") -> Answered:
    return Answered(({"role": "user", "content": query},), answer)


def test_a_pattern_counts_its_matches_up_to_a_limit() -> None:
    reward = make_reward(RegexRewardConfig(pattern=r"\bbad\b", score=-1.0, most=2))
    assert reward.score([answered("good"), answered("bad"), answered("bad bad bad")]) == [0.0, -1.0, -2.0]


def test_a_pattern_that_takes_for_ever_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_ray.recipes.patterns.LIMIT_S", 0.1)
    [value] = make_reward(RegexRewardConfig(pattern="(a|aa)+$")).score([answered("a" * 60 + "!")])
    assert math.isnan(value)


def test_length_is_the_distance_from_the_target() -> None:
    words = make_reward(LengthRewardConfig(target=3))
    assert words.score([answered("a b c"), answered("a"), answered("a b c d e")]) == [0.0, -2.0, -2.0]
    assert make_reward(LengthRewardConfig(unit="characters")).score([answered("abcd")]) == [-4.0]


def bert(folder: Path, kind: str, labels: list[str], tiny_model: Path) -> Path:
    """A random BERT with these labels and the tests' byte tokenizer."""
    import transformers as t

    tokenizer = t.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    getattr(t, kind)(config).save_pretrained(folder)
    return folder


TEXTS = ["a short one", "a text that is a good deal longer than the others", "x", "another"]


def test_a_classifier_gives_the_mean_score_of_its_labels_whatever_shares_the_batch(
    tmp_path: Path, tiny_model: Path
) -> None:
    import transformers as t

    path = bert(tmp_path, "BertForSequenceClassification", ["bad", "good"], tiny_model)
    reward = make_reward(ClassifierRewardConfig(model=str(path), labels={"good": 1.0, "bad": -1.0}, batch_size=2))
    model = t.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        plain = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in TEXTS]
    expected = [float(p[1] - p[0]) for p in plain]
    assert reward.score([answered(text) for text in TEXTS]) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) > 1


def test_labels_that_the_model_does_not_have_are_refused_with_those_that_it_has(
    tmp_path: Path, tiny_model: Path
) -> None:
    path = bert(tmp_path, "BertForSequenceClassification", ["bad", "good"], tiny_model)
    with pytest.raises(ConfigError, match=r"has no label 'great'; it has: bad, good"):
        make_reward(ClassifierRewardConfig(model=str(path), labels={"great": 1.0}))
    with pytest.raises(ConfigError, match=r"has 2 outputs, a reward model has one"):
        make_reward(RewardModelConfig(model=str(path)))


def test_a_reward_model_reads_the_whole_conversation(tmp_path: Path, tiny_model: Path) -> None:
    import transformers as t

    path = bert(tmp_path, "BertForSequenceClassification", ["score"], tiny_model)
    reward = make_reward(RewardModelConfig(model=str(path)))
    tokenizer = t.AutoTokenizer.from_pretrained(path)
    conversation = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]
    model = t.AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = float(model(input_ids=ids).logits[0, 0])
    assert reward.score([answered("so", "why?"), answered("a longer answer", "why?")])[0] == pytest.approx(
        expected, abs=1e-5
    )


def test_consecutive_pieces_of_a_name_count_once(tmp_path: Path, tiny_model: Path) -> None:
    path = bert(tmp_path, "BertForTokenClassification", ["O", "B-PER", "I-PER", "B-LOC"], tiny_model)
    reward: Any = make_reward(EntitiesRewardConfig(model=str(path)))
    assert reward._count(["O", "B-PER", "I-PER", "I-PER", "O", "B-PER", "B-LOC", "I-PER"]) == 3
    assert reward._count(["B-PER", "B-PER", "I-PER"]) == 1
    assert reward._count(["O", "B-LOC"]) == 0
    with pytest.raises(ConfigError, match=r"has no label 'ORG'; it has: LOC, PER"):
        make_reward(EntitiesRewardConfig(model=str(path), labels=["ORG"]))


class Judge:
    """Says what a function makes of the prompt."""

    name = "judge@1"

    def __init__(self, says: Any) -> None:
        self.says, self.asked = says, []

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        self.asked.append(messages[-1]["content"])
        return [Completion(self.says(messages[-1]["content"]), "stop", 1, 1)]


def rate(text: str, **config: Any) -> float:
    judge = Judge(lambda _: text)
    return asyncio.run(JudgeReward(JudgeRewardConfig(**config)).rate(answered("an answer"), judge))


def test_a_judges_last_rating_in_double_brackets_counts() -> None:
    assert rate("At first [[3]], but no: [[ 7.5 ]].") == 7.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no rating", r"no rating in \[\[ \]\]"),
        ("[[11]]", r"11 is not in 1..10"),
        ("[[0]]", "0 is not in"),
        ("", "no rating"),
    ],
)
def test_a_judge_without_a_rating_is_a_reject(text: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        rate(text)
    assert caught.value.reason == "no_reward"


def compare(says: Any) -> tuple[float, float]:
    reward = JudgeReward(JudgeRewardConfig(mode="comparison"))
    return asyncio.run(reward.compare(answered("draft"), answered("revision"), Judge(says)))


def test_a_comparison_is_asked_in_both_orders_and_averaged() -> None:
    assert compare(lambda prompt: "[[A]]") == (0.5, 0.5)  # a judge that always likes the first is worth nothing
    assert compare(lambda p: "[[B]]" if p.index("draft") < p.index("revision") else "[[A]]") == (0.0, 1.0)
    assert compare(lambda p: "[[B]]" if p.index("draft") < p.index("revision") else "[[C]]") == (0.25, 0.75)


@pytest.mark.parametrize("mode", ["rating", "comparison"])
def test_a_judge_that_fails_on_one_answer_is_waited_for_on_the_other(mode: str) -> None:
    """Both questions are on their way and paid for: a row that ended at the first would lose the second's answer."""

    class SlowJudge(Judge):
        answered = 0

        async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
            completions = await super().generate(messages)
            await asyncio.sleep(0.02 * len(self.asked))  # the second takes longer
            self.answered += 1
            return completions

    judge, reward = SlowJudge(lambda _: "hm"), JudgeReward(JudgeRewardConfig(mode=mode))
    ask = reward.compare if mode == "comparison" else reward.rate_both

    async def both() -> int:
        with pytest.raises(RowError, match="the judge gives no"):
            await ask(answered("draft"), answered("revision"), judge)
        return judge.answered

    assert asyncio.run(both()) == 2


def test_what_is_judged_is_text_and_never_a_template() -> None:
    judge = Judge(lambda _: "[[5]]")
    asyncio.run(JudgeReward(JudgeRewardConfig()).rate(answered("{{ 7 * 7 }}"), judge))
    assert "{{ 7 * 7 }}" in judge.asked[0]


def test_a_judges_prompt_has_to_show_what_is_judged() -> None:
    with pytest.raises(ConfigError, match=r"a rating has to show answer"):
        JudgeReward(JudgeRewardConfig(prompt="How good is it? {{ query }}"))
    with pytest.raises(ConfigError, match=r"a comparison has to show b"):
        JudgeReward(JudgeRewardConfig(mode="comparison", prompt="{{ a }}"))
