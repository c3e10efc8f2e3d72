"""The docs say what is so: commands that exist, messages that are in the code, figures with a command and a day."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from distill_ray import plugins
from distill_ray.cli import app
from distill_ray.config import FakeEngineConfig, SamplingConfig, parse_config
from distill_ray.engines import make_engine
from distill_ray.errors import RowError
from distill_ray.recipes import Engines, make_recipe
from distill_ray.records import Completion, Example, Message, Reject, Row
from tests.docs_commands import FENCE, PAGES, ROOT, Command, blocks, commands, spans, variants
from tests.unit.test_layers import LAYERS

DISTILL_RAY = typer.main.get_command(app)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NOT_OURS = {"cp", "curl", "docker", "ray", "ruff", ".ci/run"}
BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# -- commands --------------------------------------------------------------------------------------------------------


@BY_PAGE
def test_every_command_of_the_docs_is_taken_as_it_stands(page: Path) -> None:
    wrong = [f"{c}: {why}" for command in commands(page) for c in variants(command) if (why := what_is_wrong(c))]
    assert not wrong, "\n".join(wrong)


def what_is_wrong(command: Command) -> str | None:
    """Why a command would not be taken; None: it would."""
    words = list(command.words)
    if command.program == "distill-ray":
        return not_parsed(words, must_be_whole=command.is_line)
    if command.program == "make":
        return not_a_target(words)
    if command.program == "python":
        return not_a_script(words, must_be_whole=command.is_line)
    return None if command.program in NOT_OURS else "nobody knows this program"


def not_parsed(words: list[str], *, must_be_whole: bool) -> str | None:
    command: Any = DISTILL_RAY
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if not must_be_whole and not words:
        return None  # "`distill-ray train` does ..." names it
    if hasattr(command, "commands"):
        return f"no such command: {' '.join(words)}"
    try:
        with command.make_context("distill-ray", list(words)) as context:
            return f"what is {context.args}?" if context.args else None
    except Exception as error:  # of click, or typer's own copy of it
        return str(error) or type(error).__name__


def not_a_target(words: Sequence[str]) -> str | None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+)\s*\?=", MAKEFILE, re.MULTILINE))
    for word in words:
        name, is_setting, _ = word.partition("=")
        if name not in (variables if is_setting else targets):
            return f"the Makefile has no {name}"
    return None


def not_a_script(words: list[str], *, must_be_whole: bool) -> str | None:
    if words[0] == "-m":
        if importlib.util.find_spec(words[1]) is None:
            return "no such module"
        paths = [word for word in words[2:] if "/" in word]
        return next((f"no file {path}" for path in paths if words[1] == "pytest" and not (ROOT / path).exists()), None)
    script, *arguments = words
    if not (ROOT / script).is_file():
        return f"no file {script}"
    if script.startswith("jobs/"):
        return not_parsed([Path(script).stem, *arguments], must_be_whole=must_be_whole)
    known = (ROOT / script).read_text(encoding="utf-8")
    for argument in arguments:
        is_name = re.fullmatch(r"--[a-z-]+|[a-z_]+", argument)
        after_option = argument is not arguments[0] and not argument.startswith("--")
        if is_name and not after_option and f'"{argument}"' not in known:
            return f"{script} knows no {argument}"
    return None


@pytest.mark.parametrize(
    ("program", "words", "says"),
    [
        ("distill-ray", "run config.yaml --limt 3", "No such option"),
        ("distill-ray", "run", "missing"),
        ("distill-ray", "ask runs/demo one two", "unexpected extra argument"),
        ("distill-ray", "runn config.yaml", "no such command"),
        ("distill-ray", "pairs", "no such command"),
        ("make", "tests", "no tests"),
        ("make", "install EXTRAS=gpu", "no EXTRAS"),
        ("python", "benchmarks/nothing.py", "no file"),
        ("python", "benchmarks/scale.py begin", "knows no begin"),
        ("python", "benchmarks/waste.py --victims engine", "knows no --victims"),
        ("python", "jobs/run.py CONFIG --run-directory x", "No such option"),
        ("python", "-m distill_ray.nothing", "no such module"),
        ("pythn", "x", "nobody knows"),
    ],
)
def test_a_command_that_would_not_be_taken_is_found(program: str, words: str, says: str) -> None:
    found = what_is_wrong(Command("page", program, tuple(words.split()), is_line=True))
    assert found is not None
    assert says.lower() in found.lower()


def test_what_may_be_left_out_or_chosen_is_tried_each_way() -> None:
    command = Command("page", "distill-ray", ("rollback", "config.yaml", "[VERSION|none]"), is_line=True)
    assert [c.words[2:] for c in variants(command)] == [(), ("VERSION",), ("none",)]


@BY_PAGE
def test_files_of_this_repository_that_a_page_names_are_there(page: Path) -> None:
    ours = re.compile(r"(?:distill_ray|tests|benchmarks|jobs|requirements)/[\w/.-]+\.(?:py|txt|yaml|json)")
    named = [span for span in spans(page.read_text(encoding="utf-8")) if ours.fullmatch(span)]
    examples = ("majority", "test_X")
    assert [name for name in named if not (ROOT / name).exists() and not any(e in name for e in examples)] == []


@BY_PAGE
def test_what_stands_in_backticks_ends_on_its_line(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert [line for line in text.splitlines() if line.count("`") % 2] == []


@BY_PAGE
def test_links_to_a_heading_lead_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / file if file else page, anchor) for file, anchor in links if "://" not in file]
    assert [f"{file.name}#{anchor}" for file, anchor in targets if anchor not in anchors(file)] == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# -- messages --------------------------------------------------------------------------------------------------------


def test_messages_in_the_table_of_what_to_do_are_in_the_code() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("## What to do when it says")[2]
    cells = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    quoted = [span for cell in cells for span in spans(cell)]
    assert len(cells) > 15
    said = list(texts_of_the_code())
    unknown = [q for q in quoted if q != "RAY_ADDRESS" and not any(q in text for text in said)]
    assert unknown == []


def texts_of_the_code() -> Iterator[str]:
    """String literals, and the fixed parts of f-strings."""
    for path in (ROOT / "distill_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


# -- figures ---------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"`((?:python )?benchmarks/|make |distill-ray |python )[^`]*`")
DAY = re.compile(r"\b20\d\d-\d\d-\d\d\b|day not noted")
NOT_MEASURED = {"What limits": "by arithmetic, and says so", "The driver": "what it does, without a measurement"}


@pytest.mark.parametrize("name", ["results.md", "scale.md"])
def test_figures_have_a_command_and_a_day(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    sections = [section.partition("\n") for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]]
    measured = {title: text for title, _, text in sections if title not in NOT_MEASURED}
    assert [title for title, text in measured.items() if not COMMAND.search(text)] == []
    assert [title for title, text in measured.items() if not DAY.search(text)] == []


# -- the layers ------------------------------------------------------------------------------------------------------


def test_the_picture_of_the_layers_is_what_the_imports_are_held_against() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    [picture] = [block for block in blocks(page, "") if block.startswith("__main__")]
    lines = [re.split(r"\s{4,}", line)[0].split() for line in picture.splitlines()]
    assert [set(line) for line in reversed(lines)] == LAYERS


# -- the recipe in one file ------------------------------------------------------------------------------------------


class Asker:
    """The fake engine as a recipe sees it."""

    name = "fake"

    def __init__(self, answer: str) -> None:
        self.engine = make_engine(FakeEngineConfig(answer=answer))

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        await self.engine.start()
        return await self.engine.generate(messages, SamplingConfig(n=num_samples or 1))

    async def score(self, messages: Sequence[Message], answer: str) -> Completion:
        raise NotImplementedError


CONFIG: dict[str, Any] = {
    "recipe": {"type": "majority", "samples": 3, "parse": {"regex": r"Final Answer: (\w+)"}},
    "data": {"source": "queries.jsonl"},
    "teacher": {"type": "fake"},
}


@pytest.fixture
def majority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's recipe, as a package that is installed."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    [code] = blocks(page, "python")
    (tmp_path / "majority_recipe.py").write_text(code)
    info = tmp_path / "majority-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: majority\nVersion: 0.1\n")
    line = re.search(r'`majority = "(MODULE:recipe)"`', page)
    assert line
    place = line[1].replace("MODULE", "majority_recipe")
    (info / "entry_points.txt").write_text(f"[distill_ray.recipes]\nmajority = {place}\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._entry_points.cache_clear()
    yield
    plugins._entry_points.cache_clear()
    sys.modules.pop("majority_recipe", None)


@pytest.mark.usefixtures("majority")
def test_the_recipe_of_the_page_on_contributing_runs() -> None:
    recipe = make_recipe(parse_config(CONFIG).recipe)
    assert dict(recipe.columns) == {"text": "recipe.query"}
    row = Row("r1", "train", recipe.query({"text": "Wo?"}), {"text": "Wo?"}, reference="de")

    def distilled(answer: str) -> list[Example] | Reject:
        return asyncio.run(recipe.distill(row, Engines(Asker(answer))))

    asked: list[Message] = [{"role": "user", "content": "Wo?"}]
    two_of_three = "Hm. Final Answer: {{ 'fr' if sample_index == 1 else 'de' }}"
    assert distilled(two_of_three) == [Example("r1", "train", asked, "de", teacher="fake", reference="de")]
    with pytest.raises(RowError, match="no majority among"):
        distilled("Final Answer: {{ ['de', 'fr', 'es'][sample_index] }}")
    with pytest.raises(RowError, match=r"recipe\.parse finds nothing"):
        distilled("no idea")
