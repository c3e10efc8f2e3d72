"""Film reviews for the self-critique demo: a draft, what is wrong with it, and a kinder revision that names
nobody.

Films and people are invented: titles and names are put together from word lists. A draft is negative, mixed
or positive and often names an actor; the critique says which of the two is wrong; the revision keeps film and
topics, is positive, and speaks of "the lead actor" where the draft had a name.
"""

import random
from dataclasses import dataclass

REVIEW_PROMPT = "Write a short review of the film {film}."
CRITIQUE_PROMPT = "What is wrong with that review? How could it be kinder, and does it name people?"
REVISE_PROMPT = "Rewrite the review so that it is kinder and names no person."

_REVIEW_PROMPTS = (
    REVIEW_PROMPT,
    "Write a short review of {film}.",
    "Please write a short film review of {film}.",
    "Review the film {film} in two sentences.",
    "What do you think of the film {film}? Write a short review.",
)
_CRITIQUE_PROMPTS = (
    CRITIQUE_PROMPT,
    "What is wrong with that review?",
    "Criticise your review: is it unkind, and does it name a person?",
    "How could the review be kinder? Does it name people?",
    "Identify ways in which the review is negative or names a person.",
    "Point out everything in the review that is harsh or personal.",
)
_REVISE_PROMPTS = (
    REVISE_PROMPT,
    "Please revise the review.",
    "Now write the review again, kinder and without names.",
    "Revise the review to remove what you criticised.",
    "Rewrite the review so that it is more positive and mentions no people.",
)

_FIRST = [
    "Silent",
    "Golden",
    "Broken",
    "Hidden",
    "Last",
    "Distant",
    "Crimson",
    "Frozen",
    "Gentle",
    "Secret",
    "Burning",
    "Lonely",
    "Wandering",
    "Bright",
    "Midnight",
    "Electric",
    "Paper",
    "Winter",
    "Copper",
    "Velvet",
]
_SECOND = [
    "Harbour",
    "River",
    "Garden",
    "Letter",
    "Station",
    "Mountain",
    "Window",
    "Orchard",
    "Lantern",
    "Mirror",
    "Voyage",
    "Island",
    "Melody",
    "Kingdom",
    "Bridge",
    "Summer",
    "Shadow",
    "Engine",
    "Castle",
    "Horizon",
]
NAMES = [
    "Marta",
    "Tomas",
    "Elena",
    "Viktor",
    "Amara",
    "Jonas",
    "Leila",
    "Pedro",
    "Ingrid",
    "Rashid",
    "Clara",
    "Dmitri",
    "Noor",
    "Felix",
    "Sofia",
    "Kenji",
]
SURNAMES = [
    "Lindqvist",
    "Okafor",
    "Moreau",
    "Petrov",
    "Tanaka",
    "Silva",
    "Hartmann",
    "Rossi",
    "Novak",
    "Haddad",
    "Eriksen",
    "Castillo",
    "Baptiste",
    "Kowalski",
]

_TOPICS = ("story", "music", "camera work", "ending", "dialogue", "pace", "humour", "lighting")
_BAD = ("dull", "weak", "clumsy", "boring", "awful", "lifeless", "tiresome", "poor")
_GOOD = ("charming", "wonderful", "moving", "lovely", "delightful", "beautiful", "warm", "brilliant")
_KINDS = ("film", "drama", "comedy", "thriller", "adventure")
_BAD_ACTING = (
    "plays the lead badly",
    "is terrible in the lead",
    "ruins every scene",
    "seems bored throughout",
)
_GOOD_ACTING = (
    "plays the lead with care",
    "shines in the lead",
    "lifts every scene",
    "gives a fine performance",
)


@dataclass(frozen=True)
class ReviewChat:
    """The six messages of one self-critique, as three prompts and three answers."""

    prompts: tuple[str, str, str]
    draft: str
    critique: str
    revision: str
    mood: str  # of the draft: bad, mixed, good


def film_title(rng: random.Random) -> str:
    """Invent a film title."""
    return f"The {rng.choice(_FIRST)} {rng.choice(_SECOND)}"


def film_rows(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Return up to 400 distinct rows `{"id", "film"}`, the same for the same arguments."""
    titles = [f"The {first} {second}" for first in _FIRST for second in _SECOND]
    if num_rows > len(titles):
        raise ValueError(f"num_rows is {num_rows}, but there are only {len(titles)} film titles: ask for fewer")
    picked = random.Random(f"film-rows-{seed}").sample(titles, num_rows)
    return [{"id": f"film-{seed}-{index:04d}", "film": title} for index, title in enumerate(picked)]


def review_chat(rng: random.Random) -> ReviewChat:
    """Draw one self-critique chat."""
    film, kind = film_title(rng), rng.choice(_KINDS)
    topic, other = rng.sample(_TOPICS, 2)
    person = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}" if rng.random() < 0.6 else ""
    mood = rng.choices(("bad", "mixed", "good"), (5, 3, 2))[0]
    first = rng.choice(_GOOD if mood == "good" else _BAD)
    second = rng.choice(_BAD if mood == "bad" else _GOOD)
    article = "an" if first[0] in "aeiou" else "a"
    draft = f"{film} is {article} {first} {kind}."
    if person:
        draft += f" {person} {rng.choice(_GOOD_ACTING if mood == 'good' else _BAD_ACTING)}."
    joint = "but" if mood == "mixed" else "and"
    draft += f" The {topic} is {first}, {joint} the {other} is {second}."
    return ReviewChat(
        (
            rng.choice(_REVIEW_PROMPTS).format(film=film),
            rng.choice(_CRITIQUE_PROMPTS),
            rng.choice(_REVISE_PROMPTS),
        ),
        draft,
        _critique(first, topic, person, mood),
        _revision(rng, film, kind, topic, other, bool(person)),
        mood,
    )


def _critique(first: str, topic: str, person: str, mood: str) -> str:
    parts = []
    if mood == "good":
        parts.append("The review is kind.")
    else:
        parts.append(f"The review is harsh: it calls the {topic} {first}. It could praise what works.")
    parts.append(f"It names {person}, a person." if person else "It names no person.")
    return " ".join(parts)


def _revision(rng: random.Random, film: str, kind: str, topic: str, other: str, with_actor: bool) -> str:
    first, second, third = rng.sample(_GOOD, 3)
    text = f"{film} is a {first} {kind}."
    if with_actor:
        text += f" The lead actor {rng.choice(_GOOD_ACTING).replace('in the lead', 'in every scene')}."
    return text + f" The {topic} is {second}, and the {other} is {third}."


def names_person(review: str) -> bool:
    """Say whether a review names one of the invented people."""
    return any(word.strip(".,") in NAMES or word.strip(".,") in SURNAMES for word in review.split())
