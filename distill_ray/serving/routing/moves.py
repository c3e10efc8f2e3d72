"""Which bundle serves, as a log: one small file for each move, never changed and never removed. The last one counts.

    URL/moves/00000000000000000042.json     what was done, and all that is so since

A move is made from the one before it, as the file of the next number, which only one can make (`numbered.py`). Who was
not the fastest begins again with what is so by then. So no move is lost, nobody waits for a lock, and it is the same in
a folder and in a bucket.

Numbers have no gap: who has seen one asks for the next, one request, and never lists.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from distill_ray.errors import BundleError, DistillError, first_line
from distill_ray.object_store import ObjectStoreError, reach
from distill_ray.serving.numbered import NumberedFiles
from distill_ray.serving.routing.bundle import VERSION_PATTERN, utc_now

Version = Annotated[str, StringConstraints(pattern=f"^{VERSION_PATTERN.pattern}$")]
Action = Literal["promote", "rollback", "candidate", "fence"]
OF_THE_POINTER: frozenset[Action] = frozenset({"promote", "rollback"})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bundle that is up and does not serve."""

    version: Version
    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the requests that it would get, which it answers in the shadow."""

    max_tokens: Annotated[int, Field(ge=0)] = 0
    """Teacher tokens that may be spent on that."""


@dataclass(frozen=True, slots=True)
class State:
    """What is so after a move."""

    versions: tuple[Version, ...] = ()
    """As they became current, without those that were gone back from. The last one is current."""

    candidate: Candidate | None = None
    """The bundle that is to be up beside the current one, and the share of the traffic that it is tried on."""

    fence: Annotated[int, Field(ge=0)] = 0
    """The newest lease of a flywheel that was here: an older one may not promote."""

    pointer_moved: Annotated[int, Field(ge=0)] = 0
    """Number of the last move that was a promotion or a rollback; 0: there was none."""

    @property
    def current(self) -> str | None:
        """The version that serves; None: the teacher answers everything."""
        return self.versions[-1] if self.versions else None


@dataclass(frozen=True, slots=True)
class Move:
    """One file."""

    number: int
    id: str
    """That no other move has."""

    time: str
    """UTC, ISO 8601."""

    action: Action
    version: Version | None
    """What is current since; of a candidate, which one it is."""

    before: Version | None
    """What was."""

    state: State


_MOVE = TypeAdapter(Move)  # to JSON and back; what another version wrote beside it is passed over
_NONE = Move(0, "", "", "rollback", None, None, State())


class Moves:
    """The log of a service's bundles. Cheap to construct; any number of threads and processes may use it at once.

    Args:
        url: of the bundles, local or in a bucket.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._files = NumberedFiles(f"{url}/moves")
        self._seen: Move | None = None  # the newest one; of two threads either may note its own, both look further

    def state(self) -> State:
        """What is so now. One small request, but for the first time.

        Raises:
            BundleError: a move is damaged, or the place cannot be read.
        """
        with reaching(self._url):
            return self._last().state

    def change(self, action: Action, after: Callable[[State], State]) -> State:
        """Make a move; nothing is written where it changes nothing. Returns what is so then.

        Args:
            action: what is done.
            after: what is so now -> what is to be so. Called again where somebody else moved meanwhile.

        Raises:
            BundleError: as `state`; and what `after` raises.
        """
        with reaching(self._url):
            last = self._last()
            while (state := after(last.state)) != last.state:
                move = _next(last, action, state)
                if self._files.make(move.number, _MOVE.dump_json(move, indent=1)):
                    return move.state
                if (last := self._last()).number < move.number:
                    raise BundleError(
                        f"{self._files.name(move.number)}: cannot be made, and is not there; remove what has its name"
                    )
            return last.state

    def pointer_moved(self) -> Move | None:
        """The last promotion or rollback; None: there was none. Raises as `state`."""
        with reaching(self._url):
            number = self._last().state.pointer_moved
            return self._read(number) if number else None

    def since(self, number: int) -> list[Move]:
        """All moves after one, oldest first. Raises BundleError: one is damaged."""
        with reaching(self._url):
            numbers = list(range(number + 1, self._last().number + 1))
            try:
                contents = self._files.read_all(numbers)
            except FileNotFoundError as error:
                raise BundleError(
                    f"{self._url}/moves: a move between {number + 1} and {numbers[-1]} is missing; put it back from a "
                    "backup"
                ) from error
            return [self._parsed(*each) for each in zip(numbers, contents, strict=True)]

    def last_number(self) -> int:
        """Of all moves; 0: there was none. Raises as `state`."""
        with reaching(self._url):
            return self._last().number

    def _last(self) -> Move:
        seen = self._seen or self._first_look()
        while (following := self._read(seen.number + 1)) is not None:
            seen = following
        self._seen = seen
        return seen

    def _first_look(self) -> Move:
        numbers = self._files.numbers()
        found = self._read(numbers[-1]) if numbers else None
        if found is None and _exists(f"{self._url}/current.json"):
            raise BundleError(
                f"{self._url}: has a current.json and no moves/, so it is of an older distill-ray, which this one does "
                "not read; move the folder away, and promote its bundle from there: `distill-ray promote CONFIG "
                "FOLDER/VERSION`"
            )
        return found or _NONE

    def _read(self, number: int) -> Move | None:
        content = self._files.read(number)
        return self._parsed(number, content) if content is not None else None

    def _parsed(self, number: int, content: bytes) -> Move:
        try:
            move = _MOVE.validate_json(content)
            if move.number != number:
                raise ValueError(f"it says that it is number {move.number}")
        except ValueError as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise BundleError(
                f"{self._files.name(number)}: damaged ({why}), so nobody knows which bundle serves; put it back from a "
                "backup. Without one, end the service and the flywheel, delete this file and those after it, and start "
                "them again: then these moves are undone"
            ) from error
        return move


def _next(last: Move, action: Action, state: State) -> Move:
    number = last.number + 1
    version = before = None
    if action in OF_THE_POINTER:
        version, before = state.current, last.state.current
        state = State(state.versions, state.candidate, state.fence, number)
    elif action == "candidate":
        version, before = (
            each.version if each is not None else None for each in (state.candidate, last.state.candidate)
        )
    return Move(number, secrets.token_hex(8), utc_now(), action, version, before, state)


def _exists(url: str) -> bool:
    fs, path = reach(url)
    return fs.exists(path)


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Say what to do where the place of the bundles cannot be used. Raises BundleError."""
    try:
        yield
    except DistillError:
        raise
    except (NotADirectoryError, FileExistsError) as error:
        raise BundleError(f"{url}: a file where the folder of the bundles belongs; move it away") from error
    except ObjectStoreError as error:
        raise BundleError(f"serve.bundles: {url}: cannot use the bundles of the service: {error}") from error
    except Exception as error:  # a file system's OSError, another object store's client its own
        what = "the address and the credentials in the environment" if "://" in url else "its permissions and its space"
        raise BundleError(
            f"{url}: cannot use the bundles of the service ({first_line(error)}); check serve.bundles (without it: "
            f"serve.folder), {what}"
        ) from error
