"""Arithmetic word problems for the step-by-step demo: a one-sentence rationale and an equation as the label.

The form of the label follows SVAMP, `( 7 + 5 )` or `( ( 7 + 5 ) - 3 )`: the model writes the equation and
need not compute it. Problems have one or two steps, small whole numbers, and divisions without remainder.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

INSTRUCTION = (
    "Solve the word problem. Explain in one sentence which numbers are combined and how, and end with"
    ' "The answer is" and the equation in parentheses, for example: The answer is ( 7 + 5 )'
)
_INSTRUCTIONS = (
    INSTRUCTION,
    "Answer the problem with one sentence of reasoning. End with: The answer is ( a + b )",
    "Explain the problem in one sentence and write the equation in parentheses after The answer is.",
    'Give a short rationale for the problem, then "The answer is" and the equation, such as ( 9 - 4 ).',
    "Solve the problem. Do not compute the result, only write the equation in parentheses.",
)

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Iris",
    "Jamal",
    "Kate",
    "Leo",
    "Mina",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Sami",
    "Tara",
    "Viktor",
]
_THINGS = [
    "apples",
    "books",
    "coins",
    "pencils",
    "marbles",
    "cards",
    "stickers",
    "eggs",
    "shells",
    "stamps",
    "cookies",
    "buttons",
    "tickets",
    "flowers",
]
_CONTAINERS = ["boxes", "bags", "baskets", "shelves", "jars", "rows"]


@dataclass(frozen=True)
class Problem:
    """A word problem, why its numbers are combined as they are, and the equation."""

    question: str
    rationale: str
    equation: str

    @property
    def answer(self) -> str:
        """The rationale and the equation, in the form every answer has."""
        return f"{self.rationale} The answer is {self.equation}"


def is_held_out(question: str) -> bool:
    """Say whether a problem is kept for testing: true for one in ten."""
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest()) % 10 == 0


def problem(rng: random.Random, held_out: bool = False) -> Problem:
    """Draw one problem, of the test set if `held_out` and of the training set otherwise."""
    while True:
        drawn = rng.choice(_KINDS)(rng)
        if is_held_out(drawn.question) == held_out:
            return drawn


def problem_rows(num_rows: int, seed: int = 0, held_out: bool = False) -> list[dict[str, str]]:
    """Return `num_rows` distinct rows `{"id", "question", "label"}`, the same for the same arguments."""
    rng = random.Random(f"problem-rows-{seed}-{held_out}")
    equations: dict[str, str] = {}
    while len(equations) < num_rows:
        drawn = problem(rng, held_out)
        equations.setdefault(drawn.question, drawn.equation)
    return [
        {"id": f"problem-{'held-out-' if held_out else ''}{seed}-{index:05d}", "question": question, "label": equation}
        for index, (question, equation) in enumerate(equations.items())
    ]


def problem_prompt(drawn: Problem, rng: random.Random) -> tuple[str, str]:
    """Return (system message or "", user message) that ask for a rationale: by instruction or by examples."""
    if rng.random() < 0.5:
        instruction = rng.choice(_INSTRUCTIONS)
        return (instruction, drawn.question) if rng.random() < 0.7 else ("", f"{instruction}\n\n{drawn.question}")
    shots = [problem(rng) for _ in range(rng.randint(1, 3))]
    shown = "\n\n".join(f"Q: {shot.question}\nA: {shot.answer}" for shot in shots)
    if rng.random() < 0.3:
        return f"{rng.choice(_INSTRUCTIONS)}\n\n{shown}", drawn.question
    return "", f"{shown}\n\nQ: {drawn.question}\nA:"


def _gain(rng: random.Random) -> Problem:
    who, other = rng.sample(NAMES, 2)
    thing, a, b = rng.choice(_THINGS), rng.randint(2, 60), rng.randint(2, 60)
    question = rng.choice(
        [
            f"{who} has {a} {thing}. {other} gives {who} {b} more. How many {thing} does {who} have now?",
            f"{who} found {a} {thing} and then bought {b} {thing}. How many {thing} does {who} have in all?",
            f"{who} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
        ]
    )
    return Problem(question, f"There are {a} {thing} and {b} more, so we add.", f"( {a} + {b} )")


def _loss(rng: random.Random) -> Problem:
    who, other = rng.sample(NAMES, 2)
    thing, a = rng.choice(_THINGS), rng.randint(12, 90)
    b = rng.randint(2, a - 2)
    question = rng.choice(
        [
            f"{who} had {a} {thing}. {who} gave {b} to {other}. How many {thing} are left?",
            f"{who} had {a} {thing} but lost {b} of them. How many {thing} does {who} have now?",
            f"There were {a} {thing} on the table. {other} took {b} away. How many {thing} remain?",
        ]
    )
    return Problem(question, f"There were {a} {thing} and {b} are gone, so we subtract.", f"( {a} - {b} )")


def _groups(rng: random.Random) -> Problem:
    who, thing, container = rng.choice(NAMES), rng.choice(_THINGS), rng.choice(_CONTAINERS)
    a, b = rng.randint(2, 12), rng.randint(2, 20)
    question = rng.choice(
        [
            f"{who} has {a} {container} with {b} {thing} each. How many {thing} are there?",
            f"There are {b} {thing} in each of the {a} {container}. How many {thing} does {who} have?",
        ]
    )
    return Problem(question, f"There are {a} {container} of {b} {thing}, so we multiply.", f"( {a} * {b} )")


def _share(rng: random.Random) -> Problem:
    who, thing, container = rng.choice(NAMES), rng.choice(_THINGS), rng.choice(_CONTAINERS)
    b = rng.randint(2, 12)
    a = b * rng.randint(2, 12)
    question = rng.choice(
        [
            f"{who} puts {a} {thing} equally into {b} {container}. How many {thing} are in each?",
            f"{who} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
        ]
    )
    return Problem(question, f"The {a} {thing} are split into {b} equal parts, so we divide.", f"( {a} / {b} )")


def _gain_then_loss(rng: random.Random) -> Problem:
    who, other = rng.sample(NAMES, 2)
    thing, a, b = rng.choice(_THINGS), rng.randint(5, 60), rng.randint(2, 40)
    c = rng.randint(2, a + b - 2)
    question = f"{who} had {a} {thing}, got {b} more and gave {c} to {other}. How many {thing} does {who} have now?"
    return Problem(question, f"We add {b} to {a} and then subtract {c}.", f"( ( {a} + {b} ) - {c} )")


def _groups_then_gain(rng: random.Random) -> Problem:
    who, thing, container = rng.choice(NAMES), rng.choice(_THINGS), rng.choice(_CONTAINERS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 30)
    question = f"{who} has {a} {container} with {b} {thing} each and {c} more {thing}. How many {thing} is that?"
    return Problem(question, f"We multiply {a} by {b} and then add {c}.", f"( ( {a} * {b} ) + {c} )")


_KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _gain,
    _loss,
    _groups,
    _share,
    _gain_then_loss,
    _groups_then_gain,
)
