"""A bundle: one immutable, versioned folder with all that belongs to one student.

    bundle.json        what it is: version, context, prompt form, embedder, decision, threshold, hashes of all files
    student/           weights or adapter, tokenizer; a remote student has none
    index/             nearest trained requests (`index.py`)
    entries.arrow      per row of the index: example id, text, fingerprint, how well the student does there
    calibration.json   curve.json   curve.svg   how the threshold came about

A bundle is built beside its place and renamed, and read only if every byte is what was written: another embedder,
another format, a changed, missing or added file is a BundleError, and the teacher goes on answering. No file in it is
of a kind that runs code when it is read (safetensors, no pickle).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from distill_ray.errors import BundleError
from distill_ray.records import Message
from distill_ray.serving.routing.index import NearestIndex
from distill_ray.serving.routing.manifest import FORMAT, Manifest, seal_of

# What a bundle may hold. `.model` and `.txt` are vocabularies of tokenizers.
SAFE_SUFFIXES = frozenset({".json", ".safetensors", ".arrow", ".faiss", ".svg", ".md", ".jinja", ".txt", ".model"})
VERSION_PATTERN = re.compile(r"[0-9a-f]{12}")

ENTRIES_SCHEMA = pa.schema(
    [("example_id", pa.string()), ("text", pa.string()), ("fingerprint", pa.string()), ("outcome", pa.float32())],
    metadata={"distill_ray.entries": "1"},
)


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been read and found whole. Immutable: any number of threads may use it."""

    folder: Path
    manifest: Manifest
    index: NearestIndex
    outcomes_N: np.ndarray  # [N] float32, per row of the index
    entries: pa.Table

    @property
    def version(self) -> str:
        """Names it on every response."""
        return self.manifest.version

    @property
    def context(self) -> list[Message]:
        """What the teacher gets in front of the client's messages (`conversation.with_context`)."""
        return cast(list[Message], self.manifest.context)

    @property
    def student_folder(self) -> Path:
        """Weights or adapter, with the tokenizer; not there for a remote student."""
        return self.folder / "student"

    @cached_property
    def fingerprints(self) -> frozenset[str]:
        """Of the requests that the student was trained on."""
        return frozenset(self.entries["fingerprint"].unique().to_pylist())

    def text(self, row: int) -> str:
        """Text of a trained request, by its row in the index."""
        return self.entries["text"][row].as_py()

    def spells_control_tokens(self, text: str) -> bool:
        """Whether a text contains the spelling of one of the student's control tokens."""
        return self._control_tokens.search(text) is not None

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        tokens = sorted(filter(None, self.manifest.student.control_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def write_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    student: Path | None,
    index: NearestIndex,
    entries: pa.Table,
    reports: Mapping[str, bytes],
) -> Path:
    """Write a bundle and put it in its place in one move; what was there before is replaced.

    Args:
        folder: its place.
        manifest: with `files` and `seal` still empty.
        student: folder with weights and tokenizer; files of unsafe kinds in it are an error, hidden ones are left out.
            None for a remote student, and for no other.
        index: over the vectors of `entries`, row by row.
        entries: an ENTRIES_SCHEMA table.
        reports: further files by name (calibration.json, curve.svg, ...).

    Raises:
        BundleError: a file of a kind that a bundle may not hold, or the disk is full.
    """
    assert (student is None) == (manifest.student.kind == "remote"), manifest.student.kind
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".tmp-{secrets.token_hex(6)}-{folder.name}"
    try:
        scratch.mkdir()
        if student is not None:
            _copy_safe(student, scratch / "student")
        index.save(scratch / "index")
        with pa.OSFile(str(scratch / "entries.arrow"), "wb") as sink, pa.ipc.new_file(sink, ENTRIES_SCHEMA) as writer:
            writer.write_table(entries.cast(ENTRIES_SCHEMA))
        for name, content in reports.items():
            (scratch / name).write_bytes(content)
        hashes = {file: _sha256(scratch / file) for file in _visible_files(scratch)}
        sealed = manifest.model_copy(update={"files": hashes}).sealed()
        (scratch / "bundle.json").write_text(sealed.model_dump_json(indent=1) + "\n", encoding="utf-8")
        _put_in_place(scratch, folder)
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot write the bundle ({error.strerror or error}); check the disk's space and the folder's "
            "permissions, then calibrate again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def read_manifest(folder: Path) -> Manifest:
    """Read and check `bundle.json` alone.

    Raises:
        BundleError: it is missing, changed, or of another format.
    """
    path = folder / "bundle.json"
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder}: no bundle here (no bundle.json); make one with `distill-ray calibrate`"
        ) from error
    except OSError as error:
        raise _damaged(path, str(error)) from error


def parse_manifest(content: bytes, place: str) -> Manifest:
    """The same of its content, wherever that is from. Raises BundleError: it is changed, or of another format."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raise _damaged(place, str(error)) from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise BundleError(f"{place}: format {found!r}, and this version of distill-ray reads {FORMAT}; calibrate again")
    try:
        manifest = Manifest.model_validate(record)
    except ValidationError as error:
        raise _damaged(place, f"{error.error_count()} keys are wrong") from error
    if seal_of(record) != manifest.seal:
        raise _damaged(place, "its content is not what was written")
    return manifest


def check_files(folder: Path, manifest: Manifest, *, with_student: bool = True, place: str | None = None) -> None:
    """Hold every file against its hash.

    Args:
        folder: of the bundle.
        manifest: of it.
        with_student: False leaves the weights out, for who does not load them: they need not be there.
        place: what the folder is a copy of; for people.

    Raises:
        BundleError: a file is changed, missing, not listed, or of a kind that a bundle may not hold.
    """
    place = place or str(folder)
    check_names(_visible_files(folder, hidden=True), manifest, place, with_student=with_student)
    for file, expected in sorted(manifest.files.items()):
        _require_no_link(folder / file)
        if (with_student or not is_of_student(file)) and _sha256(folder / file) != expected:
            raise _damaged(f"{place}/{file}", "its sha256 is not what was written")


def check_names(names: Iterable[str], manifest: Manifest, place: str, *, with_student: bool = True) -> None:
    """Hold the files that are there against those that a bundle lists. Raises as `check_files`."""
    there = set(names) - {"bundle.json"}
    for file in sorted(there - manifest.files.keys()):
        raise BundleError(f"{place}/{file}: not a part of this bundle; remove the file or install the bundle again")
    for file in sorted(manifest.files):
        if file not in there and (with_student or not is_of_student(file)):
            raise BundleError(f"{place}/{file}: missing; install the bundle again")
        _require_safe_suffix(file, place)


def is_of_student(file: str) -> bool:
    """Whether a file of a bundle is only for who runs its student."""
    return file.startswith("student/")


def load_bundle(folder: Path, embedder_identity: str | None, *, with_student: bool = True) -> Bundle:
    """Read a bundle.

    Args:
        folder: of the bundle.
        embedder_identity: of the embedder that will make the vectors; None leaves that to the caller.
        with_student: whether the weights have to be there, and are read and held against their hashes.

    Raises:
        BundleError: it is not whole, or made with another embedder.
    """
    manifest = read_manifest(folder)
    if embedder_identity is not None and manifest.embedder_identity != embedder_identity:
        raise BundleError(
            f"{folder}: made with the embedder {manifest.embedder_identity}, and this service embeds with "
            f"{embedder_identity}; calibrate again, or set serve.embedder to the bundle's"
        )
    check_files(folder, manifest, with_student=with_student)
    index = NearestIndex.load(folder / "index")
    entries = _read_entries(folder)
    if not entries.schema.equals(ENTRIES_SCHEMA, check_metadata=True) or len(entries) != len(index):
        raise _damaged(folder / "entries.arrow", f"{len(entries)} rows for an index of {len(index)}")
    outcomes_N = entries["outcome"].to_numpy().astype(np.float32)
    return Bundle(folder, manifest, index, outcomes_N, entries.combine_chunks())


def learnt_entries(folder: Path) -> list[dict[str, Any]]:
    """The rows of a bundle's index, as records of ENTRIES_SCHEMA. Raises BundleError: they cannot be read."""
    return _read_entries(folder).to_pylist()


def _read_entries(folder: Path) -> pa.Table:
    try:
        with pa.memory_map(str(folder / "entries.arrow")) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(folder / "entries.arrow", str(error)) from error


def version_of(*parts: Any) -> str:
    """A bundle's version: 12 hex characters of a hash over all that it is made from (JSON values)."""
    content = json.dumps([FORMAT, *parts], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def folder_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of the visible files of a folder."""
    return {file: _sha256(folder / file) for file in _visible_files(folder)}


def utc_now() -> str:
    """For `created` and the history."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _copy_safe(source: Path, target: Path) -> None:
    target.mkdir()
    for file in _visible_files(source):
        _require_safe(source / file)
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)


def _put_in_place(scratch: Path, folder: Path) -> None:
    old = folder.parent / f".old-{secrets.token_hex(6)}-{folder.name}"
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _visible_files(folder: Path, *, hidden: bool = False) -> Iterator[str]:
    """Relative paths of the files in a folder, sorted; links too, which `_require_safe` then refuses."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (path.is_file() or path.is_symlink()) and (hidden or not any(p.startswith(".") for p in relative.parts)):
            yield relative.as_posix()


def _require_safe(path: Path) -> None:
    _require_no_link(path)
    _require_safe_suffix(path.name, str(path.parent))


def _require_no_link(path: Path) -> None:
    if path.is_symlink():
        raise BundleError(f"{path}: a link; a bundle holds only files of its own")


def _require_safe_suffix(file: str, place: str) -> None:
    suffix = PurePosixPath(file).suffix
    if suffix not in SAFE_SUFFIXES:
        raise BundleError(
            f"{place}/{file}: a bundle holds no {suffix or 'nameless'} files (some kinds run code when they are read); "
            f"allowed: {', '.join(sorted(SAFE_SUFFIXES))}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path | str, why: str) -> BundleError:
    reason = (why.strip().splitlines() or ["unreadable"])[0]
    return BundleError(f"{path}: damaged ({reason}); install the bundle again, or calibrate again")
