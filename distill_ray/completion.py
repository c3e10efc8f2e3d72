"""What TAB offers: keys of the config, run folders, names. Asked at every TAB, so nothing heavy is imported."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill_ray.config import RunConfig

_UNIONS = (Union, types.UnionType)


def one_of(*names: str) -> Callable[[str], list[str]]:
    """A completion that offers these names."""

    def offered(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return offered


def run_folders(incomplete: str) -> list[str]:
    """Folders below runs/ that hold a run. Where there is none the shell goes on with files."""
    found = sorted(str(file.parent) for file in Path("runs").glob("*/config.yaml"))
    return [folder for folder in found if folder.startswith(incomplete)]


def config_keys(incomplete: str) -> list[tuple[str, str]]:
    """`KEY=` for `--set`, each with what it is for; once it can be one key only, its values too.

    More than one offer also keeps the shell from adding a space after `=`.
    """
    written, has_value, _ = incomplete.partition("=")
    keys = {key: field for key, field in _keys(RunConfig) if (key == written if has_value else key.startswith(written))}
    offers = [(f"{key}=", " ".join((field.description or "").split())) for key, field in keys.items()]
    if len(keys) == 1:
        [(key, field)] = keys.items()
        offers += [(f"{key}={value}", "") for value in _values(field)]
    return [offer for offer in offers if offer[0].startswith(incomplete)]


def _keys(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted keys that take a value, of all variants; keys below lists have no name to set them by."""
    for name, field in model.model_fields.items():
        kinds = list(_kinds(field.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(sections) < len(kinds):
            yield f"{above}{name}", field
        for section in sections:
            yield from _keys(section, f"{above}{name}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    """What a key may hold, one alternative after the other, without null."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in _UNIONS:
        for argument in get_args(annotation):
            yield from _kinds(argument)
    elif annotation is not types.NoneType:
        yield annotation


def _values(field: FieldInfo) -> list[str]:
    """What a key takes where that can be listed; else its default."""
    found: list[str] = []
    for kind in _kinds(field.annotation):
        if kind is bool:
            found += ["true", "false"]
        elif get_origin(kind) is Literal:
            found += map(str, get_args(kind))
    if not found and isinstance(field.default, int | float | str):
        found = [str(field.default)]
    return found
