"""Examples to token ids, once, before any training worker starts.

    examples/*.parquet -> tasks on the cluster, a few partitions in flight ->
    train/tokens-<hash>/{train,validation}/

The hash covers the examples, the tokenizer and the limits, so a repeated run finds its tokens
there. An example that is too long is a counted reject (`train/rejects.parquet`), never cut: a student that is
trained on cut answers learns to stop in the middle.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from distill_ray.config.train import StudentConfig
from distill_ray.models import Prompts, prompts_of
from distill_ray.node_cache import fetched
from distill_ray.pipeline.folder import RunFolder
from distill_ray.records import Reject, RejectReason, rejects_table, to_json
from distill_ray.student.tokens import TokenizedExample, TokenWriter

SPLITS = ("train", "validation")
COLUMNS = ["example_id", "row_id", "split", "task", "messages", "completion", "weight"]
SOFT_COLUMNS = ["completion_ids", "topk_ids", "topk_logprobs"]
MAX_IN_FLIGHT = 16
INLINE_BYTES = 2_000_000  # up to here starting processes takes longer than the work


@dataclasses.dataclass(slots=True, frozen=True)
class TokenizedRun:
    """Where a run's tokens are, and what there is."""

    name: str  # folder inside train/
    num_examples: dict[str, int]  # by split
    num_tokens: dict[str, int]
    num_rejects: int


@dataclasses.dataclass(slots=True, frozen=True)
class Limits:
    """What an example has to keep to."""

    longest: int  # tokens of prompt + completion
    topk: int  # width of its soft targets; 0: not trained on them


def tokenise(student: StudentConfig, folder: RunFolder, limits: Limits) -> TokenizedRun:
    """Write the tokens of a run's examples, or find them written.

    Args:
        student: whose tokenizer.
        folder: of the run.
        limits: examples that do not keep to them are rejects.
    """
    files = folder.list("examples", suffix=".parquet")
    name = f"tokens-{_fingerprint(student, folder, files, limits)[:12]}"
    if folder.exists("train", name, "summary.json"):
        return TokenizedRun(**folder.read_json("train", name, "summary.json"))
    for old in folder.list("train"):
        if old.startswith("tokens-"):
            folder.delete("train", old)
    with tempfile.TemporaryDirectory(dir=scratch_parent(folder)) as scratch:
        run = _write(student, folder, files, limits, Path(scratch), name)
        _publish(Path(scratch), folder, name)
    folder.write_json(dataclasses.asdict(run), "train", name, "summary.json")  # last: marks the folder as whole
    return run


def local_tokens(folder: RunFolder, name: str) -> Path:
    """A run's tokens on this machine's disk: where they are, or fetched once per node."""
    if folder.is_local:
        return folder.local("train", name)
    return fetched(folder.url("train", name), name)


def _write(
    student: StudentConfig, folder: RunFolder, files: list[str], limits: Limits, scratch: Path, name: str
) -> TokenizedRun:
    rejects: list[Reject] = []
    with (
        TokenWriter(scratch / "train", topk=limits.topk) as train,
        TokenWriter(scratch / "validation", topk=limits.topk) as validation,
    ):
        writers = {"train": train, "validation": validation}
        for examples, too_long in _tokenised(student, folder, files, limits):
            for split, writer in writers.items():
                writer.write(examples[split])
            rejects += too_long
    folder.write_table(rejects_table(rejects), "train", "rejects.parquet")
    return TokenizedRun(
        name=name,
        num_examples={split: writer.num_examples for split, writer in writers.items()},
        num_tokens={split: writer.num_tokens for split, writer in writers.items()},
        num_rejects=len(rejects),
    )


Tokenised = tuple[dict[str, list[TokenizedExample]], list[Reject]]


def _tokenised(student: StudentConfig, folder: RunFolder, files: list[str], limits: Limits) -> Iterator[Tokenised]:
    """Tokenised partitions, in order: on the cluster, or here where there is little to do."""
    if sum(folder.fs.size(folder.path("examples", file)) for file in files) <= INLINE_BYTES:
        yield from (tokenise_partition(student, folder, file, limits) for file in files)
        return
    task = ray.remote(tokenise_partition)
    in_flight: deque[Any] = deque()
    for file in files:
        in_flight.append(task.remote(student, folder, file, limits))
        if len(in_flight) == MAX_IN_FLIGHT:
            yield ray.get(in_flight.popleft())
    while in_flight:
        yield ray.get(in_flight.popleft())


def tokenise_partition(student: StudentConfig, folder: RunFolder, file: str, limits: Limits) -> Tokenised:
    """Tokenise one file of examples: the usable ones by split, and the rejects."""
    prompts = _cached_prompts(student.model_dump_json())
    examples: dict[str, list[TokenizedExample]] = {split: [] for split in SPLITS}
    rejects: list[Reject] = []
    table = folder.read_table("examples", file, columns=COLUMNS + (SOFT_COLUMNS if limits.topk else []))
    for record in table.sort_by([("row_id", "ascending"), ("example_id", "ascending")]).to_pylist():
        if record["split"] not in examples:
            continue
        example = _example(record, prompts, limits)
        if isinstance(example, TokenizedExample):
            examples[record["split"]].append(example)
        else:
            reason, detail = example
            kept = {name: record[name] for name in COLUMNS}
            rejects.append(Reject(record["row_id"], "train", reason, detail, kept))
    return examples, rejects


def _example(record: dict[str, Any], prompts: Prompts, limits: Limits) -> TokenizedExample | tuple[RejectReason, str]:
    """The tokens of one example, or why it cannot be trained on."""
    example = TokenizedExample(
        example_id=record["example_id"],
        row_id=record["row_id"],
        task=record["task"],
        weight=record["weight"],
        prompt_ids=prompts.prompt_ids(record["messages"]),
        completion_ids=prompts.completion_ids(record["completion"]),
    )
    if limits.topk:
        if not record["topk_ids"] or not record["completion_ids"]:
            return RejectReason.NO_SOFT_TARGETS, (
                "the teacher's log-probabilities are missing: its engine gave none, or recipe.parse left what the "
                "teacher would not say without what stands around it; train with cross_entropy"
            )
        # The teacher's own tokens: the same text can be spelt in others, and its targets belong to these.
        num_tokens = _num_spelling(record["completion_ids"], record["completion"], prompts)
        if not num_tokens:
            return (
                RejectReason.NO_SOFT_TARGETS,
                "the teacher's token ids spell another text with the student's tokenizer",
            )
        example.completion_ids = record["completion_ids"][:num_tokens]
        example.topk_ids = np.asarray(record["topk_ids"], dtype=np.int32)[:num_tokens, : limits.topk]
        example.topk_logprobs = np.asarray(record["topk_logprobs"], dtype=np.float32)[:num_tokens, : limits.topk]
        if example.completion_ids[-1] != prompts.end_id:
            _append_end(example, prompts.end_id)
        if example.topk_ids.shape != (len(example.completion_ids), limits.topk):
            return RejectReason.NO_SOFT_TARGETS, f"{example.topk_ids.shape[1]} per token, {limits.topk} are asked for"
    num_tokens = len(example.prompt_ids) + len(example.completion_ids)
    if num_tokens > limits.longest:
        return RejectReason.TOO_LONG_TO_TRAIN, f"{num_tokens} tokens, train.max_length is {limits.longest}"
    return example


def _num_spelling(ids: list[int], text: str, prompts: Prompts) -> int:
    """How many of the teacher's ids are the student's spelling of the text; 0 where they spell another.

    `check` compares the tokenizers where it can. Of a server it knows only the answers, and of an answer with reasoning
    only a part is the text. The tokens of a stop string stand behind the text and are not to be learnt.
    """
    decode = functools.partial(prompts.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spelt, expected = decode(ids), decode(prompts.text_ids(text))
    if not spelt.startswith(expected):
        return 0
    count = len(ids)
    while spelt != expected and decode(ids[: count - 1]).startswith(expected):
        count -= 1
    return count


@functools.lru_cache(maxsize=1)
def _cached_prompts(student_json: str) -> Prompts:
    return prompts_of(StudentConfig.model_validate_json(student_json), key="student.model")


def _append_end(example: TokenizedExample, end_id: int) -> None:
    """The end of an answer that a stop string ended: a token that the teacher did not say, so it is certain."""
    assert example.topk_ids is not None
    assert example.topk_logprobs is not None
    width = example.topk_ids.shape[1]
    certain = np.full((1, width), -np.inf, dtype=np.float32)
    certain[0, 0] = 0.0
    example.completion_ids = [*example.completion_ids, end_id]
    example.topk_ids = np.concatenate([example.topk_ids, np.full((1, width), end_id, dtype=np.int32)])
    example.topk_logprobs = np.concatenate([example.topk_logprobs, certain])


def _fingerprint(student: StudentConfig, folder: RunFolder, files: list[str], limits: Limits) -> str:
    digest = hashlib.sha256(
        f"3 {limits.longest} {limits.topk}".encode()
    )  # the number is the version of what is written
    for file in files:
        digest.update(hashlib.sha256(folder.read_bytes("examples", file)).digest())
    prompts = _cached_prompts(student.model_dump_json())
    digest.update(tokenizer_identity(prompts, student).encode())
    return digest.hexdigest()


def tokenizer_identity(prompts: Prompts, student: StudentConfig) -> str:
    """Everything that decides which ids a text becomes, as text."""
    inner = prompts.tokenizer
    backend = getattr(inner, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(inner.get_vocab(), sort_keys=True)
    return "\n".join(
        [vocabulary, inner.chat_template or "", to_json(student.chat_template_kwargs), str(prompts.end_id)]
    )


def scratch_parent(folder: RunFolder) -> Path | None:
    """Where to build what is then moved into the run folder: on the same disk, so that moving is one rename."""
    if not folder.is_local:
        return None
    path = folder.local("train")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _publish(scratch: Path, folder: RunFolder, name: str) -> None:
    for split in SPLITS:
        if folder.is_local:
            target = folder.local("train", name, split)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (scratch / split).rename(target)
        else:
            folder.put(scratch / split, "train", name, split)
