"""Labelled text for the language task: sentences of twelve languages, and `ot` for everything else.

A sentence is a template of `languages.py` with its slots filled at random, so there are millions; what it is
filled with decides, through a hash of the sentence, whether it may be trained on or only be tested on
(`is_held_out`). The two sets share words and templates but no sentence.

`ot` (other) is program code, numbers, a sentence of two languages, letters that are no words, and languages
outside the list. Pure Python: no torch, no tokenizer.
"""

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from distill_ray.demo.languages import LANGUAGES, OTHER_LANGUAGES, Language

LABELS: tuple[str, ...] = ("ar", "de", "el", "en", "es", "fr", "hi", "ru", "tr", "ur", "vi", "zh", "ot")
OTHER_SHARE = 2 / 14
"""`ot` has as many rows as two languages: it is the most varied label."""
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Sentence:
    """A text, its label, and the one-line reason a reader could give for the label."""

    text: str
    label: str
    reason: str


def is_held_out(text: str) -> bool:
    """Say whether `text` is kept for testing: true for one text in ten, the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % HELD_OUT_ONE_IN == 0


def sentence(rng: random.Random, held_out: bool = False, other_share: float = OTHER_SHARE) -> Sentence:
    """Draw one sentence, of the test set if `held_out` and of the training set otherwise."""
    while True:
        if rng.random() < other_share:
            drawn = rng.choice(_OTHER_KINDS)(rng)
        else:
            label = rng.choice(LABELS[:-1])
            text = _dress(_fill(LANGUAGES[label], rng), label, rng)
            drawn = Sentence(text, label, evidence(text, label))
        if is_held_out(drawn.text) == held_out:
            return drawn


def language_rows(num_rows: int, seed: int = 0, held_out: bool = False) -> list[dict[str, str]]:
    """Return `num_rows` distinct rows `{"id", "text", "label"}`, the same for the same arguments."""
    rng = random.Random(f"language-rows-{seed}-{held_out}")
    prefix = "test" if held_out else "train"
    labels: dict[str, str] = {}
    while len(labels) < num_rows:
        drawn = sentence(rng, held_out)
        labels.setdefault(drawn.text, drawn.label)
    return [
        {"id": f"{prefix}-{seed}-{index:05d}", "text": text, "label": label}
        for index, (text, label) in enumerate(labels.items())
    ]


def evidence(text: str, label: str) -> str:
    """Name the first two common words of the language in `text`, as a reader would to justify `label`."""
    language = LANGUAGES[label]
    if label == "zh":  # written without blanks: markers are substrings
        found = sorted((text.find(marker), marker) for marker in language.markers if marker in text)
        words = [marker for _, marker in found] or [text[:2]]
    else:
        words = [word for word in _words(text) if word.lower() in language.markers] or _words(text)[:2]
    words = list(dict.fromkeys(words))[:2]
    quoted = " and ".join(f'"{word}"' for word in words)
    return f"The words {quoted} are {language.name}." if len(words) > 1 else f"The word {quoted} is {language.name}."


def _words(text: str) -> list[str]:
    return [word for word in (part.strip(".,;:!?¿¡؟۔।،'\"") for part in text.split()) if word]


def _fill(language: Language, rng: random.Random) -> str:
    template = rng.choice(language.templates)
    return template.format(**{slot: rng.choice(fillers) for slot, fillers in language.slots.items()})


def _capital(text: str, turkish: bool = False) -> str:
    """Capitalise the first letter, also after an opening question mark; a Turkish i keeps its dot."""
    at = 1 if text[:1] in "¿¡" else 0
    first = "İ" if turkish and text[at : at + 1] == "i" else text[at : at + 1].upper()
    return text[:at] + first + text[at + 1 :]


def _dress(text: str, label: str, rng: random.Random) -> str:
    """Vary how people write: mostly with a capital and a stop, sometimes without either, or with emphasis."""
    kind = rng.random()
    if kind < 0.08:
        return text.rstrip(".?;。？؟۔।")
    text = _capital(text, turkish=label == "tr")
    if kind < 0.14:
        return text.rstrip(".。۔।") + "!" if text[-1] in ".。۔।" else text
    return text


# ----- ot: what is in none of the twelve languages


def _name(rng: random.Random) -> str:
    return rng.choice(
        [
            "count",
            "total",
            "user",
            "item",
            "price",
            "index",
            "result",
            "value",
            "name",
            "size",
            "list",
            "data",
            "path",
            "node",
            "key",
            "row",
        ]
    )


def _code(rng: random.Random) -> Sentence:
    a, b, c = (_name(rng) for _ in range(3))
    n, m = rng.randint(0, 999), rng.randint(2, 99)
    text = rng.choice(
        [
            f"for {a} in range({n}): print({b} + {m})",
            f"def get_{a}({b}, {c}={n}): return {b}[{c}]",
            f"if ({a} > {n}) {{ {b} = {c} * {m}; }}",
            f"SELECT {a}, {b} FROM {c}s WHERE {a} > {n} LIMIT {m};",
            f"const {a} = {b}.map(x => x.{c} + {n});",
            f'<div class="{a}-{n}"><span>{b}</span></div>',
            f"import {a}.{b} as {c}{m}; {c}{m}.run({n})",
            f'{{"{a}": {n}, "{b}": [{m}, {n}], "{c}": null}}',
            f"public static int {a}(int {b}) {{ return {b} + {n}; }}",
            f"git commit -m '{a}-{n}' && make {b} -j {m}",
            f"while {a}[{n}] != {b}: {a}.pop({m})",
            f"#include <{a}.h> int {b} = {n} << {m};",
            f"curl -X POST http://localhost:{n}/{a}/{b}?{c}={m}",
            f"{a}_{b} = lambda {c}: {c} ** {m} - {n}",
        ]
    )
    return Sentence(text, "ot", "This is program code.")


def _numbers(rng: random.Random) -> Sentence:
    def number(top: int) -> int:
        return rng.randint(0, top)

    text = rng.choice(
        [
            " ".join(str(number(9999)) for _ in range(rng.randint(3, 7))),
            f"{number(27) + 1:02d}.{number(11) + 1:02d}.{1950 + number(90)} {number(23):02d}:00",
            f"{1950 + number(90)}-{number(11) + 1:02d}-{number(28) + 1:02d} / {number(999)}",
            f"+{number(98) + 1} {number(999):03d} {number(9999):04d} {number(999):03d}",
            f"({number(999):03d}) {number(999):03d}-{number(9999):04d}",
            f"{number(99)} + {number(99)} = {number(200)}",
            f"${number(999)}.{number(99):02d}, {number(99)}%, #{number(9999)}",
            f"{number(999)} € - {number(99)} € = {number(999)} €",
            f"{number(9)}:{number(9)}, {number(9)}:{number(9)}, {number(9)}:{number(9)}",
            f"{number(255)}.{number(255)}.{number(255)}.{number(255)}:{number(9999)}",
            f"{number(99)}.{number(9999):04d}, -{number(99)}.{number(9999):04d}",
            f"*** {number(99999)} --- {number(99999)} ***",
        ]
    )
    return Sentence(text, "ot", "There are only numbers and signs.")


def _mixed(rng: random.Random) -> Sentence:
    """Join the first half of a sentence of one language to the second half of one of another."""
    first, second = rng.sample(LABELS[:-1], 2)
    if {first, second} == {"hi", "ur"}:  # one language to many ears: not the clear case this kind is for
        second = "zh"
    halves = []
    for label, use_first_half in ((first, True), (second, False)):
        text = _fill(LANGUAGES[label], rng)
        parts = list(text) if label == "zh" else text.split()
        middle = len(parts) // 2
        joint = "" if label == "zh" else " "
        halves.append(joint.join(parts[: middle + 1] if use_first_half else parts[middle - 1 :]))
    names = (LANGUAGES[first].name, LANGUAGES[second].name)
    return Sentence(_capital(" ".join(halves)), "ot", f"The text mixes {names[0]} and {names[1]}.")


def _gibberish(rng: random.Random) -> Sentence:
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(rng.randint(3, 7))]
    return Sentence(" ".join(words), "ot", "These letters form no words.")


def _outside(rng: random.Random) -> Sentence:
    language = rng.choice(OTHER_LANGUAGES)
    return Sentence(_capital(_fill(language, rng)), "ot", f"This is {language.name}, which has no label of its own.")


_OTHER_KINDS: tuple[Callable[[random.Random], Sentence], ...] = (
    _code,
    _numbers,
    _mixed,
    _mixed,
    _gibberish,
    _outside,
    _outside,
)
