"""The YAML: one clear message for whatever is wrong with it, and nothing heavy is imported to say so."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_ray.config import (
    OpenAIEngineConfig,
    RunConfig,
    StepByStepRecipeConfig,
    VllmEngineConfig,
    load_config,
    parse_config,
)
from distill_ray.errors import ConfigError

STARTERS = Path(__file__).resolve().parents[2] / "distill_ray" / "recipes" / "configs"
MINIMAL = {
    "recipe": {"type": "context", "context": {"text": "Answer in French."}},
    "data": {"source": "queries.jsonl"},
    "teacher": {"type": "fake"},
}
SCHEMA = RunConfig.model_json_schema()


def design_sketch() -> str:
    """The configuration sketch of the design, as it is written there."""
    return """
name: language-id
recipe:
  type: context
  context: {file: prompts/language.md}
  query: "{{ text }}"
  parse: {regex: 'Final Answer: (\\w+)'}
data: {source: data/queries.jsonl, holdout: 0.1}
teacher:
  type: vllm
  model: Qwen/Qwen3-30B-A3B-Instruct-2507
  replicas: {min: 1, max: 8}
  gpus: 1
  engine_kwargs: {max_model_len: 8192}
  sampling: {temperature: 0.15, max_tokens: 1000, n: 1, top_logprobs: 0}
  chat_template_kwargs: {enable_thinking: false}
student: {model: Qwen/Qwen3-1.7B, lora: {rank: 32}}
train: {epochs: 4, learning_rate: 1.0e-4, max_tokens_per_batch: 16384, workers: 4, gpus_per_worker: 1,
        deepspeed: {zero_stage: 2}}
evaluate: {metrics: [exact_match]}
"""


def test_the_designs_own_example_loads_with_paths_from_the_files_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(design_sketch())
    config = load_config(path)
    assert config.data.source == str(tmp_path / "data/queries.jsonl")
    assert config.recipe.context.file == str(tmp_path / "prompts/language.md")
    assert isinstance(config.teacher, VllmEngineConfig)
    assert config.teacher.replicas.max == 8
    assert config.teacher.model == "Qwen/Qwen3-30B-A3B-Instruct-2507"  # a hub id is no path
    assert config.train.deepspeed.zero_stage == 2


def test_a_url_stays_a_url(tmp_path: Path) -> None:
    config = parse_config({**MINIMAL, "data": {"source": "s3://bucket/queries"}}, base=tmp_path)
    assert config.data.source == "s3://bucket/queries"


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("train.epoch=3", "train.epoch", "unknown key (value 3); did you mean `epochs`?"),
        ("trian.epochs=3", "trian", "did you mean `train`?"),
        ("teacher.sampling.temperatur=1", "teacher.sampling.temperatur", "did you mean `temperature`?"),
        ("train.epochs=many", "train.epochs", "'many'"),
        ("train.epochs=0", "train.epochs", "greater than or equal to 1 (got 0)"),
        ("train=3", "train", "got 3"),
        ("teacher.type=vlmm", "teacher", "vlmm"),
        (
            "flywheel.clean={min_chars: 1000, max_chars: 10}",
            "flywheel.clean",
            "max_chars: 10, and an answer alone has min_chars: 1000 or more, so no pair would be left; give max_chars",
        ),
        ("teacher.replicas={min: 3, max: 2}", "teacher.replicas", "min (3) is above max (2)"),
        ("train.workers={min: 3, max: 2}", "train.workers", "min (3) is above max (2)"),
        ("train.workers=0", "train.workers", "greater than or equal to 1"),
        ("teacher.sampling.top_logprobs=5", "teacher.sampling.top_logprobs", "`fake` engine cannot"),
        ("recipe.parse={regex: '('}", "recipe.parse.regex", "not a regular expression"),
        ("recipe.parse={regex: a, after: b}", "recipe.parse", "exactly one of regex, json_field, after"),
        ("recipe.context={text: a, file: b}", "recipe.context", "exactly one of text, file, column"),
        ("data.holdout=1.5", "data.holdout", "got 1.5"),
        ("data={source: x, holdout: 0.6, validation_holdout: 0.6}", "data", "leave nothing to train on"),
        ("train.max_length=100000", "train", "one example would not fit"),
        ("name=../../etc", "name", "../../etc"),
        ("teacher.sampling={temperature: 0, n: 2}", "teacher.sampling", "all n = 2 samples would be the same"),
        ("teacher={type: openai, base_url: 'ftp://x'}", "teacher.base_url", "must start with http"),
        (
            "teacher={type: openai, base_url: 'http://me:pass@x'}",
            "teacher.base_url",
            "has a user name or a query in it",
        ),
        ("generate.max_reject_frac=2", "generate.max_reject_frac", "got 2"),
    ],
)
def test_a_wrong_value_names_its_key_the_value_and_the_way_out(override: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, where="my.yaml", overrides=[override])
    assert str(caught.value).startswith("my.yaml: ")
    assert key in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected keys and values"),
        (b"- a\n- b\n", "expected keys and values"),
        (b"name: [unclosed", "not valid YAML"),
        ("name: caf\xe9".encode("latin-1"), "not UTF-8"),
        (b"name: x", "recipe: missing"),
    ],
)
def test_a_file_that_is_no_config_is_one_message_with_its_path(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config("/nowhere/config.yaml")


@pytest.mark.parametrize("override", ["novalue", "=3", "a.b.c: 3"])
def test_a_malformed_override_shows_what_one_looks_like(override: str) -> None:
    with pytest.raises(ConfigError, match=r"dotted\.key=value"):
        parse_config(MINIMAL, overrides=[override])


def test_off_no_and_on_are_words_where_words_are_meant_and_booleans_where_those_are(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    serve = "serve: {guard: off, degraded: off, headers: on, collect: {enabled: no}}"
    path.write_text(f"{yaml.safe_dump(MINIMAL)}\n{serve}\n")
    config = load_config(path, overrides=["serve.show_requests=yes", "serve.model_aliases=[no, off]"]).serve
    assert (config.guard, config.degraded, config.headers, config.collect.enabled) == ("off", "off", True, False)
    assert (config.show_requests, config.model_aliases) == (True, ["no", "off"])


def test_an_override_in_scientific_notation_is_a_number() -> None:
    assert parse_config(MINIMAL, overrides=["train.learning_rate=1e-3"]).train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"type": "step_by_step", "label_column": "y", "marker": ""}, "marker"),
        ({"type": "step_by_step", "label_column": "y", "cut_at": ""}, "cut_at"),
        ({"type": "step_by_step", "label_column": "y", "label_pattern": ""}, "label_pattern"),
        ({"context": {"text": "x"}, "parse": {"after": ""}}, "parse.after"),
        ({"context": {"text": "x"}, "parse": {"regex": ""}}, "parse.regex"),
        ({"context": {"text": "x"}, "parse": {"json_field": ""}}, "parse.json_field"),
    ],
)
def test_a_marker_or_pattern_that_is_found_everywhere_is_refused(recipe: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.{re.escape(key)}: empty; .* \(got ''\)"):
        parse_config({**MINIMAL, "recipe": recipe})


def test_a_marker_may_be_the_end_of_a_line_and_cut_at_nothing_at_all() -> None:
    recipe = {"type": "step_by_step", "label_column": "y", "marker": "\n", "cut_at": None}
    loaded = parse_config({**MINIMAL, "recipe": recipe}).recipe
    assert isinstance(loaded, StepByStepRecipeConfig)
    assert (loaded.marker, loaded.cut_at) == ("\n", None)


@pytest.mark.parametrize(
    ("workers", "allowed"),
    [("4", [4]), ("{min: 1, max: 6}", [6, 3, 2, 1]), ("{min: 3, max: 8}", [8, 4]), ("{min: 4, max: 7}", [7])],
)
def test_fewer_workers_are_a_divisor_of_all_of_them(workers: str, allowed: list[int]) -> None:
    train = parse_config(MINIMAL, overrides=[f"train.workers={workers}", "train.gradient_accumulation=3"]).train
    assert (train.workers.allowed, train.workers.fewest) == (allowed, allowed[-1])
    assert train.num_parts == 3 * allowed[0]


def test_what_decides_a_training_is_the_full_gang_and_nothing_of_how_it_is_executed() -> None:
    def deciding(*settings: str) -> dict[str, object]:
        return parse_config(MINIMAL, overrides=[f"train.{setting}" for setting in settings]).train.deciding

    assert deciding("workers=4") == deciding("workers={min: 1, max: 4}", "cpus_per_worker=7", "max_failures=9")
    assert deciding("workers=4") != deciding("workers=2")
    assert deciding("workers=4") != deciding("workers=4", "seed=1")


def test_a_range_is_written_as_it_was_read() -> None:
    settings = ["teacher.replicas=2", "train.workers={min: 1, max: 4}"]
    config = parse_config(MINIMAL, overrides=settings)
    assert config.model_dump(mode="json")["teacher"]["replicas"] == 2
    assert config.train.model_dump(exclude_defaults=True)["workers"] == {"min": 1, "max": 4}
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_number_of_replicas_is_a_fixed_pool() -> None:
    config = parse_config(MINIMAL, overrides=["teacher.replicas=4"])
    assert (config.teacher.replicas.min, config.teacher.replicas.max) == (4, 4)


def test_an_api_key_has_no_place_in_the_config() -> None:
    with pytest.raises(ConfigError, match="api_key: unknown key") as caught:
        parse_config(MINIMAL, overrides=["teacher={type: openai, model: m, api_key: sk-canary}"])
    assert "sk-canary" not in str(caught.value)
    with pytest.raises(ConfigError, match="base_url: has a user name") as caught:
        parse_config(MINIMAL, overrides=["teacher={type: openai, model: m, base_url: 'https://me:canary@host/v1'}"])
    assert "canary" not in str(caught.value)
    assert "api_key" not in OpenAIEngineConfig.model_fields


def test_the_resolved_config_loads_again_unchanged(tmp_path: Path) -> None:
    import yaml

    config = parse_config(MINIMAL, base=tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_parsing_a_config_imports_nothing_heavy() -> None:
    code = (
        "import sys; from distill_ray.config import load_config; import distill_ray.cli;"
        "bad = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SECTION = "expected a section, keys with values"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "flywheel.shadow=true",
            f"flywheel.shadow: {SECTION} (got True); {{}} takes the defaults; null goes without it",
        ),
        ("flywheel.lora=false", f"flywheel.lora: {SECTION} (got False); {{}} takes the defaults; null goes without it"),
        ("flywheel=[1]", f"flywheel: {SECTION} (got [1]); {{}} takes the defaults"),
        ("serve.keys=sk-1", f"serve.keys: {SECTION} (got a value that is not shown here); {{}} takes the defaults"),
        ("data=true", f"data: {SECTION} (got True)"),
        ("recipe.parse=3", f"recipe.parse: {SECTION} (got 3); {{}} takes the defaults; null goes without it"),
        (
            "flywheel.trainer=openai",
            f"flywheel.trainer: {SECTION} (got 'openai'); write trainer: {{type: openai, ...}}",
        ),
        ("serve.teacher=openai", f"serve.teacher: {SECTION} (got 'openai'); write teacher: {{type: openai, ...}}"),
        (
            "flywheel.evaluation=a.csv",
            "flywheel.evaluation: expected a list (got 'a.csv'); for one write flywheel.eval",
        ),
        ("flywheel.evaluation=3", "flywheel.evaluation: expected a list (got 3)"),
        ("data=", "data: missing; add it"),
        ("recipe.rewards=labels", "recipe.rewards: unknown key (value 'labels'); known keys here: context, examples,"),
    ],
)
def test_what_stands_where_a_section_or_a_list_belongs_is_shown_with_what_may(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, where="my.yaml", overrides=[override])
    assert str(caught.value).startswith(f"my.yaml: {message}")


@pytest.mark.parametrize("section", ["student", "train", "train.loss", "serve.router", "flywheel", "flywheel.trainer"])
def test_a_section_with_nothing_under_it_takes_the_defaults(section: str) -> None:
    assert parse_config(MINIMAL, overrides=[f"{section}="]) == parse_config(MINIMAL)
    assert parse_config({**MINIMAL, "flywheel": None}, overrides=["flywheel.min_pairs=7"]).flywheel.min_pairs == 7


def test_null_stays_null_where_it_means_something() -> None:
    config = parse_config(MINIMAL, overrides=["flywheel.lora=", "serve.drift="])
    assert (config.flywheel.lora, config.serve.drift) == (None, None)


@pytest.mark.parametrize("starter", sorted(STARTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_starter_lets_no_model_think_that_thinks_unless_it_is_told_not_to(starter: Path) -> None:
    raw = yaml.safe_load(starter.read_text())
    models = [raw[role] for role in ("teacher", "student") if role in raw]
    thinking = [m for m in models if "Qwen3" in m["model"] and not m["model"].endswith("-Instruct-2507")]
    assert all(m["chat_template_kwargs"] == {"enable_thinking": False} for m in thinking)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("teacher.answer=Rating: [[7]]", "as a section (got {'Rating': [[7]]}); quote text"),
        ("teacher.answer=[[7]]", "as a list (got [[7]]); quote text"),
    ],
)
def test_text_that_yaml_reads_as_something_else_is_shown_with_a_hint_at_quotes(override: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=[override])
    assert f"teacher.answer: expected text, and YAML reads this {shown}" in str(caught.value)
    assert """--set 'teacher.answer="..."'""" in str(caught.value)


# -- properties --------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["type", "model", "file", "column", "regex", "members", "engine", "min", "dataset", "text"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ODD_VALUES = st.sampled_from(
    ["", " ", "{{ x", "(", "s3://", "http://[", "a\0b", "~nobody-here/x", "\ud800", "\U0001f600", "x" * 5000, 10**400]
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a config."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def spoilt_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A starter, in which something is left out, replaced or added."""
    raw = yaml.safe_load(draw(st.sampled_from(sorted(STARTERS.glob("*.yaml")))).read_text())
    for _ in range(draw(st.integers(1, 3))):
        *parents, leaf = draw(st.sampled_from(sorted(places(raw), key=str) or [("name",)]))
        node = functools.reduce(lambda inner, key: inner[key], parents, raw)
        action = draw(st.sampled_from(["leave out", "replace", "add"]))
        if action == "leave out" and leaf in raw:
            del node[leaf]
        elif action == "add" and isinstance(node, dict):
            node[draw(WORDS | st.text(max_size=5))] = draw(ODD_VALUES | JSON_VALUES)
        else:
            node[leaf] = draw(ODD_VALUES | JSON_VALUES)
    return raw


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=spoilt_configs())
def test_a_spoilt_config_is_a_config_or_one_error(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(raw))
    with pytest.MonkeyPatch.context() as patch:  # it says what may stand somewhere, and is slow to make
        patch.setattr(RunConfig, "model_json_schema", lambda schema=SCHEMA: schema)
        try:
            config = load_config(tmp_path / "config.yaml")
        except ConfigError:
            return
    assert parse_config(json.loads(config.model_dump_json())) == config
