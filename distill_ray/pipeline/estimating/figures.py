"""A figure and where it comes from, so that each of them can be replaced by a better one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill_ray.config import HardwareConfig
from distill_ray.pipeline.estimating.hardware import Gpu

Origin = Literal["measured", "given", "estimated"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that the plan rests on."""

    name: str
    value: float
    origin: Origin
    how: str
    """The folder it was measured in, the key that gives it, or what it is reckoned from."""

    replace: str = ""
    """How to replace it by a better one."""


def best(
    name: str,
    *,
    estimated: float,
    how: str,
    key: str,
    given: float | None = None,
    measured: float | None = None,
    measured_in: str = "",
    measurable: bool = True,
) -> Figure:
    """Measured before given before estimated; see the package's docstring for why.

    Args:
        name: what it is, with its unit.
        estimated: taken where nothing better is known.
        how: what the estimate is reckoned from.
        key: dotted key of the config that gives it.
        given: the value of that key.
        measured: by a run.
        measured_in: its folder.
        measurable: whether a run measures it.
    """
    trial = "--run-dir of a trial" if measurable else ""
    if measured is not None:
        return Figure(name, measured, "measured", measured_in)
    if given is not None:
        return Figure(name, given, "given", key, trial)
    return Figure(name, estimated, "estimated", how, ", or ".join(filter(None, [key, trial])))


def given_price(who: str, plan: HardwareConfig, key: str) -> list[Figure]:
    """Of an hour of what needs no GPU, where one is given."""
    if plan.price_per_hour is None:
        return []
    return [Figure(f"{who}: USD per hour and replica", plan.price_per_hour, "given", f"{key}.price_per_hour")]


def price(who: str, gpu: Gpu, key: str) -> Figure:
    """Of a GPU-hour: given, or the table's guess."""
    name, key = f"{who}: USD per hour and {gpu.name}", f"{key}.price_per_hour"
    if not gpu.is_list_price:
        return Figure(name, gpu.price_per_hour, "given", key)
    return Figure(name, gpu.price_per_hour, "estimated", "a guess at a list price", key)
