"""What the repository says about itself is true: tree, configs, links, reference page, no machine's paths."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from distill_ray.cli import app
from distill_ray.config import RunConfig, parse_config
from distill_ray.config.reference import reference
from distill_ray.config.run import _known_keys, _Loader

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of files to hold against")
    return done.stdout.splitlines()


def test_the_readmes_tree_names_every_module_and_nothing_else() -> None:
    tree = README.partition("## The tree")[2].partition("```")[2].partition("```")[0]
    named: set[str] = set()
    folders: list[str] = []
    for line in tree.strip().splitlines()[1:] if tree.startswith("text") else tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
            continue
        named.add("".join(folders) + name)
    modules = {
        f
        for f in tracked()
        if f.startswith(("distill_ray/", "jobs/", "benchmarks/", "requirements/"))
        and f.endswith(".py")
        and not f.endswith("__init__.py")
    }
    listed = {name for name in named if name.endswith(".py")}
    assert listed == modules
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_config_in_the_docs_is_valid(page: Path, example_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(example_plugin)  # extending.md chooses its parts
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for variant in _variants(block):
            parse_config(
                {"recipe": {"context": {"text": "x"}}, "data": {"source": "x"}, "teacher": {"type": "fake"}, **variant}
            )


def _variants(block: str) -> list[dict]:
    """A block is one config, or several one-line alternatives of the same key."""
    keys = re.findall(r"^(\w+):", block, re.MULTILINE)
    if len(keys) != len(set(keys)):
        return [yaml.load(line, _Loader) for line in block.splitlines() if line.strip()]
    return [yaml.load(block, _Loader)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_shipped_yaml_config_loads() -> None:
    from distill_ray.config import load_config

    found = [f for f in tracked() if f.endswith(".yaml") and f.startswith("distill_ray/")]
    assert found
    for file in found:
        load_config(ROOT / file)


def test_the_configuration_page_is_what_the_models_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m distill_ray.config.reference > docs/configuration.md"


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_locks_and_makefile_name_no_host_and_no_path_of_a_machine() -> None:
    for name in ("Makefile", "requirements/cpu.txt", "requirements/gpu.txt"):
        text = (ROOT / name).read_text()
        assert "://" not in text, name
        assert not re.search(r"(?<![\w.])/(home|root|opt|work|Users)/", text), name
    for name in ("requirements/cpu.txt", "requirements/gpu.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith((" ", "#"))]
        assert all("==" in line for line in lines), "every dependency is pinned"


def test_every_job_is_a_command_and_says_how_to_submit_it() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    names |= {group.typer_instance.info.name for group in app.registered_groups}  # type: ignore[union-attr]
    for job in sorted((ROOT / "jobs").glob("*.py")):
        text = job.read_text()
        assert job.stem in names
        assert f"python jobs/{job.name} CONFIG --" in text


ORIGINAL_FLAGS = [
    "from_pretrained",
    "dataset",
    "subsample",
    "alpha",
    "max_steps",
    "eval_steps",
    "batch_size",
    "optimizer_name",
    "lr",
    "run",
    "label_type",
    "llm",
    "max_input_length",
    "grad_steps",
    "gen_max_len",
    "parallelize",
    "model_type",
    "bf16",
    "output_rationale",
]


def test_the_table_of_the_original_commands_flags_names_keys_that_exist() -> None:
    """Of Distilling Step-by-Step; every flag has a line, and every key in it is one of ours."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `--(\w+)` \| (.+) \|$", page, flags=re.MULTILINE))
    assert list(table) == ORIGINAL_FLAGS
    schema = RunConfig.model_json_schema()
    sections = {"recipe", "data", "teacher", "student", "train", "evaluate"}
    keys = [key for cell in table.values() for key in re.findall(r"`([\w.]+)`", cell) if key.split(".")[0] in sections]
    assert len(keys) >= len(table) - 1  # all but the optimizer
    for key in keys:
        *parents, leaf = key.split(".")
        assert leaf in _known_keys(schema, parents), key
