"""The bundles of a service: installed side by side, one of them current.

    VERSION/        an installed bundle, never changed
    current.json    which one serves, and which ones did before it: promoting and going back are one move of this file
    history.jsonl   every move, with its time; only ever appended to

Routers read `current.json` and load what it names; nobody writes into an installed bundle.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_ray.errors import BundleError
from distill_ray.serving.routing.bundle import VERSION_PATTERN, Bundle, check_files, load_bundle, read_manifest, utc_now
from distill_ray.serving.routing.manifest import Manifest


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
        with self._locked():
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

    def promote(self, version: str) -> None:
        """Make an installed bundle the current one. Nothing happens if it is.

        Raises:
            BundleError: it is not installed, or not whole.
        """
        check_files(self.path(version), read_manifest(self.path(version)))
        with self._locked():
            versions = self._pointer()
            if versions[-1:] != [version]:
                self._move([*versions, version], "promote")

    def rollback(self, version: str | None = None) -> str:
        """Go back, to the bundle before the current one or to an earlier one. Returns the version that serves now.

        Raises:
            BundleError: there is none before, it never was current, or it is not whole.
        """
        with self._locked():
            versions = self._pointer()
            earlier = versions[:-1]
            if version is None and not earlier:
                raise BundleError(f"{self.folder}: no bundle was current before {self.current() or 'the first'}")
            to = earlier[-1] if version is None else version
            if to not in earlier:
                known = ", ".join(dict.fromkeys(reversed(earlier))) or "none"
                raise BundleError(
                    f"{self.folder}: {to} was not current before; there were: {known}. Promote it instead"
                )
            check_files(self.path(to), read_manifest(self.path(to)))
            self._move(earlier[: len(earlier) - earlier[::-1].index(to)], "rollback")
            return to

    def history(self) -> list[dict[str, Any]]:
        """Every move: time, action, version, from. Oldest first."""
        path = self.folder / "history.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]

    def _pointer(self) -> list[str]:
        """Versions as they became current; the last one is."""
        try:
            versions = json.loads((self.folder / "current.json").read_text(encoding="utf-8"))["versions"]
            if not all(isinstance(v, str) and VERSION_PATTERN.fullmatch(v) for v in versions):
                raise ValueError("not a list of versions")
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{self.folder}/current.json: damaged ({error}); delete it and promote a bundle again"
            ) from error
        return versions

    def _move(self, versions: list[str], action: str) -> None:
        """History first: a move that was noted and not made does no harm, one that nobody knows of does."""
        record = {"time": utc_now(), "action": action, "version": versions[-1], "from": self.current()}
        _write(self.folder / "history.jsonl", json.dumps(record) + "\n", os.O_APPEND)
        scratch = self.folder / f".tmp-{secrets.token_hex(6)}-current.json"
        _write(scratch, json.dumps({"version": versions[-1], "versions": versions, "since": record["time"]}) + "\n", 0)
        os.replace(scratch, self.folder / "current.json")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; the kernel lets go when the process ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".lock", "a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise BundleError(f"{self.folder}: cannot use this folder ({error}); give one you may write to") from error


def _write(path: Path, text: str, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
