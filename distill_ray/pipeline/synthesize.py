"""Synthesize: the teacher writes the queries itself (`data.type: synthesize`).

After Self-Instruct (Wang et al. 2022, arXiv 2212.10560): rounds of calls, each of which shows a few seeds and queries
written in earlier rounds; what is nearly the same as something before is dropped. Rounds grow, so that there soon is
something to show. What a call is asked follows from the config and the rounds before it, and every answer is in the
ledger: run again after a kill, it replays them and goes on. A larger `count` goes on too.

    topics | role prompts, seeds -> teacher, round by round -> queries/queries.jsonl -> planned like any other file
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasketch import MinHash, MinHashLSH

from distill_ray.config import FilesDataConfig, MixtureConfig, RunConfig, SynthesizeDataConfig
from distill_ray.config.recipe import DEFAULT_REFUSALS
from distill_ray.engines import make_engine
from distill_ray.engines.base import hash_messages
from distill_ray.errors import ConfigError, DataError, RequestRejected, TransientEngineError
from distill_ray.pipeline.capacity import require, teacher_needs
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.ledger import Flusher, Ledger, LedgeredEngine
from distill_ray.pipeline.planning.layouts import with_layout
from distill_ray.pipeline.planning.planner import normalise
from distill_ray.pipeline.planning.readers import read_rows
from distill_ray.pipeline.planning.sources import resolve
from distill_ray.pipeline.planning.textfile import lines
from distill_ray.pipeline.progress import Progress, say
from distill_ray.pipeline.teacher import Teacher, engine_actors
from distill_ray.recipes.answers import show, with_plain_apostrophes
from distill_ray.recipes.patterns import any_matches
from distill_ray.recipes.template import TextTemplate
from distill_ray.records import Completion, Message

REQUEST = """Write {{ number }} different questions or requests that people might send about this:

{{ topic }}
{% if examples %}
They are like these, and none of them says the same again:
{% for example in examples %}- {{ example }}
{% endfor %}{% endif %}
Write one per line, without numbers and without explanations."""

NAMES = frozenset({"topic", "number", "examples"})  # what a prompt can print
FIRST_ROUND, MOST_PER_ROUND = 4, 256  # calls
MOST_FAILED = 8  # calls one after the other
MOST_BARREN = 50  # answered calls one after the other without a query that is new: more would be paid for nothing
SHINGLE = 4  # characters
_MARK = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,4}[.):])\s+")

Ask = Callable[[Sequence[Message], int], Awaitable[list[Completion]]]  # messages, the call's number -> its samples


@dataclass
class Written:
    """What a synthesis came to. Tokens are of all calls, replayed or not."""

    queries: list[dict[str, str]] = dataclasses.field(default_factory=list)
    near_duplicates: int = 0
    refused: int = 0  # answers
    failed_calls: int = 0
    calls: int = 0
    replayed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    barren_calls: int = 0  # the last so many that were answered gave nothing new
    example: str = ""  # an answer, for the message when nothing of use was written

    def figures(self) -> dict[str, int]:
        """For the manifest."""
        values = dataclasses.asdict(self)
        return {"written": len(self.queries), **{name: v for name, v in values.items() if isinstance(v, int)}}


def with_queries(config: RunConfig, folder: RunFolder, limit: int | None = None) -> RunConfig:
    """The config with `data:` as files: what the teacher is to write, it writes now, unless it did before.

    Raises:
        DataError: it wrote nothing of use.
        EngineError: it cannot be asked.
    """
    data = config.data
    if isinstance(data, FilesDataConfig):
        return config
    requests = Requests(data)
    count = min(data.count, limit or data.count)
    fingerprint = _fingerprint(config, requests, count)
    state = folder.read_json("queries", "state.json") if folder.exists("queries", "state.json") else {}
    if state.get("fingerprint") != fingerprint or not folder.exists("queries", "queries.jsonl"):
        written = _synthesize(config, folder, requests, count)
        rows = "".join(json.dumps(query, ensure_ascii=False) + "\n" for query in written.queries)
        folder.write_bytes(rows.encode(), "queries", "queries.jsonl")
        folder.write_json({"fingerprint": fingerprint, **written.figures()}, "queries", "state.json")
        folder.update_manifest({"queries": written.figures()})
    return config.model_copy(update={"data": as_files(data, folder.url("queries", "queries.jsonl"))})


def as_files(data: SynthesizeDataConfig, source: str) -> FilesDataConfig:
    """`data:` for queries that are written, in the file `source`."""
    rest = {name: getattr(data, name) for name in FilesDataConfig.model_fields if name in type(data).model_fields}
    return FilesDataConfig(**rest | {"type": "files", "source": source, "layout": "columns", "role": None})


def _fingerprint(config: RunConfig, requests: Requests, count: int) -> str:
    data = config.data.model_dump(mode="json", exclude={"holdout", "validation_holdout", "validation", "test", "count"})
    sampling = config.teacher.sampling.model_dump(mode="json")
    asked = [make_engine(engine).identity for engine in config.teachers.values()]
    who = asked[0] if not isinstance(config.teacher, MixtureConfig) else [asked, config.teacher.shares]
    parts = [data, sampling, who, requests.prompts, requests.seeds, count]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# -- what is asked ---------------------------------------------------------------------------------------------------


class Requests:
    """The conversation of each call.

    Args:
        data: `data:`.

    Raises:
        InputError: the template, the file of role prompts or the file of seeds cannot be used.
    """

    def __init__(self, data: SynthesizeDataConfig) -> None:
        self._data = data
        self._template = TextTemplate(data.prompt or REQUEST, key="data.prompt")
        self.prompts: list[tuple[str, str]] = [(data.system or "", topic) for topic in data.topics or [""]]
        if data.role_prompts is not None:
            self.prompts = _role_prompts(data)
        self._require_known_names()
        self.seeds = [*data.seeds, *(_lines_of(data) if data.seeds_file is not None else [])]

    def _require_known_names(self) -> None:
        """Raises ConfigError: the prompt prints what no call has. Found out here, before the teacher is started."""
        unknown = sorted(self._template.columns - NAMES)
        if unknown:
            names = ", ".join(f"`{name}`" for name in unknown)
            raise ConfigError(f"data.prompt: unknown name {names}; there are: {', '.join(sorted(NAMES))}")

    def messages(self, number: int, written: Sequence[str]) -> list[Message]:
        """What call `number` asks, with what was written in earlier rounds."""
        system, topic = self.prompts[number % len(self.prompts)]
        content = topic
        if self._data.role_prompts is None:
            pool = [*self.seeds, *written]
            chosen = random.Random(f"{self._data.seed}/{number}").sample(pool, min(self._data.shown, len(pool)))
            wanted = self._data.per_call if self._data.parse == "lines" else 1
            content = self._template.render({"topic": topic, "number": wanted, "examples": chosen})
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        return [*messages, {"role": "user", "content": content}]


def _role_prompts(data: SynthesizeDataConfig) -> list[tuple[str, str]]:
    """(system, task) of every task. Raises DataError: the file has none."""
    files = resolve(data.role_prompts or "", key="data.role_prompts")
    rows = itertools.chain.from_iterable(read_rows(file, data.encoding) for file in files)
    prompts = []
    for row in with_layout(rows, "role_prompts", data.role):
        if row.error is not None:
            raise DataError(f"data.role_prompts: {row.label}: {row.error}")
        prompts.append((row.columns["system"], row.columns["text"] or row.columns["system"]))
    return prompts


def _lines_of(data: SynthesizeDataConfig) -> list[str]:
    files = resolve(data.seeds_file or "", format="jsonl", key="data.seeds_file")  # any text: read by line below
    return [line.strip() for file in files for line in lines(file, data.encoding) if line.strip()]


# -- what comes back -------------------------------------------------------------------------------------------------


def queries_in(answer: Completion, parse: str) -> list[str]:
    """The queries of one answer: its lines, or all of it. Of an answer that was cut off, the last one is not whole."""
    is_cut = answer.finish_reason == "length"
    if parse == "whole":
        return [] if is_cut or not answer.text.strip() else [answer.text.strip()]
    found = [line for line in answer.text.splitlines() if line.strip()]
    if is_cut:
        found = found[:-1]
    if any(_MARK.match(line) for line in found):  # in a list, what is no item is talk around it
        found = [line for line in found if _MARK.match(line)]
    texts = [_MARK.sub("", line).strip() for line in found]
    return [text.strip('"\u201c\u201d').strip() for text in texts if text.strip('"\u201c\u201d').strip()]


def _is_refusal(answer: Completion) -> bool:
    """Whether it is one of the usual refusals, whose lines are no queries."""
    if answer.finish_reason == "content_filter":
        return True
    return any_matches(DEFAULT_REFUSALS, with_plain_apostrophes(answer.text))


class Distinct:
    """Texts of which none is nearly the same as another.

    Candidates come from locality-sensitive hashing (MinHash), and are then compared exactly.

    Args:
        max_similarity: Jaccard index of the sets of runs of four characters, of normalised text.
    """

    def __init__(self, max_similarity: float) -> None:
        self._most = max_similarity
        # Weighted towards finding too many: they are compared anyway.
        self._index = MinHashLSH(threshold=min(max_similarity, 0.9), num_perm=128, weights=(0.1, 0.9))
        self._shingles: list[frozenset[str]] = []

    def add(self, text: str) -> bool:
        """Add a text; False if there is one like it."""
        key = normalise(text)
        shingles = frozenset(key[i : i + SHINGLE] for i in range(max(1, len(key) - SHINGLE + 1)))
        mark = MinHash(num_perm=128)
        mark.update_batch([shingle.encode() for shingle in shingles])
        for number in self._index.query(mark):
            other = self._shingles[int(str(number))]
            if len(shingles & other) / len(shingles | other) >= self._most:
                return False
        self._index.insert(str(len(self._shingles)), mark)
        self._shingles.append(shingles)
        return True


async def write_queries(
    data: SynthesizeDataConfig, requests: Requests, count: int, ask: Ask, on_progress: Callable[[Written], bool]
) -> Written:
    """The rounds.

    Args:
        data: `data:`.
        requests: what is asked.
        count: queries wanted.
        ask: asks the teacher.
        on_progress: told now and then; False ends it.

    Raises:
        EngineError: many calls in a row were not answered.
    """
    written, distinct = Written(), Distinct(data.max_similarity)
    for seed in requests.seeds:
        distinct.add(seed)
    most_calls = data.max_calls or 10 * data.calls_needed
    before: list[str] = []
    number, end_of_round, size, failed_in_a_row = 0, 0, FIRST_ROUND, 0
    while len(written.queries) < count and number < most_calls:
        if number == end_of_round:
            before = [query["text"] for query in written.queries]
            end_of_round, size = number + size, min(2 * size, MOST_PER_ROUND)
        missing = -(-(count - len(written.queries)) // (data.per_call if data.parse == "lines" else 1))
        # Only as many as are needed; the rest of the round shows the same examples, so that a call's request depends
        # on its number and not on the count.
        calls = range(number, min(number + missing, end_of_round, most_calls))
        answers = await asyncio.gather(
            *(ask(requests.messages(call, before), call) for call in calls), return_exceptions=True
        )
        failures = _take(written, distinct, data, answers)
        failed_in_a_row = failed_in_a_row + len(failures) if len(failures) == len(calls) else 0
        if failed_in_a_row >= MOST_FAILED:
            raise failures[0]
        number = calls.stop
        if not on_progress(written) or written.barren_calls >= MOST_BARREN:
            break
    del written.queries[count:]
    return written


def _take(
    written: Written, distinct: Distinct, data: SynthesizeDataConfig, answers: Sequence[Any]
) -> list[BaseException]:
    """Add a round's answers; returns the calls' own failures. One that concerns all calls is raised."""
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    for failure in failures:
        if not isinstance(failure, RequestRejected | TransientEngineError):
            raise failure
    written.failed_calls += len(failures)
    for answer in (answer for answer in answers if isinstance(answer, list)):
        num_before = len(written.queries)
        for sample in answer:
            written.example = written.example or sample.text
            if _is_refusal(sample):
                written.refused += 1
                continue
            for text in queries_in(sample, data.parse):
                if distinct.add(text):
                    written.queries.append({"text": text})
                else:
                    written.near_duplicates += 1
        written.barren_calls = 0 if len(written.queries) > num_before else written.barren_calls + 1
    return failures


# -- on Ray ----------------------------------------------------------------------------------------------------------


def _synthesize(config: RunConfig, folder: RunFolder, requests: Requests, count: int) -> Written:
    """Start the teacher in an actor, let it write, end it: its GPUs are for the generation that follows."""
    data = config.data
    assert isinstance(data, SynthesizeDataConfig)
    with connected(), Progress("synthesize", total=count, unit="queries") as progress:
        require(*teacher_needs(config))
        with engine_actors(config, folder) as pools:
            written = asyncio.run(_ask(config, folder, requests, count, Teacher(config, pools), progress))
    if not written.queries:
        refused = f" ({written.refused} answers were refusals)" if written.refused else ""
        raise DataError(
            f"data: the teacher wrote no usable query in {written.calls + written.replayed} calls{refused}; ask in "
            f"another way (data.prompt, data.topics, data.parse). An answer: {show(written.example)}"
        )
    if len(written.queries) < count:
        say(f"data: {len(written.queries)} of {count} queries were written. {_why_so_few(written, config)}")
    return written


def _why_so_few(written: Written, config: RunConfig) -> str:
    most = config.generate.max_teacher_tokens
    if most is not None and written.prompt_tokens + written.completion_tokens >= most:
        return f"generate.max_teacher_tokens ({most}) is spent; run again with more, and it goes on"
    dropped = f"{written.near_duplicates} more were nearly the same as others"
    dropped += f", {written.refused} answers were refusals" if written.refused else ""
    advice = "more topics or seeds, a prompt that shows `examples`, a higher temperature or data.max_similarity"
    if written.barren_calls >= MOST_BARREN:
        return f"The last {written.barren_calls} calls gave nothing new, and {dropped}. For more: {advice}"
    return f"That is what data.max_calls allows; {dropped}. For more: more calls, {advice}"


async def _ask(
    config: RunConfig, folder: RunFolder, requests: Requests, count: int, teacher: Teacher, progress: Progress
) -> Written:
    data, sampling = config.data, config.teacher.sampling
    assert isinstance(data, SynthesizeDataConfig)
    ledger, flusher = Ledger(folder, "queries"), Flusher(config.generate.flush_s or (0.1 if folder.is_local else 5.0))
    flusher.add(ledger)
    counts = Written()
    in_flight = {engine: asyncio.Semaphore(own.max_concurrency) for engine, own in teacher.engines.items()}

    def on_call(is_replayed: bool, completions: Sequence[Completion]) -> None:
        counts.replayed += len(completions) * is_replayed
        counts.calls += len(completions) * (not is_replayed)
        counts.prompt_tokens += sum(c.prompt_tokens for c in completions)
        counts.completion_tokens += sum(c.completion_tokens for c in completions)

    async def ask(messages: Sequence[Message], call: int) -> list[Completion]:
        own = sampling.model_copy(update={"seed": sampling.seed + data.seed + call * sampling.n})
        engine = teacher.of_key(hash_messages([*messages, Message(role="user", content=f"call {call}")]))
        name = engine.identity.partition(":")[2]
        async with in_flight[engine]:
            ledgered = LedgeredEngine(name, engine, own, ledger, engine.start, on_call, flusher.check)
            return await ledgered.generate(messages)

    def on_progress(written: Written) -> bool:
        duplicates = written.near_duplicates or None
        progress.update(
            min(len(written.queries), count), near_duplicates=duplicates, calls=counts.calls, replayed=counts.replayed
        )
        most = config.generate.max_teacher_tokens
        return most is None or counts.prompt_tokens + counts.completion_tokens < most

    try:
        written = await write_queries(data, requests, count, ask, on_progress)
    finally:
        flusher.remove(ledger)
        await asyncio.to_thread(ledger.flush)
    await asyncio.to_thread(ledger.merge)
    own = {"calls", "replayed", "prompt_tokens", "completion_tokens"}
    return dataclasses.replace(written, **{name: getattr(counts, name) for name in own})
