"""Write `docs/configuration.md` from the models, so that every key is documented once: where it is declared.

python -m distill_ray.config.reference > docs/configuration.md
"""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill_ray.config.run import RunConfig


def reference() -> str:
    """The whole page as Markdown."""
    parts = [
        "# Configuration",
        "Made by `python -m distill_ray.config.reference`; a test keeps it in step with the code. Unknown keys are "
        "errors. `--set dotted.key=value` overrides any of them. Relative paths start at the config file's folder. "
        "A `type`, a metric or a format may also be that of [another package](extending.md).",
    ]
    for path, model in _sections("", RunConfig):
        parts += [f"## {path}" if path else "## Top level", _first_paragraph(model), _table(model)]
    return "\n\n".join(parts) + "\n"


def _sections(path: str, model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """A model and all models below it, in order, with their dotted paths."""
    found: list[tuple[str, type[BaseModel]]] = [(path, model)]
    for name, field in _own_first(model):
        below = _models(field.annotation)
        if len(below) > 1:  # a union ends with the base of variants that other packages bring
            below = [model for model in below if "type" in model.model_fields]
        for child in below:
            kind = child.model_fields.get("type")
            variant = f" (type: {kind.default})" if kind is not None and len(below) > 1 else ""
            inner = _sections(f"{path}.{name}".replace("`", "").lstrip("."), child)
            known = {m for _, m in found}
            quoted = [(p if p.startswith("`") else f"`{p}`", m) for p, m in inner]
            found += [(p + (variant if m is child else ""), m) for p, m in quoted if m not in known]
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Config models in an annotation, through unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _table(model: type[BaseModel]) -> str:
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in _own_first(model):
        description = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type_name(field.annotation)} | {_default(field)} | {description} |")
    return "\n".join(lines)


def _own_first(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """The fields, those that a variant shares with others last."""
    return sorted(model.model_fields.items(), key=lambda item: item[0] not in model.__annotations__)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type):
        return "section" if issubclass(annotation, BaseModel) else annotation.__name__
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        is_of_names = any(typing.get_origin(a) is typing.Literal for a in arguments)
        names = [
            "a plugin's name" if a is str and is_of_names else _type_name(a) for a in arguments if a is not type(None)
        ]
        return " or ".join(dict.fromkeys(names))
    origin = typing.get_origin(annotation)
    if origin in (list, dict):
        inner = _type_name(arguments[-1])
        return f"{'list' if origin is list else 'mapping'}" + (f" of {inner}" if inner != "Any" else "")
    if arguments:  # Annotated
        return _type_name(arguments[0])
    return str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    if isinstance(field.default, list) and len(str(field.default)) > 80:
        return f"{len(field.default)} entries"
    if field.default is None:
        return ""
    shown = str(field.default).replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`"


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())


if __name__ == "__main__":
    print(reference(), end="")
