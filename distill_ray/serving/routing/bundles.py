"""The bundles of a service: installed side by side, one of them current. In a folder or in a bucket.

    VERSION/    an installed bundle, never changed (`installed.py`)
    moves/      which one serves, which ones did before it, which one is tried, and who may promote (`moves.py`)

Routers ask for the newest move every second and load what it names. Several processes may use it at once, on any
machines: all that changes is the next move.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from distill_ray.config import RunConfig
from distill_ray.errors import BundleError, LeaseLost
from distill_ray.serving.routing.bundle import VERSION_PATTERN, Bundle, check_files, load_bundle, read_manifest
from distill_ray.serving.routing.installed import installed_in
from distill_ray.serving.routing.manifest import Manifest
from distill_ray.serving.routing.moves import OF_THE_POINTER, Candidate, Move, Moves, State

NOTHING = "none"  # to go back to: the teacher answers everything


def bundles_of(config: RunConfig, folder: str | Path) -> Bundles:
    """The bundles of a service.

    Args:
        config: the whole YAML.
        folder: the service's.

    Raises:
        BundleError: `serve.bundles` is no place that is known here.
    """
    return Bundles(config.serve.bundles or Path(folder) / "bundles")


class Bundles:
    """Cheap to construct; any number of threads and processes may use it at once.

    What only reads may raise BundleError too: a move is damaged, or the place cannot be reached.

    Args:
        url: a folder (of several nodes: one that all of them see), or one in a bucket.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        self._installed = installed_in(self.url)
        self._moves = Moves(self.url)

    # -- what is installed -------------------------------------------------------------------------------------------

    def list(self) -> list[Manifest]:
        """The installed bundles, oldest first; damaged ones are left out."""
        found: list[Manifest] = []
        for version in self._installed.versions():
            with contextlib.suppress(BundleError):
                found.append(self._installed.manifest(version))
        return sorted(found, key=lambda manifest: (manifest.created, manifest.version))

    def manifest(self, version: str) -> Manifest:
        """What a bundle says of itself. Raises BundleError: there is none of this version, or a damaged one."""
        self._require_installed(version)
        return self._installed.manifest(version)

    def path(self, version: str, *, with_student: bool = True) -> Path:
        """Folder of an installed bundle on this node. From a bucket it is copied once per node, which may take a while.

        Args:
            version: of the bundle.
            with_student: False where nobody runs the student: a copy has no weights then.

        Raises:
            BundleError: there is none of this version, or it is damaged; or there is no room for a copy.
        """
        self._require_installed(version)
        return self._installed.path(version, with_student=with_student)

    def place(self, version: str) -> str:
        """Where any node finds an installed bundle: a folder that all see, or the URL of one in a bucket."""
        return f"{self.url}/{version}"

    def load(self, version: str, embedder_identity: str | None, *, with_student: bool = True) -> Bundle:
        """Read an installed bundle. See `load_bundle`."""
        folder = self.path(version, with_student=with_student)
        return load_bundle(folder, embedder_identity, with_student=with_student)

    def install(self, source: str | Path) -> str:
        """Copy a bundle here, checked before and after. Returns its version; one that is here already is kept.

        Raises:
            BundleError: the source is not whole, or there is no room.
        """
        manifest = read_manifest(Path(source))
        check_files(Path(source), manifest)
        self._installed.install(Path(source), manifest)
        return manifest.version

    def prune(self, keep: int) -> list[str]:
        """Remove the oldest bundles beyond so many, never one that may be gone back to at once. Returns their versions.

        The current one, the one before it and the candidate stay in any case.
        """
        installed, needed = [manifest.version for manifest in self.list()], _needed(self.state())
        gone = [version for version in installed if version not in needed][: max(0, len(installed) - keep)]
        return [v for v in gone if self._installed.remove(v, lambda v=v: v in _needed(self.state()))]

    def _require_installed(self, version: str) -> None:
        if not VERSION_PATTERN.fullmatch(version) or not self._installed.exists(version):
            known = ", ".join(manifest.version for manifest in self.list()) or "none"
            raise BundleError(f"{self.url}: no bundle {version!r} is installed; there are: {known}")

    # -- which one serves --------------------------------------------------------------------------------------------

    def state(self) -> State:
        """All that the moves so far came to. One small request, for who asks every second."""
        return self._moves.state()

    def current(self) -> str | None:
        """Version that serves; None before the first promotion."""
        return self.state().current

    def versions(self) -> list[str]:
        """As they became current, without those that were gone back from; the last one is current."""
        return [*self.state().versions]

    def promote(self, version: str, token: int | None = None) -> None:
        """Make an installed bundle the current one. Nothing happens if it is.

        Args:
            version: of the bundle.
            token: of the lease of who does it (`fence`); None: a person, who always may.

        Raises:
            BundleError: it is not installed, or not whole.
            LeaseLost: somebody with a newer lease has been here.
        """
        self._require_whole(version)

        def promoted(state: State) -> State:
            self._require_newest(state, token)
            return (
                state if state.current == version else dataclasses.replace(state, versions=(*state.versions, version))
            )

        self._moves.change("promote", promoted)
        self._require_still_there(version)

    def rollback(self, version: str | None = None, *, only_from: str | None = None) -> str | None:
        """Go back, to the bundle before the current one or to an earlier one. Returns the version that serves now.

        Args:
            version: an earlier one, or NOTHING. Default: the one before.
            only_from: the one that is to go, for who knows no more than that it is bad.

        Raises:
            BundleError: there is none before, it never was current, or it is not whole; or another one than `only_from`
                is current by now.
        """

        def gone_back(state: State) -> State:
            if only_from is not None and state.current != only_from:
                raise BundleError(f"{self.url}: {only_from} is not current any more; nothing was moved")
            versions = self._earlier(state, version)
            if versions:
                self._require_whole(versions[-1])
            return dataclasses.replace(state, versions=versions)

        now = self._moves.change("rollback", gone_back).current
        if now is not None:
            self._require_still_there(now)
        return now

    def _earlier(self, state: State, to: str | None) -> tuple[str, ...]:
        """What `versions` are when that one, or the one before, or NOTHING is gone back to."""
        earlier = state.versions[:-1]
        if to == NOTHING and state.versions:
            return ()
        if to in (None, NOTHING) and not earlier:
            raise BundleError(
                f"{self.url}: no bundle was current before {state.current or 'the first'}"
                + (f"; `rollback ... {NOTHING}` leaves everything to the teacher" if state.versions else "")
            )
        if to is None:
            return earlier
        if to not in earlier:
            known = ", ".join(dict.fromkeys(reversed(earlier))) or "none"
            raise BundleError(f"{self.url}: {to} was not current before; there were: {known}. Promote it instead")
        return earlier[: len(earlier) - earlier[::-1].index(to)]

    def _require_whole(self, version: str) -> None:
        self._require_installed(version)
        self._installed.check(version)

    def _require_still_there(self, version: str) -> None:
        """Who removes a bundle looks for moves afterwards, and who moves looks for the bundle: one of both sees it."""
        if self._installed.exists(version):
            return

        def taken_back(state: State) -> State:
            is_last = state.current == version
            return dataclasses.replace(state, versions=state.versions[:-1]) if is_last else state

        self._moves.change("rollback", taken_back)
        raise BundleError(f"{self.url}: {version} was removed while it was made the current one; install it again")

    # -- who may promote, and what is tried --------------------------------------------------------------------------

    def fence(self, token: int) -> None:
        """From now on nobody with an older lease may promote.

        Raises:
            LeaseLost: a newer one has been here.
        """

        def fenced(state: State) -> State:
            self._require_newest(state, token)
            return dataclasses.replace(state, fence=token)

        self._moves.change("fence", fenced)

    def fenced(self) -> int:
        """The newest lease that was here; 0: none was."""
        return self.state().fence

    def _require_newest(self, state: State, token: int | None) -> None:
        if token is not None and token < state.fence:
            raise LeaseLost(
                f"{self.url}: another run of the flywheel took over (lease {state.fence}, this one has {token}); "
                "nothing was promoted"
            )

    def candidate(self) -> Candidate | None:
        """The bundle that is to be up beside the current one; None: no one."""
        return self.state().candidate

    def set_candidate(self, candidate: Candidate | None) -> None:
        """Have an installed bundle's student brought up beside the current one; None: let go of it.

        Raises:
            BundleError: it is not installed.
        """
        if candidate is not None:
            self._require_installed(candidate.version)
        self._moves.change("candidate", lambda state: dataclasses.replace(state, candidate=candidate))

    # -- what was done -----------------------------------------------------------------------------------------------

    def history(self, after: int = 0) -> list[Move]:
        """Every promotion and rollback after a move (`num_moves`), oldest first. Reads all moves since then."""
        return [move for move in self._moves.since(after) if move.action in OF_THE_POINTER]

    def last_in_history(self) -> Move | None:
        """The last promotion or rollback; None: there was none."""
        return self._moves.pointer_moved()

    def num_moves(self) -> int:
        """So far, of all kinds."""
        return self._moves.last_number()


def _needed(state: State) -> set[str]:
    return {*state.versions[-2:], *([state.candidate.version] if state.candidate is not None else [])}
