"""What `distill-ray check` refuses before anything is paid: one line for each way to get a recipe wrong.

Every case ends before Ray is started and before any weights are read.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from distill_ray.cli import main
from distill_ray.config import parse_config
from distill_ray.errors import ConfigError
from distill_ray.models import DEMO_MODELS
from distill_ray.pipeline.capacity import engine_options, teacher_gpus, teacher_needs
from distill_ray.pipeline.check import check, check_reward, check_teacher, evaluation_warnings, recipe_warnings

JUDGE = {"type": "judge"}
CONTEXT = {"type": "context", "context": {"text": "Answer."}}
STEP_BY_STEP = {"type": "step_by_step", "label_column": "label"}
SENTIMENT = {"type": "classifier", "model": "demo-sentiment", "labels": {"positive": 1}}
TOPK = {"loss": {"type": "topk_kl"}}
SOFT = {"type": "vllm", "model": "demo", "sampling": {"top_logprobs": 5}}


def critique(reward: dict[str, Any]) -> dict[str, Any]:
    return {"type": "self_critique", "reward": reward}


@pytest.fixture
def models(tmp_path: Path, tiny_t5: Path, tiny_model: Path) -> dict[str, str]:
    """Models by name, some of them a config.json and a tokenizer only: no check may need more."""
    made = {"T5": str(tiny_t5), "OTHER": str(tiny_model), "NOWHERE": str(tmp_path / "nowhere")}
    for name, labels, kind in (("ONE", ["score"], "ForSequenceClassification"), ("HEADLESS", ["a", "b"], "Model")):
        folder = tmp_path / name
        shutil.copytree(DEMO_MODELS["demo-sentiment"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text())
        config.pop("problem_type", None)  # it is one of several labels
        names = {str(i): label for i, label in enumerate(labels)}
        config |= {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
        config["architectures"] = [config["architectures"][0].replace("ForSequenceClassification", kind)]
        (folder / "config.json").write_text(json.dumps(config))
        made[name] = str(folder)
    template = Path(made["ONE"] + "_WITH_TEMPLATE")
    shutil.copytree(made["ONE"], template)
    (template / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return made | {"TEMPLATE": str(template)}


def named(value: Any, models: dict[str, str]) -> Any:
    """The value with the models' folders for their names."""
    if isinstance(value, dict):
        return {key: named(item, models) for key, item in value.items()}
    return models.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        # rewards, by their config.json
        (
            {"recipe": critique({**SENTIMENT, "labels": {"great": 1}})},
            "recipe.reward.labels: demo-sentiment has no label 'great'; it has: negative, mixed, positive",
        ),
        ({"recipe": critique({**SENTIMENT, "model": "NOWHERE"})}, "recipe.reward.model: no model at "),
        ({"recipe": critique({**SENTIMENT, "model": "HEADLESS"})}, "needs a ...ForSequenceClassification"),
        ({"recipe": critique({"type": "reward_model", "model": "demo"})}, "needs a ...ForSequenceClassification"),
        ({"recipe": critique({"type": "entities", "model": "demo-sentiment"})}, "needs a ...ForTokenClassification"),
        (
            {"recipe": critique({"type": "entities", "model": "demo-names", "labels": ["ORG"]})},
            "recipe.reward.labels: demo-names has no label 'ORG'; it has: ",
        ),
        (
            {"recipe": critique({"type": "reward_model", "model": "demo-sentiment"})},
            "has 3 outputs, a reward model has",
        ),
        ({"recipe": critique({"type": "reward_model", "model": "ONE"})}, "has no chat template; a reward model needs"),
        ({"recipe": critique({"type": "reward_model", "model": "TEMPLATE"})}, "has no weights in safetensors"),
        # judges
        (
            {"recipe": critique({**JUDGE, "engine": {"type": "openai", "model": "m", "api_key_env": "NO_SUCH_KEY"}})},
            "recipe.reward.engine.api_key_env: the environment variable NO_SUCH_KEY is not set",
        ),
        (
            {"recipe": critique({**JUDGE, "engine": {"type": "hf", "model": "NOWHERE"}})},
            "recipe.reward.engine.model: no model at ",
        ),
        ({"recipe": critique({**JUDGE, "engine": {"type": "none"}})}, "recipe.reward: engine.type none is nobody"),
        (
            {"recipe": critique({**JUDGE, "engine": {"type": "fake", "sampling": {"temperature": 1.0}}})},
            "recipe.reward: engine.sampling: a judge answers at temperature 0",
        ),
        ({"recipe": critique({**JUDGE, "prompt": "Good? {{ query }}"})}, "recipe.reward.prompt: a rating has to show"),
        ({"recipe": critique({**JUDGE, "lowest": 5, "highest": 5})}, "lowest (5) is not below highest (5)"),
        ({"recipe": critique({"type": "regex", "pattern": "("})}, "recipe.reward.pattern: not a regular expression"),
        ({"recipe": critique({"type": "regex", "pattern": "a", "score": 0})}, "recipe.reward.score: 0 makes every"),
        # keys without effect or sense
        (
            {"recipe": {**critique({"type": "length"}), "accept": {"threshold": 0.5}}},
            "recipe.accept: threshold is for `type: threshold`, and the type is improve",
        ),
        (
            {"recipe": {**critique({"type": "length"}), "accept": {"temperature": 2.0, "type": "always"}}},
            "recipe.accept: temperature is for `type: metropolis`, and the type is always",
        ),
        (
            {
                "recipe": {
                    **critique({**JUDGE, "mode": "comparison"}),
                    "accept": {"type": "threshold", "threshold": 7},
                }
            },
            "recipe: accept.threshold is 7, and a judge that compares gives rewards from 0 to 1",
        ),
        (
            {"recipe": {**STEP_BY_STEP, "rationale_prompt": "predict: {{ query }}"}},
            "recipe: label_prompt and rationale_prompt are the same",
        ),
        (
            {"recipe": {**STEP_BY_STEP, "rationale_column": "text"}, "data": {"alongside": {"text": "three.json"}}},
            "data.alongside.text: rows.jsonl:1 has a column `text` already",
        ),
        # encoder-decoders are not for vLLM
        ({"teacher": {"type": "vllm", "model": "T5"}}, "teacher: vLLM runs no encoder-decoder models"),
        (
            {"recipe": critique({**JUDGE, "engine": {"type": "vllm", "model": "T5"}})},
            "recipe.reward.engine: vLLM runs no encoder-decoder models",
        ),
        ({"student": {"model": "T5"}}, "set evaluate.engine: hf"),
        # soft targets
        (
            {"teacher": {**SOFT, "engine_kwargs": {"max_logprobs": 3}}},
            "teacher: sampling.top_logprobs is 5 but engine_kwargs allows max_logprobs 3",
        ),
        (
            {"teacher": {"type": "openai", "model": "gpt", "sampling": {"top_logprobs": 21}}},
            "teacher: sampling.top_logprobs is 21, and OpenAI's API gives 20 at most",
        ),
        (
            {"teacher": {**SOFT, "sampling": {"top_logprobs": 4097}}},
            "teacher.sampling.top_logprobs: 4097, and demo has a vocabulary of 4096 tokens; lower it",
        ),
        ({"teacher": {"type": "hf", "sampling": {"top_logprobs": 5}}}, "the `hf` engine cannot do this"),
        ({"train": TOPK}, "set teacher.sampling.top_logprobs"),
        ({"train": TOPK, "teacher": SOFT, "student": {"model": "OTHER"}}, "needs one tokenizer for both"),
        ({"train": TOPK, "teacher": SOFT, "recipe": STEP_BY_STEP}, "the `step_by_step` recipe have no soft targets"),
        (
            {"train": TOPK, "teacher": SOFT, "recipe": critique({"type": "length"})},
            "the `self_critique` recipe have no soft targets",
        ),
        (
            {"train": TOPK, "teacher": {"type": "openai", "model": "m", "sampling": {"top_logprobs": 5}}},
            "set return_token_ids and return_tokens_as_token_ids to true in teacher.extra_body",
        ),
        # rationales
        ({"recipe": {**STEP_BY_STEP, "alpha": 1.5}}, "recipe.alpha: Input should be less than or equal to 1 (got 1.5)"),
        ({"recipe": {**STEP_BY_STEP, "alpha": -0.1}}, "recipe.alpha: Input should be greater than or equal to 0"),
        (
            {"recipe": {**STEP_BY_STEP, "rationale_column": "why"}, "data": {"alongside": {"why": "why.json"}}},
            "data.alongside.why: ends after 1 elements and data.source goes on (rows.jsonl:2)",
        ),
        ({"recipe": {**STEP_BY_STEP, "label_column": "gold"}}, "recipe.label_column: unknown column `gold`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_refuses_with_the_key_and_the_way_out(
    sections: dict[str, Any],
    message: str,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"text": "a{i}", "input": "b{i}", "label": "c"}}\n' for i in range(3))
    )
    (tmp_path / "why.json").write_text('["because"]')
    (tmp_path / "three.json").write_text('["because", "since", "for"]')
    sections = named(sections, models)
    data = {"source": "rows.jsonl", **sections.pop("data", {})}
    config = {"recipe": CONTEXT, "teacher": {"type": "fake"}, "data": data, **sections}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["distill-ray", "check", str(tmp_path / "config.yaml")])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if sections.get("teacher", {}).get("type") == "openai":
        monkeypatch.setenv("OPENAI_API_KEY", "a key")
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert message in error
    assert caught.value.code == 2
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (SENTIMENT, "reward `classifier`: demo-sentiment has negative, mixed, positive"),
        ({"type": "length"}, "reward `length`"),
        (JUDGE, "reward `judge`: the teacher"),
        ({**JUDGE, "engine": {"type": "hf", "model": "demo"}}, "reward `judge`: `demo` on hf: tokenizer and chat"),
    ],
)
def test_check_says_what_it_found_of_a_reward(reward: dict[str, Any], line: str) -> None:
    config = parse_config({"recipe": critique(reward), "data": {"source": "x.jsonl"}, "teacher": {"type": "fake"}})
    assert list(check_teacher(config)) == ["teacher `fake`"]
    [found] = check_reward(config)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "recipe",
    [
        {**STEP_BY_STEP, "rationale_column": "why"},
        {**STEP_BY_STEP, "mode": "standard"},
        {
            "type": "self_critique",
            "chains": {"draft": "a", "revision": "b", "reward_before": "c", "reward_after": "d"},
        },
    ],
)
def test_a_teacher_that_nobody_asks_needs_no_key_and_no_hardware(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    teacher = {"type": "openai", "model": "m"}
    config = parse_config({"recipe": recipe, "data": {"source": "x.jsonl"}, "teacher": teacher})
    assert list(check_teacher(config)) == ["teacher: nobody is asked"]
    there = parse_config({"recipe": recipe, "data": {"source": "x.jsonl"}, "teacher": {"type": "vllm", "gpus": 8}})
    assert teacher_needs(there)[0].bundles == [{"CPU": 1.0}]
    assert engine_options(there.teacher, teacher_gpus(there, there.teacher)) == {"num_cpus": 1.0, "num_gpus": 0}
    writes = {"type": "synthesize", "count": 1, "topics": ["a"]}
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        list(check_teacher(parse_config({"recipe": recipe, "data": writes, "teacher": teacher})))


def test_a_broken_teacher_does_not_hide_a_broken_student_or_a_file_that_is_not_there(tmp_path: Path) -> None:
    raw = {
        "recipe": CONTEXT,
        "data": {"source": str(tmp_path / "nowhere.jsonl")},
        "teacher": {"type": "hf", "model": "./no-teacher"},
        "student": {"model": "./no-student"},
    }
    with pytest.raises(ConfigError) as caught:
        list(check(parse_config(raw, base=tmp_path)))
    message = str(caught.value)
    assert message.startswith("3 things are wrong:")
    assert all(name in message for name in ("nowhere.jsonl", "no-teacher", "no-student"))
    assert len(message.splitlines()) == 4


def test_a_context_that_is_not_there_hides_nothing_else_and_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "rules.md").write_text("Answer.")
    raw = {
        "recipe": {"type": "context", "context": {"file": "prompt.txt"}},
        "data": {"source": "nowhere.jsonl", "test": "neither.jsonl"},
        "teacher": {"type": "fake"},
        "student": {"model": "./no-student"},
    }
    with pytest.raises(ConfigError) as caught:
        list(check(parse_config(raw, base=tmp_path)))
    [first, *lines] = str(caught.value).splitlines()
    assert first == "4 things are wrong:"
    assert lines[0] == f"  - recipe.context.file: {tmp_path}/prompt.txt: no such file; {tmp_path} has: rules.md"
    for line, name in zip(lines[1:], ("data.test", "data.source", "student.model"), strict=True):
        assert line.startswith(f"  - {name}: ")


def test_all_columns_that_no_row_has_are_named_source_by_source(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "draft": "b"}\n')
    (tmp_path / "test.jsonl").write_text('{"query": "a"}\n')
    chains = {"draft": "draft", "revision": "x", "reward_before": "y", "reward_after": "z"}
    raw = {
        "recipe": {"type": "self_critique", "chains": chains},
        "data": {"source": "rows.jsonl", "test": "test.jsonl"},
    }
    with pytest.raises(ConfigError) as caught:
        list(check(parse_config(raw, base=tmp_path)))
    message = str(caught.value)
    for name, column in (("revision", "x"), ("reward_before", "y"), ("reward_after", "z")):
        assert message.count(f"recipe.chains.{name}: unknown column `{column}`") == 2
    assert "; data.source has: text, draft" in message
    assert "; data.test has: query. Its rows" in message


def test_a_model_that_the_hub_does_not_give_is_said_with_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it retries for half a minute
    raw = {"recipe": CONTEXT, "data": {"source": "x"}, "teacher": {"type": "hf", "model": "nobody/no-such-model"}}
    with pytest.raises(ConfigError, match=r"teacher\.model: cannot load nobody/no-such-model .*HF_HUB_OFFLINE=1"):
        list(check_teacher(parse_config(raw)))
    assert "teacher.model: looking for nobody/no-such-model" in capsys.readouterr().err


def test_the_command_looks_at_the_flywheel_where_the_config_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside all else: `data` is what an offline run needs."""

    def said(**flywheel: object) -> str:
        raw = {"recipe": CONTEXT, "data": {"source": "nowhere.jsonl"}, "teacher": {"type": "fake"}, **flywheel}
        (tmp_path / "config.yaml").write_text(json.dumps(raw | {"student": {"model": "demo"}}))
        monkeypatch.setattr(sys, "argv", ["distill-ray", "check", str(tmp_path / "config.yaml")])
        with pytest.raises(SystemExit):
            main()
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "flywheel" not in said()
    assert "flywheel: 0 regression prompts; 0 requests of evaluation files; trained here" in said(flywheel={})
    both = said(flywheel={"gate": {"regressions": "must.jsonl"}})
    assert "2 things are wrong" in both
    assert f"flywheel.gate.regressions: {tmp_path}/must.jsonl: cannot be read" in both
    assert "nowhere.jsonl" in both


def test_a_run_checks_teacher_and_reward_before_it_pays(tmp_path: Path) -> None:
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.run import run

    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    raw = {
        "recipe": critique({**SENTIMENT, "labels": {"great": 1}}),
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "teacher": {"type": "fake"},
    }
    with pytest.raises(ConfigError, match="has no label 'great'"):
        run(parse_config(raw), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run" / "calls").exists()


def test_all_of_a_models_vocabulary_may_be_asked_for() -> None:
    teacher = {**SOFT, "sampling": {"top_logprobs": 4096}}
    config = parse_config({"recipe": CONTEXT, "data": {"source": "x.jsonl"}, "teacher": teacher})
    [line] = check_teacher(config)
    assert "tokenizer and chat template" in line


def test_a_server_that_allows_more_log_probabilities_may_be_asked_for_them() -> None:
    sampling = {"top_logprobs": 50}
    for teacher in (
        {"type": "openai", "model": "m", "base_url": "http://127.0.0.1:8000/v1", "sampling": sampling},
        {"type": "vllm", "model": "demo", "sampling": sampling},
        {"type": "vllm", "model": "demo", "sampling": sampling, "engine_kwargs": {"max_logprobs": -1}},
    ):
        config = parse_config({"recipe": CONTEXT, "data": {"source": "x.jsonl"}, "teacher": teacher})
        assert config.teacher.sampling.top_logprobs == 50


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({**CONTEXT, "query": "Say something."}, "recipe.query"),
        ({**STEP_BY_STEP, "label_prompt": "What is it?"}, "recipe.label_prompt"),
        ({**STEP_BY_STEP, "rationale_prompt": "Why is it?"}, "recipe.rationale_prompt"),
    ],
)
def test_a_prompt_without_any_column_is_a_warning(recipe: dict[str, Any], key: str) -> None:
    config = parse_config({"recipe": recipe, "data": {"source": "x.jsonl"}, "teacher": {"type": "fake"}})
    [line] = recipe_warnings(config)
    assert line.startswith(f"warning: {key}: names no column, so it is the same for every row")


def warned(data: dict[str, Any], evaluate: dict[str, Any]) -> list[str]:
    raw = {"recipe": CONTEXT, "data": {"source": "x.jsonl", **data}, "teacher": {"type": "fake"}, "evaluate": evaluate}
    return evaluation_warnings(parse_config(raw))


def test_a_student_that_nothing_will_be_known_of_is_a_warning() -> None:
    [line] = warned({"holdout": 0}, {})
    assert line.startswith("warning: data.holdout is 0 and data.test is missing")
    assert warned({"holdout": 0, "test": "t.jsonl"}, {}) == warned({}, {}) == []


def test_a_judge_that_nobody_asks_is_a_warning() -> None:
    judge = {"judge": {"type": "fake"}}
    assert warned({}, judge) == [
        "warning: evaluate.judge is for win_rate, which evaluate.metrics does not have; nobody judges"
    ]
    [line] = warned({}, {"judge_prompt": "{{ a }} {{ b }}"})
    assert line.startswith("warning: evaluate.judge_prompt is for win_rate")
    assert warned({}, {**judge, "metrics": ["win_rate"]}) == []


@pytest.mark.parametrize("recipe", [CONTEXT, STEP_BY_STEP, {**STEP_BY_STEP, "mode": "standard", "label_prompt": "x"}])
def test_prompts_that_are_asked_with_a_column_give_no_warning(recipe: dict[str, Any]) -> None:
    config = parse_config({"recipe": recipe, "data": {"source": "x.jsonl"}, "teacher": {"type": "fake"}})
    assert recipe_warnings(config) == []
