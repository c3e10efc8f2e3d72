"""Bundles side by side under one place, each in a folder of its own that nobody changes.

    URL/VERSION/...     in a folder: used where it is. In a bucket: copied to each node that needs it (`node_cache.py`)

What has no `bundle.json` does not exist: it comes last, and goes first.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from distill_ray.errors import BundleError
from distill_ray.node_cache import all_fetched, fetched, forget, is_fetched, not_copied
from distill_ray.object_store import reach
from distill_ray.serving.routing.bundle import (
    VERSION_PATTERN,
    check_files,
    check_names,
    is_of_student,
    parse_manifest,
    read_manifest,
)
from distill_ray.serving.routing.manifest import Manifest
from distill_ray.serving.routing.moves import reaching


class Installed(ABC):
    """The seam. Everything here may raise BundleError: the place cannot be used."""

    @abstractmethod
    def versions(self) -> list[str]:
        """Of all bundles that there are, and perhaps of some that do not exist any more."""

    @abstractmethod
    def manifest(self, version: str) -> Manifest:
        """Of one. Raises BundleError: there is none of this version, or it is damaged."""

    @abstractmethod
    def path(self, version: str, *, with_student: bool) -> Path:
        """Its folder on this node; without the student its weights need not be in it. Raises as `manifest`."""

    @abstractmethod
    def check(self, version: str) -> None:
        """Look whether it is whole, as far as that takes no copy of it. Raises BundleError: it is not."""

    @abstractmethod
    def install(self, source: Path, manifest: Manifest) -> None:
        """Bring one here that is whole; one that is here and whole is kept."""

    @abstractmethod
    def remove(self, version: str, is_needed: Callable[[], bool]) -> bool:
        """Remove one, unless it is needed: that is asked when nobody finds it any more. Returns whether it is gone."""

    @abstractmethod
    def exists(self, version: str) -> bool:
        """Whether there is one of this version."""


def installed_in(url: str) -> Installed:
    """Those under a place, local or in a bucket. Raises BundleError: it is none that is known here."""
    try:
        fs, path = reach(url)
    except (ImportError, ValueError) as error:
        raise BundleError(f"{url}: cannot use this place for bundles ({error}); check serve.bundles") from error
    return InFolder(Path(path)) if isinstance(fs, LocalFileSystem) else InBucket(url.rstrip("/"), fs, path.rstrip("/"))


class InFolder(Installed):
    """On a disk, this node's or one that all see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def versions(self) -> list[str]:
        """See `Installed`."""
        found = [path.parent.name for path in self._folder.glob("*/bundle.json")]
        return [name for name in found if VERSION_PATTERN.fullmatch(name)]

    def exists(self, version: str) -> bool:
        """See `Installed`."""
        return (self._folder / version / "bundle.json").is_file()

    def manifest(self, version: str) -> Manifest:
        """See `Installed`."""
        return read_manifest(self._folder / version)

    def path(self, version: str, *, with_student: bool) -> Path:
        """See `Installed`."""
        return self._folder / version

    def check(self, version: str) -> None:
        """See `Installed`. Every byte is read."""
        check_files(self._folder / version, self.manifest(version))

    def install(self, source: Path, manifest: Manifest) -> None:
        """See `Installed`."""
        target, name = self._folder / manifest.version, f"{secrets.token_hex(6)}-{manifest.version}"
        if self._is_whole(manifest.version):
            return
        scratch, old = self._folder / f".tmp-{name}", self._folder / f".old-{name}"
        with reaching(str(self._folder)):
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(source, scratch, symlinks=True)
            check_files(scratch, read_manifest(scratch))
            if target.exists():  # half of an installation, or damaged since
                target.rename(old)
            scratch.rename(target)
        except OSError as error:
            if not self._is_whole(manifest.version):  # nor has somebody else installed it meanwhile
                raise BundleError(f"{target}: cannot install ({error}); check the disk's space") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def remove(self, version: str, is_needed: Callable[[], bool]) -> bool:
        """See `Installed`."""
        there, away = self._folder / version / "bundle.json", self._folder / version / ".bundle.json"
        with reaching(str(self._folder)):
            there.rename(away)
            is_gone = False
            try:
                is_gone = not is_needed()
            finally:
                if not is_gone:
                    away.rename(there)
            if is_gone:
                shutil.rmtree(self._folder / version)
            return is_gone

    def _is_whole(self, version: str) -> bool:
        with contextlib.suppress(BundleError):
            self.check(version)
            return True
        return False


class InBucket(Installed):
    """On an object store. A node has a copy of what it uses, made once and held against its hashes then."""

    def __init__(self, url: str, fs: Any, base: str) -> None:
        self._url, self._fs, self._base = url, fs, base

    def versions(self) -> list[str]:
        """See `Installed`. One listing."""
        with reaching(self._url):
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                found = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._base, detail=False)]
                return [name for name in found if VERSION_PATTERN.fullmatch(name)]
        return []

    def exists(self, version: str) -> bool:
        """See `Installed`."""
        with reaching(self._url):
            self._fs.invalidate_cache()
            return self._fs.exists(f"{self._base}/{version}/bundle.json")

    def manifest(self, version: str) -> Manifest:
        """See `Installed`. One request."""
        place = f"{self._url}/{version}"
        with reaching(self._url), contextlib.suppress(FileNotFoundError):
            content = self._fs.cat_file(f"{self._base}/{version}/bundle.json")
            return parse_manifest(content, f"{place}/bundle.json")
        raise BundleError(f"{place}: no bundle here (no bundle.json); install it")

    def path(self, version: str, *, with_student: bool) -> Path:
        """See `Installed`."""
        manifest, place = self.manifest(version), f"{self._url}/{version}"
        mark = _mark(manifest, with_student=with_student)
        if not is_fetched(place, mark):
            self._drop_copies_of_the_gone()
        try:
            return fetched(
                place,
                mark,
                wanted=lambda file: with_student or not is_of_student(file),
                check=lambda folder: check_files(folder, read_manifest(folder), with_student=with_student, place=place),
            )
        except BundleError:
            raise
        except Exception as error:  # the disk's, or the store's client's own
            raise BundleError(not_copied(f"{place}:", error)) from error

    def check(self, version: str) -> None:
        """See `Installed`. Whether all files are there: going back must not wait for a copy, and each node that makes
        one reads every byte."""
        manifest = self.manifest(version)
        check_names(self._names(version), manifest, f"{self._url}/{version}")

    def install(self, source: Path, manifest: Manifest) -> None:
        """See `Installed`."""
        version, base = manifest.version, f"{self._base}/{manifest.version}"
        if self.exists(version) and self._is_whole(version):
            return
        with reaching(self._url):
            for file in set(self._names(version)) - {"bundle.json", *manifest.files}:
                self._fs.rm_file(f"{base}/{file}")
            files = sorted(manifest.files)
            self._fs.put([str(source / file) for file in files], [f"{base}/{file}" for file in files])
            self._fs.pipe_file(f"{base}/bundle.json", (source / "bundle.json").read_bytes())
        self.check(version)

    def remove(self, version: str, is_needed: Callable[[], bool]) -> bool:
        """See `Installed`."""
        base = f"{self._base}/{version}"
        manifest = self.manifest(version)
        with reaching(self._url):
            content = self._fs.cat_file(f"{base}/bundle.json")
            self._fs.rm_file(f"{base}/bundle.json")
            is_gone = False
            try:
                is_gone = not is_needed()
            finally:
                if not is_gone:
                    self._fs.pipe_file(f"{base}/bundle.json", content)
            if is_gone:
                self._fs.invalidate_cache()
                self._fs.rm(base, recursive=True)
                self._drop_copies(manifest)
            return is_gone

    def _names(self, version: str) -> list[str]:
        base = f"{self._base}/{version}/"
        with reaching(self._url):
            self._fs.invalidate_cache()
            return [path.removeprefix(base) for path in self._fs.find(base)]

    def _is_whole(self, version: str) -> bool:
        """Held against its hashes. A copy on this node that is damaged is made again."""
        for _ in range(2):
            with contextlib.suppress(BundleError):
                folder = self.path(version, with_student=True)
                check_files(folder, read_manifest(folder))
                return True
            with contextlib.suppress(BundleError):
                self._drop_copies(self.manifest(version))
        return False

    def _drop_copies_of_the_gone(self) -> None:
        """Those of this node whose bundle somebody removed, wherever he was: else they would fill its disk."""
        there = set(self.versions())
        for folder in all_fetched():
            version = folder.name.rpartition("-")[0]
            if VERSION_PATTERN.fullmatch(version) and version not in there:
                with contextlib.suppress(BundleError):  # then it is no copy of a bundle
                    self._drop_copies(read_manifest(folder))  # of one under this place; another's are called otherwise

    def _drop_copies(self, manifest: Manifest) -> None:
        """Those of this node."""
        for with_student in (True, False):
            forget(f"{self._url}/{manifest.version}", _mark(manifest, with_student=with_student))


def _mark(manifest: Manifest, *, with_student: bool) -> str:
    return f"{manifest.seal}{'' if with_student else ' without student'}"
