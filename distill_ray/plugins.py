"""Parts from other installed packages: a recipe, an engine, a reward, a metric or a reader of the user's own.

A package names them as entry points, one group for each kind. The name of the entry point is what the YAML says:

| group                 | chosen by               | the entry point names                                           |
|-----------------------|-------------------------|-----------------------------------------------------------------|
| `distill_ray.recipes` | `recipe.type`           | a `Plugin`: config class, and function from config to `Recipe`  |
| `distill_ray.engines` | `teacher.type`          | a `Plugin`: config class, and function from config to `Engine`  |
| `distill_ray.rewards` | `recipe.reward.type`    | a `Plugin`: config class, and function from config to `Reward`  |
| `distill_ray.metrics` | `evaluate.metrics`      | a function (answer, expected) -> number                         |
| `distill_ray.readers` | `data.format`, or the   | a function from an opened binary file to an iterator of rows    |
|                       | file's ending           | (dicts)                                                         |

Nothing is imported before a config names it, so a package that is broken or slow troubles only those who use it. The
YAML never holds an import path: it chooses among what somebody installed here. Built-in names always win, so that no
package can change what a config means; `distill-ray doctor` tells of a plugin that can never be chosen for that reason.

`Variants` and `Name` put this into the config models, as annotations of the fields that choose.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import EntryPoint
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from distill_ray.errors import ConfigError, DistillError


class Group(StrEnum):
    """The groups of entry points."""

    RECIPES = "distill_ray.recipes"
    ENGINES = "distill_ray.engines"
    REWARDS = "distill_ray.rewards"
    METRICS = "distill_ray.metrics"
    READERS = "distill_ray.readers"

    @property
    def kind(self) -> str:
        """One of them, in words."""
        return self.rpartition(".")[2].removesuffix("s")


@dataclass(frozen=True)
class Plugin:
    """What the entry point of a recipe, engine or reward names.

    Args:
        config: the keys of its section: a `BaseRecipeConfig`, `BaseEngineConfig` or `BaseRewardConfig` whose
            `type: Literal[NAME] = NAME` repeats the name of the entry point.
        make: from such a config to the `Recipe`, `Engine` or `Reward`.
    """

    config: type[BaseModel]
    make: Callable[[Any], Any]


BUILT_IN: dict[Group, frozenset[str]] = {}  # filled by `Variants` and `Name`, which hold the names
_LOADED: dict[Group, dict[str, Plugin]] = {}  # for the JSON schema, and with it for "did you mean"


def names(group: Group) -> list[str]:
    """Names of the installed plugins that can be chosen. Imports none of them."""
    return sorted({point.name for point in _entry_points(group, tuple(sys.path))} - BUILT_IN.get(group, frozenset()))


def shadowed(group: Group) -> list[str]:
    """Plugins that can never be chosen, as "NAME (PACKAGE VERSION)": a built-in part has the name."""
    points = _entry_points(group, tuple(sys.path))
    return [f"{p.name} ({_package(p)})" for p in points if p.name in BUILT_IN.get(group, frozenset())]


def packages(chosen: Iterable[tuple[Group, str]]) -> dict[str, str]:
    """Which of these parts are from other packages: "recipe shout" -> "PACKAGE VERSION"."""
    found = {f"{group.kind} {name}": _find(group, name) for group, name in chosen}
    return {part: _package(point) for part, point in found.items() if point is not None}


def versions() -> dict[str, str]:
    """All packages with plugins -> version."""
    points = [point for group in Group for point in _entry_points(group, tuple(sys.path))]
    return {point.dist.name: point.dist.version for point in points if point.dist is not None}


def load(group: Group, name: str) -> Any:
    """Import what the entry point names: a `Plugin`, or the function of a metric or reader.

    Raises:
        ConfigError: there is none, it cannot be imported, or it is not what it should be.
    """
    point = _find(group, name)
    if point is None:
        known = ", ".join(sorted({*BUILT_IN.get(group, ()), *names(group)}))
        raise ConfigError(f"no {group.kind} `{name}` is built in or installed here; known: {known}")
    try:
        loaded = point.load()
    except Exception as error:  # whatever a package does when it is imported
        raise ConfigError(f"{described(group, name)} cannot be imported: {why(error)}; mend the package") from error
    if group in (Group.METRICS, Group.READERS):
        if not callable(loaded):
            raise ConfigError(f"{described(group, name)} is {type(loaded).__name__}, expected a function")
        return loaded
    if not isinstance(loaded, Plugin):
        raise ConfigError(
            f"{described(group, name)} is {type(loaded).__name__}, expected distill_ray.plugins.Plugin(config=..., "
            "make=...)"
        )
    return loaded


def make(group: Group, config: Any, like: type) -> Any:
    """Build a recipe, engine or reward of another package.

    Args:
        group: what it is.
        config: of its own class.
        like: the protocol or class that says what it must have.

    Raises:
        ConfigError: the package raised it, or failed otherwise, or built something else.
    """
    try:
        made = load(group, config.type).make(config)
    except DistillError:
        raise
    except Exception as error:
        raise ConfigError(f"{described(group, config.type)} cannot be built: {why(error)}; mend the package") from error
    members = {**like.__annotations__, **vars(like)}
    missing = [member for member in members if not member.startswith("_") and not hasattr(made, member)]
    if missing:
        raise ConfigError(
            f"{described(group, config.type)} makes {type(made).__name__}, which has no {', '.join(missing)}; "
            f"see {like.__module__}.{like.__name__}"
        )
    return made


def described(group: Group, name: str) -> str:
    """For messages: "the recipe `shout` of PACKAGE VERSION (module:attribute)"."""
    point = _find(group, name)
    assert point is not None
    return f"the {group.kind} `{name}` of {_package(point)} ({point.value})"


def _find(group: Group, name: str) -> EntryPoint | None:
    """The entry point; None for what is built in or not there. Raises ConfigError: two packages have the name."""
    if name in BUILT_IN.get(group, frozenset()):
        return None
    found = [point for point in _entry_points(group, tuple(sys.path)) if point.name == name]
    if len(found) > 1:
        raise ConfigError(
            f"the {group.kind} `{name}` is in {' and in '.join(map(_package, found))}; uninstall all but one"
        )
    return found[0] if found else None


@functools.cache
def _entry_points(group: Group, path: tuple[str, ...]) -> list[EntryPoint]:
    """Of a search path: a test, or a notebook, may change it."""
    del path
    return list(importlib.metadata.entry_points(group=group))


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def why(error: Exception) -> str:
    """The error, and where in the foreign code it was raised, for messages."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({where.filename}:{where.lineno})"


# -- in the config models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variants:
    """On a union of config classes, the last of which is the base of all: the variants by `type`, and any plugin's.

    `Annotated[A | B | Base, Variants(group)]` is A or B by their `type`, or the config class of a plugin, which has to
    derive from `Base`. The keys, errors and their places are the same for all.
    """

    group: Group

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        *built_in, base = get_args(source)
        tags = [name for variant in built_in for name in get_args(variant.model_fields["type"].annotation)]
        BUILT_IN[self.group] = BUILT_IN.get(self.group, frozenset()) | set(tags)  # of a teacher there are more

        def validate(value: Any, inner: Callable[[Any], Any], info: ValidationInfo) -> Any:
            if isinstance(value, base):
                return value
            name = value.get("type") if isinstance(value, dict) else None
            if not isinstance(name, str) or name in tags:
                return inner(value)
            if name not in names(self.group):
                expected = ", ".join(map(repr, [*tags, *names(self.group)]))
                raise PydanticKnownError(
                    "union_tag_invalid", {"discriminator": "'type'", "tag": name, "expected_tags": expected}
                )
            try:
                config = self._config_class(name, base)
            except ConfigError as error:
                raise ValueError(str(error)) from error  # pydantic adds the key
            # A union with the others again, only so that places in errors have the same form.
            variants: Any = Annotated[Union[(*built_in, config)], Field(discriminator="type")]
            return TypeAdapter(variants).validate_python(value, context=info.context)

        union = handler(Annotated[Union[tuple(built_in)], Field(discriminator="type")])  # noqa: UP007
        # By what the value is, not by the union: a plugin's keys are kept.
        as_it_is = core_schema.simple_ser_schema("any")
        return core_schema.with_info_wrap_validator_function(validate, union, serialization=as_it_is)

    def _config_class(self, name: str, base: type[BaseModel]) -> type[BaseModel]:
        plugin = load(self.group, name)
        config = plugin.config
        if not (isinstance(config, type) and issubclass(config, base)):
            raise ConfigError(f"{described(self.group, name)}: its config class does not derive from {base.__name__}")
        field = config.model_fields.get("type")
        if field is None or field.annotation != Literal[name] or field.default != name:
            raise ConfigError(
                f'{described(self.group, name)}: {config.__name__} needs the field `type: Literal["{name}"] = "{name}"`'
            )
        _LOADED.setdefault(self.group, {})[name] = plugin
        return config

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        plugins = [handler(plugin.config.__pydantic_core_schema__) for plugin in _LOADED.get(self.group, {}).values()]
        return {**found, "oneOf": [*found["oneOf"], *plugins]} if plugins else found


@dataclass(frozen=True)
class Name:
    """On `Literal[...] | str`: one of these names, or that of a plugin. It is loaded, so that it is known to work."""

    group: Group

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        built_in = [name for part in get_args(source) if get_origin(part) is Literal for name in get_args(part)]
        BUILT_IN[self.group] = frozenset(built_in)

        def check(name: str) -> str:
            if name in built_in:
                return name
            if name not in names(self.group):
                *others, last = map(repr, [*built_in, *names(self.group)])
                raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
            try:
                load(self.group, name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
            return name

        return core_schema.no_info_after_validator_function(check, core_schema.str_schema())
