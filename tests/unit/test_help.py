"""`--help` teaches: what each command does, every option, and an example that would be taken as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from distill_ray.cli import PANELS, app, main

EXAMPLE = re.compile(r"`(distill-ray [^`]+)`")
ROOT = typer.main.get_command(app)


def commands(command: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The command, and all below it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


EACH = pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=[" ".join(path) or "itself" for path, _ in commands()]
)
EXAMPLES = sorted({example for _, command in commands() for example in EXAMPLE.findall(" ".join(command.help.split()))})


@EACH
def test_a_command_says_what_it_does_and_gives_an_example(path: tuple[str, ...], command: Any) -> None:
    examples = EXAMPLE.findall(" ".join(command.help.split()))
    assert any(example.split()[1 : 1 + len(path)] == list(path) for example in examples)
    assert command.help[0].isupper()


@EACH
def test_every_option_and_argument_has_a_help_text(path: tuple[str, ...], command: Any) -> None:
    assert [each.name for each in command.params if not each.help] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_a_command_that_exists_with_these_options(example: str) -> None:
    command, words = ROOT, shlex.split(example)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]  # type: ignore[attr-defined]
    if words[:1] == ["COMMAND"] or set(words) & {"--install-completion", "--help"}:
        return
    with command.make_context("distill-ray", words) as context:  # raises what a user would be told
        assert not context.args


def test_every_command_is_in_a_panel_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    ordered = [name for names in PANELS.values() for name in names]
    assert ordered == list(ROOT.commands)  # type: ignore[attr-defined]
    shown = help_of(["--help"], capsys)
    assert [shown.index(f" {panel} ") for panel in PANELS] == sorted(shown.index(f" {panel} ") for panel in PANELS)
    assert " Commands " not in shown


@EACH
@pytest.mark.parametrize("width", ["80", "200"])
def test_a_help_page_is_no_wider_than_the_terminal(
    path: tuple[str, ...], command: Any, width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", int(width))
    shown = help_of([*path, "--help"], capsys)
    assert max(map(len, shown.splitlines())) <= int(width)
    assert "\x1b" not in shown


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        app(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generat", "c.yaml"], "Did you mean 'generate'"),
        (["flywheel", "runn"], "Did you mean 'run'"),
        (["plan", "--jso", "x"], "--json"),
    ],
)
def test_a_slip_of_the_keyboard_is_answered_with_what_was_meant(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distill-ray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from distill_ray.cli import app\n"
        "try: app(['train', '--help'])\n"
        "except SystemExit: print([m for m in ('ray', 'torch', 'vllm', 'transformers', 'pandas', 'numpy', 'pyarrow')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
