"""Ways to ask for the language task: the shipped `instruction.md` and random paraphrases of it.

The demo model must follow an instruction rather than one trigger string, so it is trained on many wordings:
with and without examples, rules in any order, long and short, as a system message or in front of the text.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from distill_ray.demo.languages import LANGUAGES
from distill_ray.demo.sentences import LABELS, sentence

_SHIPPED = (Path(__file__).parent / "instruction.md").read_text(encoding="utf-8")

_OPENINGS = (
    "You are a language classifier. Decide in which language the text of the user is written.",
    "Classify the text that the user sends by its language.",
    "Your task is language identification: say which language the user's message is in.",
    "Determine the language of the following text.",
    "For every message of the user, name the language it is written in.",
    "You label texts by language. Do not answer the text and do not translate it.",
    "Read the text and tell its language. Only classify it.",
)
_RULES = (
    "Program code, markup and shell commands are ot.",
    "Numbers, dates, prices and telephone numbers are ot.",
    "A text that mixes two languages is ot.",
    "A language that is not on the list is ot.",
    "Letters that form no words are ot.",
    "Judge by the words of the text, not by its topic.",
    "Missing capitals or punctuation do not change the language.",
    "Arabic and Urdu share a script: look for words that only one of them has.",
    "Use ot for everything that fits no other label.",
    "Look for short common words such as articles and pronouns.",
    "Do not choose the nearest relative of a language.",
)
_FORMATS = (
    'Write one short line that names the evidence, then a new line with "Final Answer:" and the label.',
    "First give a short reason, then on a new line: Final Answer: LABEL",
    "Think about it in one line. End with a line of the form Final Answer: xx",
    'Name the words by which you know the language and finish with "Final Answer:" and one label.',
    "Reason briefly, and end with Final Answer: and the label, and nothing after it.",
)


def shipped_instruction() -> str:
    """Return the text of `instruction.md`, as the demo config uses it."""
    return _SHIPPED


def answer(reason: str, label: str) -> str:
    """Return the form of every answer to the language task; callers parse it with `Final Answer: (\\w+)`."""
    return f"{reason}\nFinal Answer: {label}"


def random_instruction(rng: random.Random) -> str:
    """Draw a paraphrase, from two sentences to a page."""
    kind = rng.random()
    if kind < 0.3:
        labels = "The labels are " + rng.choice([" ", ", "]).join(_shuffled(LABELS, rng)) + "."
        return " ".join([rng.choice(_OPENINGS), labels, rng.choice(_FORMATS)])
    if kind < 0.45:  # the shipped text with its rules in another order, or with some left out
        lines = _SHIPPED.split("\n")
        at = [index for index, line in enumerate(lines) if line[:1].isdigit()]
        rules = [line[3:] for line in _shuffled([lines[index] for index in at], rng)][: rng.randint(3, len(at))]
        numbered = [f"{number}. {rule}" for number, rule in enumerate(rules, 1)]
        return "\n".join(lines[: at[0]] + numbered + lines[at[-1] + 1 :])
    names = [f"{label}: {LANGUAGES[label].name if label != 'ot' else 'other'}" for label in _shuffled(LABELS, rng)]
    listed = "\n".join(f"- {name}" for name in names) if rng.random() < 0.5 else ", ".join(names)
    rules = _shuffled(_RULES, rng)[: rng.randint(0, 6)]
    ruled = "\n".join(f"{number}. {rule}" for number, rule in enumerate(rules, 1))
    parts = [rng.choice(_OPENINGS), "Labels:\n" + listed, ruled, rng.choice(_FORMATS)]
    if rng.random() < 0.4:
        shots = [sentence(rng) for _ in range(rng.randint(1, 3))]
        parts += ["Examples:"] + [f"{shot.text}\n{answer(shot.reason, shot.label)}" for shot in shots]
    return "\n\n".join(part for part in parts if part)


def in_front_of(text: str, instruction: str, rng: random.Random) -> str:
    """Put an instruction into the user's own message, before the text it is about."""
    return instruction + rng.choice(["\n\n", "\n\nText: ", "\n\nText:\n", "\n"]) + text


def _shuffled(items: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample(list(items), len(items))
