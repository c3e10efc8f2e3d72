"""Parts from other packages: chosen by name like ours, and one clear message for whatever is wrong with them."""

from __future__ import annotations

import gzip
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_ray import plugins
from distill_ray.config import FakeEngineConfig, RunConfig, parse_config
from distill_ray.doctor import examine
from distill_ray.engines import Engine, make_engine
from distill_ray.errors import ConfigError, DataError, DistillError, NoReadableRow
from distill_ray.pipeline.check import check_teacher
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generation_fingerprint
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.pipeline.planning.readers import read_rows
from distill_ray.pipeline.planning.sources import resolve
from distill_ray.pipeline.reporting.result import summary_table
from distill_ray.pipeline.run import versions
from distill_ray.pipeline.scoring import score_predictions
from distill_ray.plugins import Group
from distill_ray.recipes import make_recipe

BUILT_IN: dict[str, Any] = {
    "recipe": {"type": "context", "context": {"text": "Answer."}},
    "data": {"source": "queries.jsonl"},
    "teacher": {"type": "fake"},
}
EXAMPLE: dict[str, Any] = {
    "recipe": {"type": "best_of", "samples": 3, "reward": {"type": "endings", "best": 1}},
    "data": {"source": "queries.toml", "format": "toml"},
    "teacher": {"type": "parrot", "ending": "?"},
    "evaluate": {"metrics": ["same_letters"]},
}


@pytest.fixture
def installed(example_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(example_plugin)
    return example_plugin


def install(folder: Path, entry_points: str, code: str, package: str = "broken", version: str = "0.3") -> None:
    """What pip leaves behind of a package of one module."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / f"{package}.py").write_text(code)


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the import path for packages that a test makes up; what is imported from it is forgotten."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    plugins._entry_points.cache_clear()
    yield folder
    plugins._entry_points.cache_clear()
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# -- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_parts_of_another_package_are_configured_like_ours_and_the_stored_config_loads_again() -> None:
    config = parse_config(EXAMPLE, overrides=["recipe.samples=5", "teacher.replicas=2"])
    dumped = config.model_dump(mode="json")
    assert dumped["recipe"] == {
        "type": "best_of",
        "query": "{{ text }}",
        "samples": 5,
        "reward": {"type": "endings", "best": 1},
    }
    assert (dumped["teacher"]["ending"], dumped["teacher"]["replicas"]) == ("?", 2)
    assert parse_config(yaml.safe_load(yaml.safe_dump(dumped))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert type(make_recipe(config.recipe)).__name__ == "BestOfRecipe"
    assert make_engine(config.teacher).identity == "parrot:demo@?"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.sampels=1", "recipe.sampels: unknown key (value 1); did you mean `samples`?"),
        ("recipe.samples=0", "recipe.samples: Input should be greater than or equal to 1 (got 0)"),
        ("recipe={type: best_of}", "recipe.reward: missing; add it"),
        ("recipe.reward.bset=1", "recipe.reward.bset: unknown key (value 1); did you mean `best`?"),
        ("recipe.type=best", "recipe.type: unknown (got 'best'); did you mean `best_of`?"),
        ("recipe.type=x", "known: context, step_by_step, self_critique, best_of"),
        ("recipe={type: self_critique, reward: {type: endings, best: x}}", "recipe.reward.best: Input should be"),
        ("teacher.endings=x", "teacher.endings: unknown key (value 'x'); did you mean `ending`?"),
        ("teacher.sampling.n=0", "teacher.sampling.n: Input should be greater than or equal to 1 (got 0)"),
        ("teacher.sampling.top_logprobs=3", "teacher.sampling.top_logprobs: the `parrot` engine cannot do this"),
        ("evaluate.metrics=[same]", "'loss' or 'same_letters' (got 'same')"),
        ("data.format=ini", "'lance' or 'toml' (got 'ini')"),
    ],
)
def test_a_wrong_key_of_a_plugin_is_said_like_one_of_ours(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(EXAMPLE, overrides=[override])
    assert message in str(caught.value)
    assert "best_of.s" not in str(caught.value)  # the name of the variant is no part of a key


def test_without_the_package_its_names_are_unknown() -> None:
    with pytest.raises(ConfigError, match=r"recipe.type: unknown \(got 'best_of'\); known: context"):
        parse_config(EXAMPLE)
    with pytest.raises(ConfigError, match=r"no metric `same_letters` is built in or installed here; known: agreement"):
        plugins.load(Group.METRICS, "same_letters")


CONFIG = """
from typing import Literal
from distill_ray.config import BaseEngineConfig, BaseRecipeConfig, FilePath
from distill_ray.plugins import Plugin
class Mine(BaseRecipeConfig):
    type: Literal["mine"] = "mine"
    prompt: FilePath = "none"
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import not_there", "cannot be imported: ModuleNotFoundError: No module named 'not_there' ("),
        ("1 / 0", "broken.py:1); mend the package"),
        ("part = None", "is NoneType, expected distill_ray.plugins.Plugin(config=..., make=...)"),
        ("other = None", "has no attribute 'part'"),
        (CONFIG + "part = Plugin(dict, dict)", "its config class does not derive from BaseRecipeConfig"),
        (
            CONFIG + "class E(BaseEngineConfig):\n    type: Literal['mine'] = 'mine'\npart = Plugin(E, E)",
            "its config class does not derive from BaseRecipeConfig",
        ),
        (CONFIG + "part = Plugin(BaseRecipeConfig, dict)", 'needs the field `type: Literal["mine"] = "mine"`'),
        (
            CONFIG + "class Other(Mine):\n    type: Literal['other'] = 'other'\npart = Plugin(Other, dict)",
            'Other needs the field `type: Literal["mine"] = "mine"`',
        ),
    ],
)
def test_a_plugin_that_is_not_what_it_should_be_is_named_with_its_package(other: Path, code: str, message: str) -> None:
    install(other, "[distill_ray.recipes]\nmine = broken:part\n", code)
    with pytest.raises(ConfigError) as caught:
        parse_config({**BUILT_IN, "recipe": {"type": "mine"}})
    assert "recipe: the recipe `mine` of broken 0.3 (broken:part)" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("lambda config: 1 / 0", "cannot be built: ZeroDivisionError: division by zero ("),
        ("lambda config: 'text'", "makes str, which has no columns, query, teacher_messages, student_messages"),
    ],
)
def test_what_a_plugin_builds_has_to_be_a_recipe(other: Path, made: str, message: str) -> None:
    install(other, "[distill_ray.recipes]\nmine = broken:part\n", f"{CONFIG}\npart = Plugin(Mine, {made})")
    config = parse_config({**BUILT_IN, "recipe": {"type": "mine"}})
    with pytest.raises(ConfigError) as caught:
        make_recipe(config.recipe)
    assert message in str(caught.value)


def test_a_path_of_a_plugin_starts_at_the_config_files_folder(other: Path, tmp_path: Path) -> None:
    install(other, "[distill_ray.recipes]\nmine = broken:part\n", f"{CONFIG}\npart = Plugin(Mine, Mine)")
    config = parse_config({**BUILT_IN, "recipe": {"type": "mine", "prompt": "a.md"}}, base=tmp_path)
    assert config.recipe.model_dump()["prompt"] == str(tmp_path / "a.md")


@pytest.mark.parametrize(("group", "key"), [("metrics", "evaluate.metrics=[mine]"), ("readers", "data.format=mine")])
def test_a_metric_or_reader_has_to_be_a_function(other: Path, group: str, key: str) -> None:
    install(other, f"[distill_ray.{group}]\nmine = broken:part\n", "part = 3")
    with pytest.raises(ConfigError, match=r"of broken 0.3 \(broken:part\) is int, expected a function"):
        parse_config(BUILT_IN, overrides=[key])


def test_a_name_in_two_packages_is_refused_with_both(other: Path) -> None:
    for package in ("one", "two"):
        install(other, f"[distill_ray.engines]\nmine = {package}:part\n", "part = 3", package)
    with pytest.raises(ConfigError, match=r"the engine `mine` is in .* 0.3 and in .* 0.3; uninstall all but one"):
        parse_config(BUILT_IN, overrides=["teacher.type=mine"])


def test_a_broken_package_troubles_nobody_who_does_not_name_it_and_built_in_names_are_ours(other: Path) -> None:
    names = {"recipes": "context", "engines": "fake", "metrics": "token_f1", "readers": "jsonl", "rewards": "mine"}
    points = "".join(f"[distill_ray.{group}]\n{name} = broken:part\n" for group, name in names.items())
    install(other, points, "raise SystemError('imported')")
    config = parse_config(BUILT_IN)
    assert isinstance(config.teacher, FakeEngineConfig)
    assert config.plugins == {}
    found = {finding.what: finding for finding in examine() if finding.what.startswith("plugin:")}
    assert found["plugin: engine fake (broken 0.3)"].mend == "never used: a built-in part has its name; rename it"
    assert "SystemError: imported" in found["plugin: reward `mine`"].mend
    assert not any(finding.ok for finding in found.values())


# -- what was made with which version --------------------------------------------------------------------------------


def test_a_generation_depends_on_a_plugins_keys_and_version(
    example_plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(version: str, *overrides: str) -> str:
        folder = tmp_path / version
        if not folder.exists():
            shutil.copytree(example_plugin, folder)
            metadata = folder / "best_of-1.2.dist-info" / "METADATA"
            metadata.write_text(metadata.read_text().replace("Version: 1.2", f"Version: {version}"))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            config = parse_config(EXAMPLE, overrides=overrides)
            assert config.plugins["engine parrot"] == f"best-of {version}"
            assert versions()["best-of"] == version
            return generation_fingerprint(config)

    first = fingerprint("1.2")
    assert fingerprint("1.2", "teacher.replicas=2") == first
    changed = [
        fingerprint("1.2", "recipe.samples=2"),
        fingerprint("1.2", "recipe.reward.best=2"),
        fingerprint("1.2", "teacher.ending=x"),
        fingerprint("1.3"),
    ]
    assert len({first, *changed}) == 5


# -- engines, metrics, readers ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_the_check_builds_the_engine_of_a_plugin_and_says_that_this_is_all_it_did() -> None:
    config = parse_config(EXAMPLE)
    assert isinstance(make_engine(config.teacher), Engine)
    assert next(check_teacher(config)) == "teacher `parrot`: parrot:demo@? (nothing else was checked)"


def test_an_engine_without_an_identity_is_refused(other: Path) -> None:
    code = CONFIG + (
        "from distill_ray.engines.base import Engine\n"
        "class MyConfig(BaseEngineConfig):\n    type: Literal['mine'] = 'mine'\n"
        "class MyEngine(Engine):\n    def __init__(self, config): pass\n    start = generate = close = print\n"
        "part = Plugin(MyConfig, MyEngine)"
    )
    install(other, "[distill_ray.engines]\nmine = broken:part\n", code)
    config = parse_config(BUILT_IN, overrides=["teacher={type: mine}"])
    with pytest.raises(ConfigError, match="makes MyEngine, which has no identity; see distill_ray"):
        make_engine(config.teacher)


def answers(config: RunConfig) -> dict[str, Any]:
    row = {"query": "q", "reference": "abc", "teacher_answer": "c-a-b", "loss_before": None, "loss_after": None}
    row |= {"student_before": "ab", "student_after": "cba", "prompt_tokens_before": 4, "prompt_tokens_after": 2}
    return score_predictions(config, [{**row, "row_id": str(i)} for i in range(3)])[0]


@pytest.mark.usefixtures("installed")
def test_a_metric_of_a_plugin_is_scored_with_its_interval_and_reported_by_its_name() -> None:
    metrics = answers(parse_config(EXAMPLE))
    found = {who: metrics[who]["same_letters"] for who in ("teacher", "student_before", "student_after")}
    assert found == {"teacher": 1.0, "student_before": 0.0, "student_after": 1.0}
    assert metrics["student_after"]["same_letters_low"] == 1.0
    assert "token_f1" not in metrics["student_after"]
    assert "same_letters" in list(summary_table(metrics).columns[0].cells)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def part(answer, expected): return answer.nothing", "failed on the answer 'c-a-b': AttributeError"),
        ("def part(answer, expected): return float('nan')", "gave nan for the answer 'c-a-b'"),
    ],
)
def test_a_metric_that_fails_is_named_with_the_answer(other: Path, code: str, message: str) -> None:
    install(other, "[distill_ray.metrics]\nmine = broken:part\n", code)
    with pytest.raises(DistillError, match=r"the metric `mine` of broken 0.3 \(broken:part\)") as caught:
        answers(parse_config(BUILT_IN, overrides=["evaluate.metrics=[mine]"]))
    assert message in str(caught.value)


ROWS = '[[rows]]\ntext = "one"\n[[rows]]\ntext = "two"\n'


@pytest.mark.usefixtures("installed")
def test_a_reader_of_a_plugin_is_chosen_by_the_ending_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(ROWS)
    (tmp_path / "b.toml.gz").write_bytes(gzip.compress(ROWS.encode()))
    (tmp_path / "c.txt").write_text("no data")
    rows = [row for file in resolve(str(tmp_path)) for row in read_rows(file)]
    assert [(row.label, row.columns) for row in rows] == [
        ("a.toml:1", {"text": "one"}),
        ("a.toml:2", {"text": "two"}),
        ("b.toml.gz:1", {"text": "one"}),
        ("b.toml.gz:2", {"text": "two"}),
    ]
    with pytest.raises(DataError, match=r"known are .*\.lance, \.toml"):
        resolve(str(tmp_path / "c.txt"))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("= broken", DataError, "a.toml: the reader `toml` of best-of 1.2 (best_of:read_toml) cannot read it: TOML"),
        ("other = 3", DataError, "cannot read it: KeyError: 'rows'"),
        ("rows = [1, 2]", NoReadableRow, "none of its 2 rows is readable as toml (first: row 1 is not a dict but"),
    ],
)
def test_a_file_that_a_plugin_cannot_read_is_one_message(
    tmp_path: Path, content: str, error: type[DataError], message: str
) -> None:
    (tmp_path / "a.toml").write_text(content)
    [file] = resolve(str(tmp_path / "a.toml"))
    with pytest.raises(error) as caught:
        list(read_rows(file))
    assert message in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_rows_are_planned_from_a_plugins_file_and_read_again_when_its_keys_change(tmp_path: Path) -> None:
    (tmp_path / "queries.toml").write_text(ROWS)
    shas: list[set[str]] = []
    for query in ("{{ text }}", "{{ text }}", "{{ text }}?"):
        config = parse_config(EXAMPLE, base=tmp_path, overrides=[f'recipe.query="{query}"'])
        plan = plan_rows(config, make_recipe(config.recipe), RunFolder(tmp_path / "run"))
        assert plan.rows_in == 2
        shas.append({partition.sha for partition in plan.partitions})
    assert shas[0] == shas[1] != shas[2]


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_the_docs_show_the_example_as_it_is() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "extending.md").read_text(encoding="utf-8")
    example = root / "tests" / "example_plugin"
    for language, file in (("python", "best_of.py"), ("toml", "pyproject.toml")):
        blocks = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        assert blocks
        for block in blocks:
            assert block in (example / file).read_text(encoding="utf-8"), block
    for group in Group:
        assert f"`{group}`" in page
