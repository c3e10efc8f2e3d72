"""The commands of the flywheel: `flywheel run` and `status`. Added to the app of `distill_ray.cli`."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from distill_ray.completion import config_keys
from distill_ray.config import load_config
from distill_ray.errors import ConfigError, DistillError, InputError, Interrupted
from distill_ray.pipeline.progress import People, tell

flywheel_app = typer.Typer(
    name="flywheel",
    no_args_is_help=True,
    help="From what the service collected to the next student: cleaned, trained, held against the one in service, and "
    "promoted only if it is not worse.\n\n"
    "First `distill-ray status config.yaml` (are there enough pairs?), then `distill-ray flywheel run config.yaml`; "
    "the verdict is in SERVICE/cycles/NUMBER/gate.html, and `distill-ray rollback config.yaml` goes back.",
)
ConfigPath = Annotated[Path, typer.Argument(help="The YAML file of the service.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=config_keys,
        help="Override a key, e.g. `--set flywheel.min_pairs=200`. Repeatable.",
    ),
]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_D = 365


@flywheel_app.command("run")
def run(
    config: ConfigPath,
    every: Annotated[
        str | None,
        typer.Option(
            "--every",
            metavar="TIME",
            help="Cycle after cycle until Ctrl-C; the next one begins this long after the end of each: 30m, 24h, 7d. "
            "The config is read anew each time, and an error is said and waited out.",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Take back what refused cycles set aside, and begin although fewer than flywheel.min_pairs are new. "
            "With --every, for the first cycle only.",
        ),
    ] = False,
    overrides: Overrides = None,
) -> None:
    """One cycle: snapshot, clean, split, train, gate, bundle, shadow, promote. The same command goes on after a kill.

    It works in SERVICE, the folder of the `serve` command: serve.folder, or services/NAME where you are. Give it the
    config and the --set of the service. With `flywheel: {shadow: {}}` the candidate is tried on real requests before
    it may serve, so the service has to run.

    Exit status: 0 the cycle came to its end, whatever its verdict (promoted, refused, unclear, overtaken, too few
    pairs); 1 a step could not be done; 2 the config is wrong; 130 interrupted.

    Examples:

    - `distill-ray flywheel run config.yaml`

    - `distill-ray flywheel run config.yaml --every 24h`

    - `distill-ray flywheel run config.yaml --again --set flywheel.gate.margin=0.1`
    """
    seconds = None if every is None else _seconds(every)
    for number in itertools.count():
        try:
            _cycle(config, overrides or [], again=again)
            again = False  # else every round would train on what is there
        except DistillError as error:
            is_for_good = isinstance(error, Interrupted) or (number == 0 and isinstance(error, InputError))
            if seconds is None or is_for_good:
                raise
            tell(f"error: {error}\n  the next run goes on from there", stderr=True)
        if seconds is None:
            return
        typer.echo(f"the next cycle begins in {every}; Ctrl-C ends it")
        time.sleep(seconds)


def _cycle(config: Path, overrides: list[str], *, again: bool) -> None:
    """One cycle, with the config as it is now."""
    loaded = load_config(config, overrides)
    from distill_ray.flywheel.cycle import run_cycle
    from distill_ray.flywheel.status import ended_lines
    from distill_ray.serving.names import existing_service_folder

    for line in ended_lines(run_cycle(loaded, existing_service_folder(loaded), again=again), str(config)):
        tell(line)


def status(config: ConfigPath, overrides: Overrides = None) -> None:
    """Where the flywheel is: the cycle, what its next step waits for, the bundle in service and those before it.

    Exit status: 0, whatever it shows; 1 the store of pairs, or a file, cannot be used; 2 the config is wrong.

    Example: `distill-ray status config.yaml`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.flywheel.status import show_status
    from distill_ray.serving.names import existing_service_folder

    show_status(loaded, existing_service_folder(loaded), People())


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if found is None:
        raise ConfigError(f"--every {text}: not a time; write a number and s, m, h or d, such as 24h")
    if not found[2]:
        raise ConfigError(f"--every {text}: has no unit; write {found[1]}s, {found[1]}m, {found[1]}h or {found[1]}d")
    seconds = float(found[1]) * _SECONDS[found[2]]
    if not 0 < seconds <= _LONGEST_D * _SECONDS["d"]:
        raise ConfigError(f"--every {text}: has to be more than 0, and {_LONGEST_D}d at most")
    return seconds


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(flywheel_app)
    app.command()(status)
