"""The bundles of a service: installed side by side, one of them current.

    VERSION/         an installed bundle, never changed
    current.json     which one serves, and which ones did before it: promoting and going back are one move of this file
    candidate.json   which one is to be up beside it, and what share of the traffic it is tried on
    fence.json       the newest lease of a flywheel that was here: an older one may not promote
    history.jsonl    every move, with its time; only ever appended to

Routers read `current.json` and load what it names; nobody writes into an installed bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray.errors import BundleError, LeaseLost
from distill_ray.serving.routing.bundle import VERSION_PATTERN, Bundle, check_files, load_bundle, read_manifest, utc_now
from distill_ray.serving.routing.manifest import Manifest

NOTHING = "none"  # to go back to: the teacher answers everything


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bundle that is up and does not serve."""

    version: str
    share: float = 0.0
    """Of the requests that it would get, which it answers in the shadow."""

    max_tokens: int = 0
    """Teacher tokens that may be spent on that."""


class Bundles:
    """The folder of a service's bundles. Cheap to construct; several processes may use it at once.

    Args:
        folder: local, or a file system that all nodes of the service see.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def list(self) -> list[Manifest]:
        """The installed bundles, oldest first; damaged ones are left out."""
        found: list[Manifest] = []
        for path in self.folder.glob("*/bundle.json"):
            with contextlib.suppress(BundleError):
                found.append(read_manifest(path.parent))
        return sorted(found, key=lambda manifest: (manifest.created, manifest.version))

    def path(self, version: str) -> Path:
        """Folder of an installed bundle. Raises BundleError: there is none of this version."""
        if not VERSION_PATTERN.fullmatch(version) or not (self.folder / version / "bundle.json").is_file():
            known = ", ".join(manifest.version for manifest in self.list()) or "none"
            raise BundleError(f"{self.folder}: no bundle {version!r} is installed; there are: {known}")
        return self.folder / version

    def load(self, version: str, embedder_identity: str | None, *, with_student: bool = True) -> Bundle:
        """Read an installed bundle. See `load_bundle`."""
        return load_bundle(self.path(version), embedder_identity, with_student=with_student)

    def install(self, source: str | Path) -> str:
        """Copy a bundle here, checked before and after. Returns its version; one that is here already is kept.

        Raises:
            BundleError: the source is not whole, or there is no room.
        """
        source = Path(source)
        manifest = read_manifest(source)
        check_files(source, manifest)
        target = self.folder / manifest.version
        scratch = self.folder / f".tmp-{secrets.token_hex(6)}-{manifest.version}"
        with self.locked():
            if target.exists():
                with contextlib.suppress(BundleError):
                    check_files(target, read_manifest(target))
                    return manifest.version
                shutil.rmtree(target)  # half of an installation, or damaged since
            try:
                shutil.copytree(source, scratch, symlinks=True)
                check_files(scratch, read_manifest(scratch))
                scratch.rename(target)
            except OSError as error:
                raise BundleError(f"{target}: cannot install ({error}); check the disk's space") from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return manifest.version

    def current(self) -> str | None:
        """Version that serves; None before the first promotion. Raises BundleError: the pointer is damaged."""
        versions = self._pointer()
        return versions[-1] if versions else None

    def earlier(self) -> list[str]:
        """Versions that became current before the one that is, and were not gone back from; oldest first."""
        return self.versions()[:-1]

    def versions(self) -> list[str]:
        """These and the current one."""
        return self._pointer()

    def promote(self, version: str, token: int | None = None) -> None:
        """Make an installed bundle the current one. Nothing happens if it is.

        Args:
            version: of the bundle.
            token: of the lease of who does it (`fence`); None: a person, who always may.

        Raises:
            BundleError: it is not installed, or not whole.
            LeaseLost: somebody with a newer lease has been here.
        """
        check_files(self.path(version), read_manifest(self.path(version)))
        with self.locked():
            self._require_newest(token)
            versions = self._pointer()
            if versions[-1:] != [version]:
                self._move([*versions, version], "promote")

    def rollback(self, version: str | None = None, *, only_from: str | None = None) -> str | None:
        """Go back, to the bundle before the current one or to an earlier one. Returns the version that serves now.

        Args:
            version: an earlier one, or NOTHING. Default: the one before.
            only_from: the one that is to go, for who knows no more than that it is bad.

        Raises:
            BundleError: there is none before, it never was current, or it is not whole; or another one than `only_from`
                is current by now.
        """
        with self.locked():
            versions = self._pointer()
            if only_from is not None and versions[-1:] != [only_from]:
                raise BundleError(f"{self.folder}: {only_from} is not current any more; nothing was moved")
            earlier = versions[:-1]
            if version == NOTHING and versions:
                self._move([], "rollback")
                return None
            if version in (None, NOTHING) and not earlier:
                raise BundleError(
                    f"{self.folder}: no bundle was current before {self.current() or 'the first'}"
                    + (f"; `rollback ... {NOTHING}` leaves everything to the teacher" if versions else "")
                )
            to = earlier[-1] if version is None else version
            if to not in earlier:
                known = ", ".join(dict.fromkeys(reversed(earlier))) or "none"
                raise BundleError(
                    f"{self.folder}: {to} was not current before; there were: {known}. Promote it instead"
                )
            check_files(self.path(to), read_manifest(self.path(to)))
            self._move(earlier[: len(earlier) - earlier[::-1].index(to)], "rollback")
            return to

    def fence(self, token: int) -> None:
        """From now on nobody with an older lease may promote.

        Raises:
            LeaseLost: a newer one has been here.
        """
        with self.locked():
            self._require_newest(token)
            _replace(self.folder / "fence.json", {"token": token})

    def fenced(self) -> int:
        """The newest lease that was here; 0: none was. Raises BundleError: the file is damaged."""
        try:
            return int(json.loads(self._read("fence.json"))["token"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{self.folder}/fence.json: damaged ({error}); delete it while no flywheel runs"
            ) from error

    def _require_newest(self, token: int | None) -> None:
        if token is not None and token < (newest := self.fenced()):
            raise LeaseLost(
                f"{self.folder}: another run of the flywheel took over (lease {newest}, this one has {token}); "
                "nothing was promoted"
            )

    def candidate(self) -> Candidate | None:
        """The bundle that is to be up beside the current one; None: no one."""
        try:
            return Candidate(**json.loads(self._read("candidate.json")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{self.folder}/candidate.json: damaged ({error}); delete it") from error

    def set_candidate(self, candidate: Candidate | None) -> None:
        """Have an installed bundle's student brought up beside the current one; None: let go of it.

        Raises:
            BundleError: it is not installed.
        """
        with self.locked():
            if candidate is None:
                (self.folder / "candidate.json").unlink(missing_ok=True)
            else:
                self.path(candidate.version)
                _replace(self.folder / "candidate.json", dataclasses.asdict(candidate))

    def prune(self, keep: int) -> list[str]:
        """Remove the oldest bundles beyond so many, never one that may be gone back to at once. Returns their versions.

        The current one, the one before it and the candidate stay in any case.
        """
        with self.locked():
            versions, candidate = self._pointer(), self.candidate()
            needed = {*versions[-2:], *([candidate.version] if candidate else [])}
            installed = [manifest.version for manifest in self.list()]
            gone = [version for version in installed if version not in needed][: max(0, len(installed) - keep)]
            for version in gone:
                shutil.rmtree(self.folder / version)
            return gone

    def history(self) -> list[dict[str, Any]]:
        """Every move: time, action, version, from. Oldest first.

        Raises:
            BundleError: a line is damaged. One that breaks off is passed over: the disk was full.
        """
        try:
            lines = self._read("history.jsonl").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{self.folder}/history.jsonl: damaged ({error}); put it back from a backup, or move it away: only the "
                "moves so far are in it"
            ) from error
        return [self._record(line, number) for number, line in enumerate(lines, start=1) if line.endswith("}")]

    def _record(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if not isinstance(record["time"], str) or record["action"] not in ("promote", "rollback"):
                raise ValueError("no time, or no action that there is")
            versions = {"version": record["version"], "from": record["from"]}
            if not all(v is None or (isinstance(v, str) and VERSION_PATTERN.fullmatch(v)) for v in versions.values()):
                raise ValueError("not the versions of bundles")
        except (ValueError, KeyError, TypeError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise BundleError(
                f"{self.folder}/history.jsonl:{number}: damaged ({why}); put this line right, or take it out"
            ) from error
        return record

    def _pointer(self) -> list[str]:
        """Versions as they became current; the last one is."""
        try:
            versions = json.loads(self._read("current.json"))["versions"]
            if not isinstance(versions, list) or not all(
                isinstance(v, str) and VERSION_PATTERN.fullmatch(v) for v in versions
            ):
                raise ValueError("not a list of versions")
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{self.folder}/current.json: damaged ({error}); {self._way_back()}") from error
        return versions

    def _way_back(self) -> str:
        """What to do about a damaged pointer.

        A person does it, no router: a move is noted before it is made, so it cannot be told whether the last one was.
        """
        try:
            history = self.history()
        except BundleError:
            history = []
        before: list[str] = []
        versions: list[str] = []
        for move in history:
            was = [move["from"]] if move["from"] is not None else []
            if versions[-1:] != was:  # the move before this one was noted and not made, or the history has a gap
                versions = before if before[-1:] == was else was
            before, versions = versions, _after(move, versions)
        if not versions:
            return (
                "put it back from a backup; without one, delete it and promote a bundle again: what earlier ones were "
                "trained on then counts as new"
            )
        last = history[-1]
        return (
            f"put it back from a backup, or write {json.dumps({'versions': versions})} into it: to that the moves in "
            f"history.jsonl come (the last one: {last['time']}, {last['action']} from {last['from'] or NOTHING} to "
            f"{last['version'] or NOTHING})"
        )

    def _read(self, name: str) -> str:
        """A file of this folder. Raises BundleError: this is none; OSError, ValueError: it cannot be read."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except NotADirectoryError as error:
            raise BundleError(f"{self.folder}: a file where the folder of the bundles belongs; move it away") from error

    def _move(self, versions: list[str], action: str) -> None:
        """History first: a move that was noted and not made does no harm, one that nobody knows of does."""
        to = versions[-1] if versions else None
        record = {"time": utc_now(), "action": action, "version": to, "from": self.current()}
        path = self.folder / "history.jsonl"
        is_torn = path.exists() and not path.read_bytes().endswith(b"\n")  # the disk was full
        _write(path, ("\n" if is_torn else "") + json.dumps(record) + "\n", os.O_APPEND)
        pointer = {"version": record["version"], "versions": versions, "since": record["time"]}
        _replace(self.folder / "current.json", pointer)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the pointer still: one writer at a time. The kernel lets go when the process ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise BundleError(f"{self.folder}: a file where the folder of the bundles belongs; move it away") from error
        except OSError as error:
            raise BundleError(f"{self.folder}: cannot use this folder ({error}); give one you may write to") from error
        try:
            with open(self.folder / ".lock", "a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise BundleError(f"{self.folder}: cannot use this folder ({error}); give one you may write to") from error


def _after(move: dict[str, Any], versions: list[str]) -> list[str]:
    """What was current after a move, and before that; oldest first."""
    to = move["version"]
    if to is None:
        return []
    if move["action"] == "promote":
        return [*versions, to]
    earlier = versions[:-1]
    return earlier[: len(earlier) - earlier[::-1].index(to)] if to in earlier else [to]


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Change a small file in one move."""
    scratch = path.parent / f".tmp-{secrets.token_hex(6)}-{path.name}"
    _write(scratch, json.dumps(content) + "\n", 0)
    os.replace(scratch, path)


def _write(path: Path, text: str, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
