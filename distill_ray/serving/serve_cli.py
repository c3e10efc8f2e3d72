"""The commands of the service: serve, promote, rollback, keys. Added to the app of `cli`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from distill_ray.config import RunConfig, load_config
from distill_ray.errors import ClusterError

ConfigPath = Annotated[Path, typer.Argument(help="The YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. `--set serve.guard=strict`. Repeatable."),
]
keys_app = typer.Typer(name="keys", no_args_is_help=True, help="API keys of a service. Only their hashes are stored.")


def serve(
    config: ConfigPath,
    bundle: Annotated[
        str | None, typer.Option("--bundle", help="Install this bundle and make it the current one, first.")
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
    from distill_ray.pipeline.check import check_teacher
    from distill_ray.pipeline.cluster import connected
    from distill_ray.serving import app
    from distill_ray.serving.names import service_folder

    loaded = load_config(config, [*(overrides or []), *([f"serve.port={port}"] if port is not None else [])])
    folder = service_folder(loaded)
    _preflight(loaded, folder, bundle)
    if write is not None:
        import yaml

        write.write_text(yaml.safe_dump(app.serve_config(loaded, str(config), folder), sort_keys=False))
        typer.echo(f"wrote: {write}\nnext:  serve deploy {write}")
        return
    app.require_port(loaded.serve.host, loaded.serve.port)
    list(check_teacher(loaded))
    started = time.monotonic()
    with connected(num_cpus=app.cpus_needed(loaded)):
        try:
            app.start(loaded, folder)
            _say_where(loaded, folder, time.monotonic() - started)
            while True:
                time.sleep(1.0)
        except RuntimeError as error:
            raise ClusterError(f"the service does not start; see {folder}/logs. {app.why_not_up(error)}") from error
        finally:
            app.stop(loaded)


def _preflight(config: RunConfig, folder: str, bundle: str | None) -> None:
    """What is wrong with the files is said before anything starts."""
    from distill_ray.serving.front.keys import load_keys
    from distill_ray.serving.models import require_runnable
    from distill_ray.serving.routing.bundles import Bundles
    from distill_ray.serving.routing.embedder import load_embedder

    load_keys(config.serve.keys, str(Path(folder) / "keys.jsonl"), config.serve.host)
    bundles = Bundles(Path(folder) / "bundles")
    if bundle is not None:
        bundles.promote(bundles.install(bundle))
    current = bundles.current()
    embedder = load_embedder(config.serve.embedder)
    if current is not None:
        bundles.load(current, embedder.identity)
        require_runnable(config, bundles.path(current))


def _say_where(config: RunConfig, folder: str, seconds: float) -> None:
    host = f"[{config.serve.host}]" if ":" in config.serve.host else config.serve.host
    url = f"http://{host}:{config.serve.port}"
    typer.echo(f"up after {seconds:.0f} s: {url}/v1 (OpenAI API), {url}/ (status page); files in {_shown(folder)}")
    typer.echo(f"""try:   curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{{"messages": [{{"role": "user", "content": "..."}}]}}'""")
    typer.echo("Ctrl-C ends it")


def promote(
    config: ConfigPath,
    bundle: Annotated[str, typer.Argument(help="Folder of a bundle, or the version of an installed one.")],
    overrides: Overrides = None,
) -> None:
    """Make a bundle the current one. A running service loads its student first and changes over without a gap.

    Example: `distill-ray promote config.yaml runs/mine/bundle`
    """
    bundles = _bundles(load_config(config, overrides or []))
    version = bundles.install(bundle) if Path(bundle).is_dir() else bundle
    before = bundles.current()
    bundles.promote(version)
    typer.echo(f"current: {version}" + (f" (before: {before})" if before not in (None, version) else ""))


def rollback(
    config: ConfigPath,
    version: Annotated[str | None, typer.Argument(help="An earlier version. Default: the one before.")] = None,
    overrides: Overrides = None,
) -> None:
    """Go back to an earlier bundle, at once.

    Example: `distill-ray rollback config.yaml`
    """
    bundles = _bundles(load_config(config, overrides or []))
    before = bundles.current()
    typer.echo(f"current: {bundles.rollback(version)} (before: {before})")


@keys_app.command("add")
def add_key(config: ConfigPath, owner: Annotated[str, typer.Argument(help="Whose it is.")]) -> None:
    """Make a key and print it, once.

    Example: `distill-ray keys add config.yaml alice`
    """
    from distill_ray.serving.front.keys import add_key

    typer.echo(add_key(_keys_file(load_config(config)), owner))
    typer.echo("This is shown once; a running service knows it when it is started again.", err=True)


@keys_app.command("list")
def list_keys(config: ConfigPath) -> None:
    """Owners, and the beginning of each key's hash.

    Example: `distill-ray keys list config.yaml`
    """
    from distill_ray.serving.front.keys import read_keys

    for key in read_keys(_keys_file(load_config(config))):
        typer.echo(f"{key.owner}  {key.digest[:12]}")


def _keys_file(config: RunConfig) -> Path:
    from distill_ray.serving.names import service_folder

    return Path(config.serve.keys.file or Path(service_folder(config)) / "keys.jsonl")


def _bundles(config: RunConfig):  # type: ignore[no-untyped-def]
    from distill_ray.serving.names import service_folder
    from distill_ray.serving.routing.bundles import Bundles

    return Bundles(Path(service_folder(config)) / "bundles")


def _shown(path: str) -> str:
    return os.path.relpath(path)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(serve)
    app.command()(promote)
    app.command()(rollback)
    app.add_typer(keys_app)
