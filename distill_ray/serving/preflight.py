"""What is wrong with a service is said before anything starts, and before its current bundle changes."""

from __future__ import annotations

from pathlib import Path

from distill_ray.config import RunConfig
from distill_ray.pipeline.check import check_places
from distill_ray.serving.front.keys import Keys, load_keys
from distill_ray.serving.models.applications import require_runnable
from distill_ray.serving.routing.bundle import load_bundle
from distill_ray.serving.routing.bundles import Bundles, bundles_of
from distill_ray.serving.routing.embedder import load_embedder


def require_startable(config: RunConfig, folder: str, bundle: str | None) -> Keys:
    """Read all that a service needs before it starts; returns its keys.

    Args:
        config: the whole YAML.
        folder: of the service.
        bundle: to be put in service first; None: the one that is.

    Raises:
        ConfigError: keys are required and there are none; or a bucket for pairs or bundles cannot be used.
        ServingError: see `require_servable`.
    """
    list(check_places(config, None))
    bundles = bundles_of(config, folder)
    keys = load_keys(config.serve.keys, str(Path(folder) / "keys.jsonl"), config.serve.host)
    require_servable(config, bundles, bundle or bundles.current())
    return keys


def require_servable(config: RunConfig, bundles: Bundles, bundle: str | None) -> None:
    """Hold a bundle against what the service embeds with and runs students on.

    Args:
        config: the whole YAML.
        bundles: of the service.
        bundle: a bundle's folder, or the version of an installed one; None: there is none yet.

    Raises:
        EmbedderError: the embedder does not load.
        BundleError: the bundle is not whole, not there, or made with another embedder.
        ConfigError: the config says an engine that cannot run its student.
    """
    embedder = load_embedder(config.serve.embedder)
    if bundle is None:
        return
    if Path(bundle).is_dir():
        load_bundle(Path(bundle), embedder.identity)
        require_runnable(config, Path(bundle))
    else:  # its weights are looked at by who promotes it
        require_runnable(config, bundles.load(bundle, embedder.identity, with_student=False).folder)


def put_in_service(bundles: Bundles, bundle: str) -> str:
    """Install a bundle's folder, or take an installed version, and make it the current one. Returns its version.

    Raises:
        BundleError: it is not whole, not there, or there is no room.
    """
    version = bundles.install(bundle) if Path(bundle).is_dir() else bundle
    bundles.promote(version)
    return version
