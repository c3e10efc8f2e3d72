"""`distill-ray pairs`: look at what was collected, take it elsewhere, delete it for good."""

from __future__ import annotations

import datetime
import heapq
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_ray.completion import config_keys, one_of
from distill_ray.config import RunConfig, load_config
from distill_ray.errors import ConfigError
from distill_ray.pipeline.progress import People

if TYPE_CHECKING:
    from distill_ray.serving.collecting.store import PairStore

pairs_app = typer.Typer(
    name="pairs",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The pairs that a service collected: list, export, delete.\n\n"
    "Example: `distill-ray pairs list config.yaml --limit 5`",
)
forgetting: list[Callable[[RunConfig, PairStore], None]] = []
"""Told after a deletion, with config and store: what keeps texts of pairs in the layers above this one."""

console = People(markup=False)

ConfigPath = Annotated[Path, typer.Argument(help="The YAML file of the service.", show_default=False)]
Owner = Annotated[str | None, typer.Option("--owner", help="Only of this owner of a key.")]
Contains = Annotated[
    str | None, typer.Option("--contains", help="Only where this text occurs, in question, answer or tools.")
]
Ids = Annotated[list[str] | None, typer.Option("--id", help="Only this pair. Repeatable.")]
Indexed = Annotated[
    bool | None, typer.Option("--indexed/--not-indexed", help="Only those that a bundle was (not) trained on.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=config_keys,
        help="Override a key, e.g. `--set serve.folder=/srv/mine`. Repeatable.",
    ),
]


@pairs_app.command("list")
def list_pairs(
    config: ConfigPath,
    owner: Owner = None,
    contains: Contains = None,
    indexed: Indexed = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest so many.")] = 20,
    show_text: Annotated[bool, typer.Option("--show-text", help="Questions and answers too.")] = False,
    overrides: Overrides = None,
) -> None:
    """The newest pairs, without their text unless asked for.

    Example: `distill-ray pairs list config.yaml --owner shop --limit 5`
    """
    from distill_ray.serving.collecting.store import ALL, Selection

    store, place = _store(load_config(config, overrides or []))
    where = Selection(owner=owner, contains=contains, indexed=indexed)
    columns = ["pair_id", "created", "owner", "teacher", "prompt_tokens", "completion_tokens", "indexed_by"]
    columns += ["messages", "completion", "tool_calls"] if show_text else []
    found = (record for batch in store.scan(where, columns) for record in batch.to_pylist())
    for record in heapq.nlargest(limit, found, key=lambda record: record["created"]):
        _show(record, show_text)
    deletions = store.deletions()
    num_deleted = sum(deletion.num for deletion in deletions)
    chosen = f"{store.count(where):,} of them chosen, " if where != ALL else ""
    console.print(
        f"pairs {store.count():,}, {chosen}{store.count(Selection(indexed=True)):,} indexed; "
        f"{num_deleted:,} deleted in {len(deletions)} deletions; in {place}"
    )


@pairs_app.command("export")
def export_pairs(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=one_of("messages", "parquet"),
            help="messages: JSON lines for other tools. parquet: for `data:`.",
        ),
    ] = "messages",
    owner: Owner = None,
    contains: Contains = None,
    indexed: Indexed = None,
    overrides: Overrides = None,
) -> None:
    """Write pairs to a file, as chat messages that end with the teacher's answer.

    Example: `distill-ray pairs export config.yaml pairs.parquet --format parquet`
    """
    from distill_ray.serving.collecting.pairs_export import export_pairs as run_export
    from distill_ray.serving.collecting.store import Selection

    where = Selection(owner=owner, contains=contains, indexed=indexed)
    store, place = _store(load_config(config, overrides or []))
    num_written, num_left_out = run_export(store, out, format, where)
    left_out = f"; {num_left_out} with tool calls left out (--format messages has them)" if num_left_out else ""
    console.print(f"{num_written:,} pairs of {place}{left_out}")
    console.print(f"wrote: {out}", soft_wrap=True)


@pairs_app.command("delete")
def delete_pairs(
    config: ConfigPath,
    owner: Owner = None,
    contains: Contains = None,
    ids: Ids = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many that would be.")] = False,
    overrides: Overrides = None,
) -> None:
    """Delete pairs for good: from the store, the next training, the next index and the verdicts of cycles.

    A deleted pair stays deleted.

    Example: `distill-ray pairs delete config.yaml --contains "Jane Doe" --dry-run`
    """
    from distill_ray.serving.collecting.store import ALL, Selection

    where = Selection(ids=tuple(ids) if ids else None, owner=owner, contains=contains)
    if where == ALL or "" in (owner, contains):
        raise ConfigError("pairs delete: say which: --owner, --contains or --id (together: all of them must hold)")
    loaded = load_config(config, overrides or [])
    store, place = _store(loaded)
    if dry_run:
        console.print(f"would delete {store.count(where):,} of {store.count():,} pairs in {place}")
        return
    num_deleted = store.delete(where)
    console.print(f"deleted {num_deleted:,} pairs; {store.count():,} are left in {place}")
    for forget in forgetting:
        forget(loaded, store)


def _store(loaded: RunConfig) -> tuple[PairStore, str]:
    """The store of a service, and where it is, for messages. Raises ConfigError, StoreError: there is none."""
    from distill_ray.serving.collecting.store import existing_store
    from distill_ray.serving.names import existing_service_folder, service_folder

    section = loaded.serve.collect.store
    if section.url is not None:  # may be asked from anywhere
        return existing_store(section, service_folder(loaded)), section.url
    folder = existing_service_folder(loaded)
    return existing_store(section, folder), os.path.relpath(Path(folder) / "pairs")


def _show(record: dict[str, Any], show_text: bool) -> None:
    from distill_ray.models import short_name

    when = datetime.datetime.fromtimestamp(record["created"] // 10**9, datetime.UTC).isoformat(" ")[:19]
    tokens = f"{_number(record['prompt_tokens'])}+{_number(record['completion_tokens'])} tokens"
    mark = f"indexed by {record['indexed_by']}" if record["indexed_by"] else "not indexed"
    owner, teacher = _printable(record["owner"]), _printable(short_name(record["teacher"]))
    console.print(f"{record['pair_id']}  {when}  {owner}  {teacher}  {tokens}  {mark}")
    if show_text:
        from distill_ray.serving.collecting.pairs_export import conversation

        for message in conversation(record):
            said = [message.get("content"), message.get("tool_calls")]
            text = "  ".join(part if isinstance(part, str) else str(part) for part in said if part)
            console.print(f"    {_printable(str(message.get('role')))}: {_printable(text)}")
        console.print()


def _number(count: int | None) -> str:
    return "?" if count is None else str(count)


def _printable(text: str) -> str:
    """Without what a terminal would obey: a pair holds whatever a client sent."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text).replace("\n", "\n      ")
