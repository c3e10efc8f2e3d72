"""`distill-ray keys`: who may ask a service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from distill_ray.completion import config_keys
from distill_ray.config import RunConfig, load_config
from distill_ray.pipeline.progress import tell

ConfigPath = Annotated[Path, typer.Argument(help="The YAML file of the service.", show_default=False)]
Owner = Annotated[str, typer.Argument(help="Whose it is.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=config_keys,
        help="Override a key, e.g. `--set serve.folder=/srv/mine`. Repeatable.",
    ),
]
keys_app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    help="API keys of a service. Only their hashes are stored.\n\nExample: `distill-ray keys add config.yaml alice`",
)


@keys_app.command("add")
def add(config: ConfigPath, owner: Owner, overrides: Overrides = None) -> None:
    """Make a key and print it, once.

    Example: `distill-ray keys add config.yaml alice`
    """
    from distill_ray.serving.front.keys import add_key
    from distill_ray.serving.names import service_folder

    loaded = load_config(config, overrides or [])
    path = _keys_file(loaded, service_folder(loaded))
    typer.echo(add_key(path, owner))
    tell(
        f"This is shown once; its hash is in {os.path.relpath(path)}. A running service knows it when it is started "
        "again.",
        stderr=True,
    )


@keys_app.command("list")
def list_(config: ConfigPath, overrides: Overrides = None) -> None:
    """Owners, and the beginning of each key's hash.

    Example: `distill-ray keys list config.yaml`
    """
    from distill_ray.serving.front.keys import read_keys

    path = _existing_keys_file(load_config(config, overrides or []))
    keys = read_keys(path)
    for key in keys:
        typer.echo(f"{key.owner}  {key.digest[:12]}")
    typer.echo(f"{len(keys)} key{'' if len(keys) == 1 else 's'} in {os.path.relpath(path)}", err=True)


@keys_app.command("remove")
def remove(
    config: ConfigPath,
    owner: Owner,
    prefix: Annotated[
        str, typer.Option("--prefix", help="Only the key whose hash begins so; `keys list` has it.")
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Remove the keys of an owner.

    Example: `distill-ray keys remove config.yaml alice --prefix 3f2a`
    """
    from distill_ray.serving.front.keys import remove_keys

    path = _existing_keys_file(load_config(config, overrides or []))
    num_removed = remove_keys(path, owner, prefix)
    tell(
        f"removed {num_removed} from {os.path.relpath(path)}; a running service accepts what is removed until it is "
        "started again"
    )


def _keys_file(config: RunConfig, folder: str) -> Path:
    return Path(config.serve.keys.file or Path(folder) / "keys.jsonl")


def _existing_keys_file(config: RunConfig) -> Path:
    """A file of its own may be anywhere, whatever the service's folder is."""
    from distill_ray.serving.names import existing_service_folder

    return (
        Path(config.serve.keys.file) if config.serve.keys.file else _keys_file(config, existing_service_folder(config))
    )
