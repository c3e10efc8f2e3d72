"""Sandboxed Jinja over a row's columns. Values are data: braces inside them are never rendered again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from distill_ray.errors import ConfigError, RowError
from distill_ray.records import RejectReason

MAX_PRODUCT = 10_000_000  # characters
MAX_EXPONENT = 1000


class TextTemplate:
    """A template that makes text from columns.

    A printed value must be text or a number: null, a list or an object is a RowError, since Python's spelling
    of them ("None", "['a']") would silently become a query. A template of one column takes only text.

    Args:
        source: the Jinja text.
        key: the dotted config key, for messages.

    Raises:
        ConfigError: it does not compile; names the key and the line.
    """

    def __init__(self, source: str, *, key: str) -> None:
        self.key = key
        if not source.strip():
            raise ConfigError(f"{key}: empty; write text with columns in it, for example {{{{ text }}}}")
        try:
            tree = _ENVIRONMENT.parse(source)
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{key}: not a valid template, line {error.lineno}: {error.message} (got {_show(source)}); "
                "columns are written as {{ column }}"
            ) from error
        if next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None) is not None:
            raise ConfigError(f"{key}: a template of the config cannot include other files (got {_show(source)})")
        self.columns = columns_of(source)
        self._only_column = _only_column(tree)

    def render(self, columns: Mapping[str, object]) -> str:
        """Render one row.

        Raises:
            RowError: `missing_column`, or `not_text` for a value that cannot be printed.
            ConfigError: the template reaches for something that the sandbox forbids.
        """
        if self._only_column is not None:
            value = columns.get(self._only_column, "")
            if not isinstance(value, str):
                raise RowError(
                    RejectReason.NOT_TEXT, f"column `{self._only_column}` is {kind_of(value)}, expected text"
                )
        try:
            return self._template.render(columns)
        except jinja2.UndefinedError as error:
            missing = sorted(self.columns - columns.keys())
            named = ", ".join(f"`{name}`" for name in missing)
            detail = f"no column {named}" if missing else str(error)
            raise RowError(RejectReason.MISSING_COLUMN, detail) from error
        except (SecurityError, OverflowError) as error:
            raise ConfigError(f"{self.key}: not allowed in a template: {error}; use plain values") from error
        except RowError:
            raise
        except Exception as error:  # a filter or an operator met a value of the wrong type: this row's fault
            raise RowError(RejectReason.NOT_TEXT, f"{self.key} does not render: {error}") from error


def columns_of(source: str) -> frozenset[str]:
    """Names of the columns that a template reads. Raises jinja2.TemplateSyntaxError."""
    return frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(source)) - _GLOBALS)


def kind_of(value: object) -> str:
    """A value's kind in the words of JSON, for messages: "null", "a number (17)", "a list"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({value})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _printable(value: Any) -> Any:
    """Jinja's `finalize`: sees every printed value."""
    if value is None or isinstance(value, list | tuple | set | bytes | Mapping):
        raise RowError(
            RejectReason.NOT_TEXT,
            f"{kind_of(value)} where the template prints text; a filter (join, tojson) can make it text",
        )
    return value


def _only_column(tree: nodes.Template) -> str | None:
    """The column's name if the template prints one column and nothing else but spaces around it."""
    parts: list[nodes.Node] = []
    for node in tree.body:
        parts.extend(node.nodes if isinstance(node, nodes.Output) else [node])
    parts = [part for part in parts if not (isinstance(part, nodes.TemplateData) and not part.data.strip())]
    return parts[0].name if len(parts) == 1 and isinstance(parts[0], nodes.Name) else None


def _show(source: str) -> str:
    text = repr(source)
    return text if len(text) <= 80 else text[:77] + "..."


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox, which allows `text * 10**9`: with a limit on what one operator can make."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        is_text = any(isinstance(value, str | list | tuple) for value in (left, right))
        size = len(left) * right if is_text and hasattr(left, "__len__") else 0
        size = max(size, len(right) * left if is_text and hasattr(right, "__len__") else 0)
        if size > MAX_PRODUCT or (operator == "**" and not is_text and abs(right) > MAX_EXPONENT):
            raise SecurityError(f"the result of {operator} is too big")
        return super().call_binop(context, operator, left, right)


_ENVIRONMENT = _Sandbox(undefined=jinja2.StrictUndefined, autoescape=False, finalize=_printable)
# Only what a template needs for a loop: every other global is a name that a column may have.
_ENVIRONMENT.globals = {name: _ENVIRONMENT.globals[name] for name in ("range", "namespace")}
_GLOBALS = frozenset(_ENVIRONMENT.globals)
