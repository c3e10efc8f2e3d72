"""The commands of the service: serve, promote, rollback; and those of `keys_cli`. Added to the app of `cli`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_ray.completion import config_keys
from distill_ray.config import RunConfig, load_config
from distill_ray.errors import BundleError, ClusterError, ConfigError, StoreError
from distill_ray.pipeline.progress import tell
from distill_ray.serving.keys_cli import keys_app

if TYPE_CHECKING:
    from distill_ray.serving.routing.bundles import Bundles

ConfigPath = Annotated[Path, typer.Argument(help="The YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=config_keys,
        help="Override a key, e.g. `--set serve.guard=strict`. Repeatable.",
    ),
]
NEWS_S = 1.0


def serve(
    config: ConfigPath,
    bundle: Annotated[
        str | None, typer.Option("--bundle", help="Make this bundle (a folder, or a version) the current one, first.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default: serve.port, 8000.")] = None,
    write: Annotated[
        Path | None, typer.Option("--write", help="Write a config for Ray's own `serve deploy` instead.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Student and teacher behind one OpenAI-compatible endpoint, until Ctrl-C.

    Example: `distill-ray serve config.yaml --bundle runs/mine/bundle`
    """
    overrides = [*(overrides or []), *([f"serve.port={port}"] if port is not None else [])]
    if write is not None:
        _write(config, bundle, write, overrides)
    else:
        _serve(config, bundle, overrides)


def _serve(path: Path, bundle: str | None, overrides: list[str]) -> None:
    loaded = load_config(path, overrides)
    from distill_ray.pipeline.check import check_service
    from distill_ray.pipeline.cluster import connected
    from distill_ray.serving import app
    from distill_ray.serving.names import occupy, service_folder
    from distill_ray.serving.news import StudentNews, where
    from distill_ray.serving.preflight import put_in_service, require_startable
    from distill_ray.serving.routing.bundles import bundles_of

    started = time.monotonic()
    folder = service_folder(loaded)
    bundles = bundles_of(loaded, folder)
    app.require_port(loaded.serve.host, loaded.serve.port)
    for line in check_service(loaded):
        if line.startswith("warning: "):
            tell(line, stderr=True)
    keys = require_startable(loaded, folder, bundle)
    occupy(folder).close()  # its keeper will hold it; that it could not is said before Ray is started
    if bundle is not None:
        put_in_service(bundles, bundle)
    with connected(num_cpus=app.cpus_needed(loaded)):
        try:
            app.require_gpus(loaded)
            app.start(loaded, folder)
            typer.echo(where(loaded, folder, time.monotonic() - started, needs_key=keys.required))
            news = StudentNews(loaded, bundles, started)
            while True:
                if (line := news.line()) is not None:
                    typer.echo(line)
                time.sleep(NEWS_S)
        except RuntimeError as error:
            raise ClusterError(f"the service does not start; see {folder}/logs. {app.why_not_up(error)}") from error
        finally:
            app.stop(loaded)


def _write(path: Path, bundle: str | None, out: Path, overrides: list[str]) -> None:
    """A config for `serve deploy`. Neither port nor servers are looked at: it may be for other machines."""
    loaded = load_config(path, overrides)
    import yaml

    from distill_ray.serving import app
    from distill_ray.serving.names import service_folder
    from distill_ray.serving.preflight import put_in_service, require_startable
    from distill_ray.serving.routing.bundles import bundles_of

    folder = service_folder(loaded)
    bundles = bundles_of(loaded, folder)
    require_startable(loaded, folder, bundle)
    text = yaml.safe_dump(app.serve_config(str(path), overrides, folder), sort_keys=False)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--write {out}: cannot write ({error.strerror}); give a file in a folder that is there"
        ) from error
    if bundle is not None:
        put_in_service(bundles, bundle)
    typer.echo(f"wrote: {out}\nnext:  serve deploy {out}")


def promote(
    config: ConfigPath,
    bundle: Annotated[str, typer.Argument(help="Folder of a bundle, or the version of an installed one.")],
    overrides: Overrides = None,
) -> None:
    """Make a bundle the current one. A running service loads its student first and changes over without a gap.

    Example: `distill-ray promote config.yaml runs/mine/bundle`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.serving.names import service_folder
    from distill_ray.serving.preflight import put_in_service, require_servable
    from distill_ray.serving.routing.bundles import bundles_of

    folder = service_folder(loaded)
    bundles = bundles_of(loaded, folder)
    require_servable(loaded, bundles, bundle)
    before = bundles.current()
    version = put_in_service(bundles, bundle)
    was = f" (before: {before})" if before not in (None, version) else ""
    typer.echo(f"current: {version}{was}, in {_where(loaded, folder)}")
    _settled(loaded, folder, bundles)


def rollback(
    config: ConfigPath,
    version: Annotated[
        str | None, typer.Argument(help="An earlier version, or `none` (all to the teacher). Default: the one before.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Go back to an earlier bundle, at once: student, index, threshold, and which pairs count as learnt.

    Example: `distill-ray rollback config.yaml`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.serving.names import existing_service_folder, service_folder
    from distill_ray.serving.routing.bundles import NOTHING, bundles_of

    # From anywhere, where the config says where the bundles are.
    folder = existing_service_folder(loaded) if loaded.serve.bundles is None else service_folder(loaded)
    bundles = bundles_of(loaded, folder)
    before = bundles.current()
    if before is None and version in (None, NOTHING):
        nothing = f"{_where(loaded, folder)}: no bundle is in service; the teacher answers everything already"
        if version is None:
            raise BundleError(nothing)
        typer.echo(nothing)
        return
    now = bundles.rollback(version) or "none (the teacher answers everything)"
    typer.echo(f"current: {now} (before: {before}), in {_where(loaded, folder)}")
    num_unmarked = _settled(loaded, folder, bundles)
    if num_unmarked:
        tell(f"{num_unmarked} pairs that only {before} learnt wait for the next training again")


def _where(config: RunConfig, folder: str) -> str:
    """What was moved, for people: the bundles' own place, else the service's folder."""
    return config.serve.bundles or os.path.relpath(folder)


def _settled(config: RunConfig, folder: str, bundles: Bundles) -> int:
    """Have the store say what the pointer says about what is learnt; returns how many pairs no longer are."""
    from distill_ray.serving.collecting.marks import settle
    from distill_ray.serving.collecting.store import make_store

    try:
        return settle(bundles, make_store(config.serve.collect.store, folder))[1]
    except StoreError as error:
        tell(f"warning: which pairs count as learnt is set right by the next `flywheel run`: {error}", stderr=True)
        return 0


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(serve)
    app.command()(promote)
    app.command()(rollback)
    app.add_typer(keys_app)
