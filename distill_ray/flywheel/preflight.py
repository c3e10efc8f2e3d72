"""What a cycle would stumble over after hours of training is said before it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from distill_ray.config import RunConfig
from distill_ray.config.flywheel import OpenAITrainerConfig
from distill_ray.engines.openai import read_key
from distill_ray.errors import ConfigError, InputError, raise_all
from distill_ray.flywheel.enough import least_for_threshold
from distill_ray.flywheel.promotion import require_served
from distill_ray.flywheel.regressions import read_regressions
from distill_ray.flywheel.splitting import evaluation_texts
from distill_ray.pipeline.check import check_judge, check_places
from distill_ray.serving.calibration.anytime import upper_bound
from distill_ray.serving.calibration.calibrate import served_form


def require_ready(config: RunConfig, service: Path) -> None:
    """Make sure that nothing is in a cycle's way that can be known.

    Raises:
        InputError: the config, or a file that it names, is wrong.
        FlywheelError: candidates are to be tried on real requests, and no service runs.
    """
    list(check_flywheel(config))
    list(check_places(config, None))
    if config.flywheel.shadow is not None:
        require_served(service)


def check_flywheel(config: RunConfig) -> Iterator[str]:
    """Look at what the config says of cycles. Yields one line, if it is in order; starts nothing.

    Raises:
        InputError: what is wrong, all of it.
    """
    flywheel, wrong, found = config.flywheel, list[InputError](), list[str]()

    def look(at: Callable[[], object]) -> None:
        try:
            line = at()
        except InputError as error:
            wrong.append(error)
        else:
            found.extend([line] if isinstance(line, str) else [])

    look(lambda: _regressions(flywheel.gate.regressions))
    look(lambda: _evaluation(flywheel.evaluation, flywheel.evaluation_column))
    look(lambda: served_form(config))
    look(lambda: _trainer(config))
    look(lambda: list(check_judge(config)))
    look(lambda: _enough_can_be_compared(config))
    look(lambda: _shadow_can_show_it(config))
    raise_all(wrong)
    yield f"flywheel: {'; '.join(found)}"


def _regressions(path: str | None) -> str:
    return f"{len(read_regressions(path))} regression prompts"


def _evaluation(files: list[str], column: str) -> str:
    return f"{len(evaluation_texts(files, column))} requests of evaluation files"


def _trainer(config: RunConfig) -> str:
    trainer = config.flywheel.trainer
    if isinstance(trainer, OpenAITrainerConfig):
        read_key(trainer.api_key_env, "flywheel.trainer.api_key_env")
        return f"trained by {trainer.base_url} (it was not asked)"
    return "trained here"


def _enough_can_be_compared(config: RunConfig) -> None:
    most, gate, calibrate = config.calibrate.max_pairs, config.flywheel.gate, config.calibrate
    if most < gate.min_pairs:
        raise ConfigError(
            f"calibrate.max_pairs: {most}, and a verdict takes {gate.min_pairs} (flywheel.gate.min_pairs), so nothing "
            f"would ever be promoted; give calibrate.max_pairs {gate.min_pairs} or more"
        )
    if most < (least := least_for_threshold(config)):
        raise ConfigError(
            f"calibrate.max_pairs: {most}, and a threshold takes {least} (calibrate.error_budget "
            f"{calibrate.error_budget:g} at calibrate.confidence {calibrate.confidence:g}), so nothing would ever be "
            f"promoted; give calibrate.max_pairs {least} or more"
        )


def _shadow_can_show_it(config: RunConfig) -> None:
    shadow, budget, alpha = config.flywheel.shadow, config.calibrate.error_budget, 1.0 - config.calibrate.confidence
    if shadow is None or shadow_shows(shadow.pairs, budget, alpha):
        return
    enough = 2 * shadow.pairs
    while not shadow_shows(enough, budget, alpha):
        enough *= 2
    least = bisect_left(range(enough), True, lo=enough // 2, key=lambda num: shadow_shows(num, budget, alpha))
    raise ConfigError(
        f"flywheel.shadow.pairs: {shadow.pairs} answers, all of them good, do not show that calibrate.error_budget "
        f"({budget:g}) is kept with calibrate.confidence {config.calibrate.confidence:g}, so nothing would ever be "
        f"promoted; give flywheel.shadow.pairs {least} or more"
    )


def shadow_shows(num: int, budget: float, alpha: float) -> bool:
    """Whether a trial of so many answers can end well: none of them is bad."""
    return upper_bound(np.zeros(num), alpha, num) <= budget
