"""The call ledger: nothing is paid for twice, nothing finished is lost, nothing is damaged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.config import SamplingConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import RunFolderError, TransientEngineError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.ledger import Flusher, Ledger, LedgeredEngine, call_key
from distill_ray.records import Completion, Message


class Echo(Engine):
    """Answers with the question and counts what it was asked."""

    identity = "echo:1"

    def __init__(self) -> None:
        self.samples_made = 0
        self.requests = 0
        self.fail = False

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        await asyncio.sleep(0)
        if self.fail:
            raise TransientEngineError("down")
        self.requests += 1
        indices = range(first_sample, sampling.n)
        self.samples_made += len(indices)
        return [Completion(f"{messages[-1]['content']}#{i}", "stop", 3, 2, i, token_ids=[1, 2]) for i in indices]


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def ledgered(
    folder: RunFolder, engine: Engine, sampling: SamplingConfig, ledger: Ledger | None = None
) -> tuple[LedgeredEngine, list]:
    calls: list = []
    on_call = lambda replayed, completions: calls.append((replayed, len(completions)))  # noqa: E731
    ledger = Ledger(folder, "00000") if ledger is None else ledger
    return LedgeredEngine("echo", engine, sampling, ledger, engine.start, on_call), calls


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_call_that_was_flushed_is_replayed_by_the_next_process(folder: RunFolder) -> None:
    engine, sampling = Echo(), SamplingConfig(n=2)
    ledger = Ledger(folder, "00000")
    teacher, _ = ledgered(folder, engine, sampling, ledger)
    first = asyncio.run(teacher.generate(ask("a")))
    ledger.flush()
    again, calls = ledgered(folder, engine, sampling)
    assert asyncio.run(again.generate(ask("a"))) == first
    assert calls == [(True, 2)]
    assert engine.requests == 1


def test_more_samples_pay_only_for_the_new_ones(folder: RunFolder) -> None:
    engine, ledger = Echo(), Ledger(folder, "00000")
    few, _ = ledgered(folder, engine, SamplingConfig(n=2), ledger)
    many, calls = ledgered(folder, engine, SamplingConfig(n=5), ledger)
    asyncio.run(few.generate(ask("a")))
    answers = asyncio.run(many.generate(ask("a")))
    assert [c.sample_index for c in answers] == [0, 1, 2, 3, 4]
    assert engine.samples_made == 5
    assert calls == [(True, 2), (False, 3)]


def test_equal_prompts_in_flight_share_one_call(folder: RunFolder) -> None:
    engine = Echo()
    teacher, calls = ledgered(folder, engine, SamplingConfig())

    async def together() -> list[list[Completion]]:
        return await asyncio.gather(*(teacher.generate(ask("same")) for _ in range(10)))

    answers = asyncio.run(together())
    assert engine.requests == 1
    assert calls == [(False, 1)] + [(True, 1)] * 9  # each answer that a row got is counted, once
    assert all(answer == answers[0] for answer in answers)


def test_a_failed_call_is_asked_again(folder: RunFolder) -> None:
    engine = Echo()
    teacher, _ = ledgered(folder, engine, SamplingConfig())
    engine.fail = True
    with pytest.raises(TransientEngineError):
        asyncio.run(teacher.generate(ask("a")))
    engine.fail = False
    assert asyncio.run(teacher.generate(ask("a")))[0].text == "a#0"


def test_samples_paid_for_before_a_failure_are_kept(folder: RunFolder) -> None:
    engine = Echo()
    teacher, calls = ledgered(folder, engine, SamplingConfig(n=3))

    async def two_of_three(messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0) -> list:
        error = TransientEngineError("down")
        error.paid = (await Echo().generate(messages, sampling))[:2]
        raise error

    with mock.patch.object(engine, "generate", two_of_three), pytest.raises(TransientEngineError):
        asyncio.run(teacher.generate(ask("a")))
    assert [c.text for c in asyncio.run(teacher.generate(ask("a")))] == ["a#0", "a#1", "a#2"]
    assert engine.samples_made == 1
    assert calls == [(False, 2), (True, 2), (False, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "echo:2"},
        {"prompt": b"other"},
        {"sampling": SamplingConfig(temperature=0.1)},
        {"sampling": SamplingConfig(max_tokens=7)},
        {"sampling": SamplingConfig(seed=1)},
        {"sample": 1},
    ],
    ids=str,
)
def test_whatever_changes_the_answer_changes_the_key(change: dict) -> None:
    base = {"identity": "echo:1", "prompt": b"p", "sampling": SamplingConfig(), "sample": 0}
    changed = base | change
    assert call_key(*base.values()) != call_key(*changed.values())
    assert call_key("echo:1", b"p", SamplingConfig(n=8), 0) == call_key(*base.values())


def test_merging_keeps_every_call_once_and_drops_the_segments(folder: RunFolder) -> None:
    ledger = Ledger(folder, "00000")
    for i in range(5):
        ledger.put(bytes([i]) * 16, Completion(str(i), "stop", 1, 1))
        ledger.flush()
    ledger.put(bytes([0]) * 16, Completion("0", "stop", 1, 1))
    ledger.merge()
    assert folder.list("calls") == ["00000.parquet"]
    again = Ledger(folder, "00000")
    assert len(again) == 5
    assert {again.get(bytes([i]) * 16).text for i in range(5)} == set("01234")  # type: ignore[union-attr]


def test_segments_left_beside_a_merged_file_are_read_and_counted_once(folder: RunFolder) -> None:
    ledger = Ledger(folder, "00000")
    ledger.put(b"a" * 16, Completion("a", "stop", 1, 1))
    ledger.flush()
    segment = folder.read_bytes("calls", "00000", folder.list("calls", "00000")[0])
    ledger.merge()
    folder.write_bytes(segment, "calls", "00000", "killed-before-delete.arrow")
    assert len(Ledger(folder, "00000")) == 1


def test_top_logprobs_come_back_as_they_were(folder: RunFolder) -> None:
    ids = np.array([[5, 3], [7, 9]], dtype=np.int32)
    values = np.array([[-0.1, -2.0], [-0.5, -1.5]], dtype=np.float32)
    ledger = Ledger(folder, "00000")
    ledger.put(b"k" * 16, Completion("t", "stop", 1, 2, token_ids=[5, 7], topk_ids=ids, topk_logprobs=values))
    ledger.flush()
    back = Ledger(folder, "00000").get(b"k" * 16)
    assert back is not None
    np.testing.assert_array_equal(back.topk_ids, ids)
    np.testing.assert_array_equal(back.topk_logprobs, values)


def test_a_full_disk_keeps_the_buffer_and_stops_the_paying(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(folder, "00000")
    ledger.put(b"k" * 16, Completion("t", "stop", 1, 1))

    def full(*_: object) -> None:
        raise RunFolderError("No space left on device")

    monkeypatch.setattr(folder, "write_bytes", full)
    flusher = Flusher(0.01)
    flusher.add(ledger)
    for _ in range(200):
        try:
            flusher.check()
        except RunFolderError:
            break
        asyncio.run(asyncio.sleep(0.01))
    else:
        pytest.fail("the failed write was never reported")
    flusher.remove(ledger)
    monkeypatch.undo()
    ledger.flush()
    assert Ledger(folder, "00000").get(b"k" * 16) is not None


def test_a_ledger_of_another_version_is_refused_by_name(folder: RunFolder) -> None:
    import pyarrow as pa

    folder.write_table(pa.table({"key": [b"x"]}), "calls", "00000.parquet")
    with pytest.raises(RunFolderError, match="another version"):
        Ledger(folder, "00000")


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 9)),
            st.tuples(st.sampled_from(["flush", "merge", "kill"]), st.just(0)),
        ),
        max_size=30,
    )
)
def test_whatever_is_flushed_survives_any_sequence_of_kills(
    tmp_path_factory: pytest.TempPathFactory, steps: list
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("ledger"))
    ledger = Ledger(folder, "00000")
    buffered: set[bytes] = set()
    safe: set[bytes] = set()
    for step, number in steps:
        key = bytes([number]) * 16
        if step == "put":
            ledger.put(key, Completion(str(number), "stop", 1, 1))
            buffered.add(key)
        elif step == "kill":
            ledger, buffered = Ledger(folder, "00000"), set()
        else:
            getattr(ledger, step)()
            safe |= buffered
            buffered = set()
        for known in safe:
            completion = ledger.get(known)
            assert completion is not None
            assert completion.text == str(known[0])
    assert {key for key in (bytes([n]) * 16 for n in range(10)) if Ledger(folder, "00000").get(key)} == safe


def test_a_damaged_file_of_the_ledger_is_named_with_what_deleting_it_costs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_bytes(b"ARROW1\0\0garbage", "calls", "00000", "ab.arrow")
    with pytest.raises(RunFolderError, match=r"calls/00000/ab.arrow: damaged .*its calls are then made again"):
        Ledger(folder, "00000")
