"""What two requests of similar words may differ in: numbers, negation and polarity, names.

    text -> marks_of -> Marks;  mismatch(marks, marks) -> {"numbers", "negation", "names"}

Embeddings see "enable" and "disable", 30 and 300, Alice and Bob as nearly the same (GPTCache issue 694 measures
0.83 to 0.9997 for opposites on nine encoders). These cheap signs do not. They err to the careful side: what is
ambiguous differs, and the request goes to the teacher. No model, some 0.1 ms for a sentence.

Numbers and identifiers are read in every script. Negation and polarity need words: `lexicon.py` has them for some
languages. Names are what is capitalised, quoted or spelt like an identifier, so scripts without capitals have fewer,
and in German every noun is one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import regex

from distill_ray.serving.routing.lexicon import (
    AXES,
    AXIS_STEMS,
    NEGATIONS,
    NEGATIVE_PREFIXES,
    NUMBER_WORDS,
    STARTERS,
    UNSPACED_AXES,
    UNSPACED_NEGATION,
)

Mismatch = Literal["numbers", "negation", "names"]

MOST_ADDED = 3  # words, and a quarter of what they are added to
MIN_STEM = 3  # characters that a word has at least behind a negative prefix

_NUMBER = re.compile(r"(?<!\w)[-+−]?\d[\d.,'’\u00a0\u202f:/]*\d|(?<!\w)[-+−]?\d|\d+")
_THOUSANDS = re.compile(r"(?<=\d)[,'’\u00a0\u202f](?=\d{3}(?!\d))")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['’][\p{L}\p{M}]+)*")  # vowel signs of Indic scripts are marks
_CONTRACTED = re.compile(r"n['’]t$")
_ELIDED = re.compile(r"^n['’]")  # French: n'est
_QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|„([^“”\n]+)[“”]|«([^»\n]+)»|「([^」\n]+)」|`([^`\n]+)`")
_CHUNK = re.compile(r"\S+")
_AROUND = "\"'“”«»„()[]{}<>,;:!?¡¿*…。、，！？" + "."


class Pole(NamedTuple):
    """A word that stands on one side of something: `enable` on the + side of `switch`."""

    axis: str
    side: str
    word: str


@dataclass(frozen=True, slots=True)
class Marks:
    """The signs of one text, in the order of the text: "from 3 to 5" is not "from 5 to 3"."""

    numbers: tuple[str, ...]
    names: tuple[str, ...]
    num_negations: int
    poles: tuple[Pole, ...]
    """Words that have an opposite."""

    words: frozenset[str]
    """In lower case: for `possible` beside `impossible`."""


def marks_of(text: str) -> Marks:
    """Read the signs of a text. Never fails, whatever the text is."""
    text = unicodedata.normalize("NFKC", text)
    words = _words(text)
    return Marks(
        numbers=_numbers(text),
        names=_names(text),
        num_negations=sum(word in NEGATIONS for word in words) + len(UNSPACED_NEGATION.findall(text)),
        poles=(*(pole for word in words for pole in _poles(word)), *_unspaced_poles(text)),
        words=frozenset(words),
    )


def mismatch(a: Marks, b: Marks) -> frozenset[Mismatch]:
    """In which signs two texts differ. Symmetric; empty for equal texts."""
    found: set[Mismatch] = set()
    if a.numbers != b.numbers:
        found.add("numbers")
    if a.names != b.names:
        found.add("names")
    if a.num_negations != b.num_negations or _opposed(a, b):
        found.add("negation")
    return frozenset(found)


def contains_and_adds(a: Marks, b: Marks) -> bool:
    """Whether `a` is `b` and something else: a request pasted beside another one is similar to it."""
    added = len(a.words - b.words)
    return not b.words - a.words and added > MOST_ADDED and 4 * added > len(b.words)


# -- numbers -----------------------------------------------------------------------------------------------------------


def _numbers(text: str) -> tuple[str, ...]:
    """Values in order, in ASCII digits: 1,000 is 1000, and two is 2. What is ambiguous (1.000) stays as it is."""
    found = [(m.start(), _plain_number(m.group())) for m in _NUMBER.finditer(text)]
    for match in _WORD.finditer(text):
        value = NUMBER_WORDS.get(match.group().casefold())
        if value is not None:
            found.append((match.start(), value))
    return tuple(value for _, value in sorted(found))


def _plain_number(text: str) -> str:
    digits = "".join(str(unicodedata.digit(c, c)) for c in text)
    return _THOUSANDS.sub("", digits).replace("−", "-").lstrip("+")


# -- negation and polarity ---------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """In lower case; "don't" is do + not, "cannot" too, French "n'est" is ne + est."""
    words: list[str] = []
    for match in _WORD.finditer(text):
        word = match.group().casefold()
        if _CONTRACTED.search(word):
            words += [word[:-3], "not"]
        elif _ELIDED.match(word):
            words += ["ne", word[2:]]
        elif word == "cannot":
            words += ["can", "not"]
        else:
            words.append(word)
    return words


@lru_cache(maxsize=1 << 14)
def _poles(word: str) -> tuple[Pole, ...]:
    """Where a word stands: as it is, else by its longest stem."""
    found = AXES.get(word)
    for length in range(len(word), MIN_STEM - 1, -1):
        if found:
            break
        found = AXIS_STEMS.get(word[:length])
    return tuple(Pole(axis, side, word) for axis, side in found or ())


def _unspaced_poles(text: str) -> list[Pole]:
    if text.isascii():
        return []
    return [Pole(axis, side, word) for pattern, axis, side in UNSPACED_AXES for word in pattern.findall(text)]


def _opposed(a: Marks, b: Marks) -> bool:
    """Whether a word of one text is turned round in the other, or the same words stand in another order."""
    count_a, count_b = Counter(a.poles), Counter(b.poles)
    only_a, only_b = count_a - count_b, count_b - count_a
    if any(one.axis == other.axis and one.side != other.side for one in only_a for other in only_b):
        return True
    if not only_a and not only_b and _order(a) != _order(b):
        return True
    words_a, words_b = a.words - b.words, b.words - a.words
    return _negates(words_a, words_b) or _negates(words_b, words_a)


def _order(marks: Marks) -> dict[str, str]:
    """Axis -> the sides in order; of axes with both sides: from open to closed."""
    sides: dict[str, str] = {}
    for pole in marks.poles:
        sides[pole.axis] = sides.get(pole.axis, "") + pole.side
    return {axis: order for axis, order in sides.items() if len(set(order)) > 1}


def _negates(words: frozenset[str], plain: frozenset[str]) -> bool:
    for word in words:
        for prefix in NEGATIVE_PREFIXES if word.startswith(NEGATIVE_PREFIXES) else ():
            rest = word[len(prefix) :]
            if len(rest) >= MIN_STEM and word.startswith(prefix) and rest in plain:
                return True
        if word.endswith("less") and (word[:-4] in plain or word[:-4] + "ful" in plain):
            return True
    return False


# -- names -------------------------------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    """Quoted text, identifiers and capitalised words, in order and in lower case.

    The first word of a sentence counts unless sentences often begin with it: "Berlin has" is one, "Where is" is none.
    """
    found: list[tuple[int, int, str]] = []
    for match in _QUOTED.finditer(text):
        found.append((match.start(), match.end(), next(g for g in match.groups() if g is not None).strip()))
    for match in _CHUNK.finditer(text):
        chunk = match.group().strip(_AROUND)
        if _is_identifier(chunk):
            found.append((match.start(), match.end(), chunk))
    is_shouted = text.upper() == text  # or a script without cases
    for match in _WORD.finditer(text) if not is_shouted else ():
        word = match.group()
        if word[0].isupper() and not (_begins_sentence(text, match.start()) and _is_starter(word)):
            if word in ("I", "I'm", "I'd", "I'll", "I've", "I’m", "I’d", "I’ll", "I’ve"):
                continue
            found.append((match.start(), match.end(), word))
    return tuple(name.casefold() for name in _outermost(found))


def _is_starter(word: str) -> bool:
    """Also with what English hangs on: Don't, What's."""
    return _CONTRACTED.search(word) is not None or re.split("['’]", word.casefold(), maxsplit=1)[0] in STARTERS


def _is_identifier(chunk: str) -> bool:
    """Paths, addresses, dotted and snake names, letters with digits, camelCase."""
    if chunk.isalpha():
        return not chunk.islower() and not chunk.isupper() and any(map(str.isupper, chunk[1:]))
    if not any(map(str.isalpha, chunk)):
        return False
    return any(c in "@/\\_." or c.isdigit() for c in chunk)


def _outermost(found: list[tuple[int, int, str]]) -> list[str]:
    """In order, without what lies inside another: the capital in a quotation is part of it."""
    names: list[str] = []
    end = -1
    for start, stop, name in sorted(found, key=lambda f: (f[0], -f[1])):
        if start >= end:
            names.append(name)
            end = stop
    return names


def _begins_sentence(text: str, position: int) -> bool:
    before = text[max(0, position - 8) : position].rstrip(" \t\"'“”«»„([¿¡")
    return not before or before[-1] in ".!?…:;。！？\n-*•"
