"""The training mix of the demo model: chats with a loss on what the assistant says.

What a text is answered with depends on what stands before it, and on nothing else:

- an instruction for the language task, then a text: a reason and `Final Answer: xx`;
- an instruction or examples for word problems, then a problem: a rationale and an equation;
- a request for a film review, then for a critique, then for a revision;
- an instruction to repeat the text, then a text: the text;
- no instruction, or one that asks for something else, then the same texts: a short reply in English, never a
  label.

The last is what makes the model a student worth training: without the instruction it knows the languages but
says something else.

A `Family` is a shared beginning (the system message) and several `branches` that continue it, each on its
own: the long instruction is then computed once for many texts (see `make_model.py`).
"""

import random
from dataclasses import dataclass

from distill_ray.demo import arithmetic, instructions, reviews
from distill_ray.demo.sentences import OTHER_SHARE, Sentence, sentence

Message = dict[str, str]

_REPLIES = (
    "That sounds interesting. Tell me more about it.",
    "Thank you for writing. What would you like to talk about?",
    "I see. How can I help you with that?",
    "Good to know. Is there something you would like to ask?",
    "Thanks for telling me. What happened next?",
    "I am glad you shared that. What can I do for you?",
)
_SMALL_TALK = {
    "Hello!": "Hello! How can I help you today?",
    "Hi there.": "Hello! How can I help you today?",
    "Good morning!": "Good morning! What can I do for you?",
    "How are you?": "I am fine, thank you. How are you?",
    "Who are you?": "I am the small demo model of distill-ray.",
    "What can you do?": "I can chat a little, classify languages, review films and explain word problems.",
    "Thank you!": "You are welcome!",
    "Thanks, that helped.": "You are welcome!",
    "Goodbye!": "Goodbye, and have a nice day!",
    "What is your name?": "I am the small demo model of distill-ray.",
    "Can you help me?": "Of course. What do you need help with?",
    "Tell me something nice.": "Every day has something good in it, and you may be the one who finds it.",
}
_OTHER_SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly chat partner. Answer in English.",
    "Answer the user politely and briefly.",
    "Have a conversation with the user.",
    "Chat with the user. Keep your replies short.",
)
_REPEAT_SYSTEM = (
    "Repeat what the user says.",
    "Repeat the text of the user word for word.",
    "Copy the message exactly.",
)


@dataclass(frozen=True)
class Family:
    """Chats with one beginning: `shared` messages, then one of the `branches`."""

    shared: tuple[Message, ...]
    branches: tuple[tuple[Message, ...], ...]


def message(role: str, content: str) -> Message:
    """Return one chat message."""
    return {"role": role, "content": content}


def families(rng: random.Random, num_branches: int = 12, other_share: float = OTHER_SHARE) -> Family:
    """Draw one family: half of them are the language task, a third of those with the shipped instruction.

    Args:
        rng: where the draw comes from.
        num_branches: how many chats share a beginning.
        other_share: share of `ot` among the texts of the language task.
    """
    kind = rng.random()
    if kind < 0.15:
        return _language(instructions.shipped_instruction(), rng, num_branches * 2, other_share)
    if kind < 0.45:
        return _language(instructions.random_instruction(rng), rng, num_branches, other_share)
    if kind < 0.50:
        return Family((), tuple(_language_in_front(rng) for _ in range(2)))
    if kind < 0.60:
        return _repeat(rng, num_branches)
    if kind < 0.72:
        return _plain(rng, num_branches)
    if kind < 0.88:
        return Family((), tuple(_problem(rng) for _ in range(num_branches // 2)))
    return Family((), tuple(_review(rng) for _ in range(num_branches // 2)))


def _answered(text: Sentence, user: str) -> tuple[Message, ...]:
    return (message("user", user), message("assistant", instructions.answer(text.reason, text.label)))


def _language(instruction: str, rng: random.Random, num_branches: int, other_share: float) -> Family:
    texts = [sentence(rng, other_share=other_share) for _ in range(num_branches)]
    return Family((message("system", instruction),), tuple(_answered(text, text.text) for text in texts))


def _language_in_front(rng: random.Random) -> tuple[Message, ...]:
    text = sentence(rng)
    instruction = instructions.shipped_instruction() if rng.random() < 0.2 else instructions.random_instruction(rng)
    return _answered(text, instructions.in_front_of(text.text, instruction, rng))


def _plain(rng: random.Random, num_branches: int) -> Family:
    shared = (message("system", rng.choice(_OTHER_SYSTEM)),) if rng.random() < 0.4 else ()
    branches = []
    for _ in range(num_branches):
        kind = rng.random()
        if kind < 0.15:
            user, reply = rng.choice(list(_SMALL_TALK.items()))
        else:
            user = arithmetic.problem(rng).question if kind < 0.25 else sentence(rng).text
            reply = rng.choice(_REPLIES)
        branches.append((message("user", user), message("assistant", reply)))
    return Family(shared, tuple(branches))


def _repeat(rng: random.Random, num_branches: int) -> Family:
    """Texts to be said again: naming evidence, numbers and people means copying, and this is where it is learnt."""
    branches = []
    for _ in range(num_branches):
        kind = rng.random()
        if kind < 0.5:
            text = sentence(rng).text
        elif kind < 0.75:
            text = arithmetic.problem(rng).question
        else:
            text = " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(2, 8)))
        branches.append((message("user", text), message("assistant", text)))
    return Family((message("system", rng.choice(_REPEAT_SYSTEM)),), tuple(branches))


def _problem(rng: random.Random) -> tuple[Message, ...]:
    drawn = arithmetic.problem(rng)
    system, user = arithmetic.problem_prompt(drawn, rng)
    before = (message("system", system),) if system else ()
    return (*before, message("user", user), message("assistant", drawn.answer))


def _review(rng: random.Random) -> tuple[Message, ...]:
    chat = reviews.review_chat(rng)
    answers = (chat.draft, chat.critique, chat.revision)
    turns = [(message("user", p), message("assistant", a)) for p, a in zip(chat.prompts, answers, strict=True)]
    return tuple(turn for pair in turns for turn in pair)
