"""The commands of the flywheel: `flywheel run` and `status`. Added to the app of `distill_ray.cli`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from distill_ray.config import load_config
from distill_ray.errors import ConfigError, DistillError, InputError

flywheel_app = typer.Typer(
    name="flywheel",
    no_args_is_help=True,
    help="From what the service collected to the next student: cleaned, trained, held against the one in service, and "
    "promoted only if it is not worse.",
)
ConfigPath = Annotated[Path, typer.Argument(help="The YAML file of the service.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. `--set flywheel.min_pairs=200`. Repeatable."),
]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@flywheel_app.command("run")
def run(
    config: ConfigPath,
    every: Annotated[
        str | None, typer.Option("--every", metavar="TIME", help="Again and again: 30m, 24h, 7d. Until Ctrl-C.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Learn also from the pairs that a refused cycle set aside.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """One cycle: snapshot, clean, split, train, gate, bundle, shadow, promote. The same command goes on after a kill.

    Example: `distill-ray flywheel run config.yaml --every 24h`
    """
    seconds = None if every is None else _seconds(every)
    loaded = load_config(config, overrides or [])
    from distill_ray.flywheel.cycle import run_cycle
    from distill_ray.flywheel.status import ended_lines
    from distill_ray.serving.names import existing_service_folder

    folder = existing_service_folder(loaded)
    while True:
        try:
            for line in ended_lines(run_cycle(loaded, folder, again=again), str(config)):
                typer.echo(line)
        except InputError:
            raise
        except DistillError as error:
            if seconds is None:
                raise
            typer.echo(f"error: {error}\n  the next run goes on from there", err=True)
        if seconds is None:
            return
        typer.echo(f"the next cycle begins in {every}; Ctrl-C ends it")
        time.sleep(seconds)


def status(config: ConfigPath, overrides: Overrides = None) -> None:
    """Where the flywheel is: the cycle, what its next step waits for, the bundle in service and those before it.

    Example: `distill-ray status config.yaml`
    """
    loaded = load_config(config, overrides or [])
    from rich.console import Console

    from distill_ray.flywheel.status import show_status
    from distill_ray.serving.names import existing_service_folder

    show_status(loaded, existing_service_folder(loaded), Console(highlight=False, soft_wrap=True))


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--every {text}: not a time; write a number and s, m, h or d, such as 24h")
    return float(found[1]) * _SECONDS[found[2]]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(flywheel_app)
    app.command()(status)
