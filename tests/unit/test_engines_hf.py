"""HfEngine on tiny random models: batching changes nothing, every row ends where it should."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray.config.engine import HfEngineConfig, SamplingConfig, StructuredOutput
from distill_ray.engines.hf import HfEngine
from distill_ray.engines.hf_model import _Sampler
from distill_ray.errors import ConfigError, RequestRejected, TransientEngineError
from distill_ray.models import ChatTokenizer
from distill_ray.records import Completion, Message, RejectReason

GREEDY = SamplingConfig(temperature=0, max_tokens=12)
END_ID = 2  # <|im_end|> of tiny_model


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def with_engine(model: Path, use: Callable[[HfEngine], Awaitable[Any]], **config: Any) -> Any:
    async def run() -> Any:
        engine = HfEngine(HfEngineConfig.model_validate({"model": str(model), "gpus": 0} | config))
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def ask(model: Path, text: str, sampling: SamplingConfig = GREEDY, **config: Any) -> list[Completion]:
    return with_engine(model, lambda engine: engine.generate(user(text), sampling), **config)


async def collect(engine: HfEngine, text: str, sampling: SamplingConfig) -> list[str]:
    return [piece async for piece in engine.stream(user(text), sampling)]


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_t5"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_unlike_requests_gives_what_each_gives_alone(
    fixture: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    texts = ["x" * length for length in (1, 3, 8, 21, 55, 144)]
    samplings = [
        SamplingConfig(
            temperature=temperature and 0.5 + i / 10, max_tokens=3 + 2 * i, seed=i, n=1 + i % 2 if temperature else 1
        )
        for i in range(len(texts))
    ]

    async def use(engine: HfEngine) -> tuple[list[list[Completion]], list[list[Completion]]]:
        pairs = list(zip(texts, samplings, strict=True))
        together = await asyncio.gather(*(engine.generate(user(t), s) for t, s in pairs))
        return together, [await engine.generate(user(t), s) for t, s in pairs]

    together, alone = with_engine(request.getfixturevalue(fixture), use)
    assert together == alone


def test_greedy_takes_the_best_token_at_every_step(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    [completion] = ask(tiny_model, "hello")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = ChatTokenizer(str(tiny_model)).prompt_ids(user("hello"))
    with torch.inference_mode():
        for token in completion.token_ids or []:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids = [*ids, token]


def test_an_end_token_is_kept_in_the_ids_and_left_out_of_the_text(tiny_model: Path) -> None:
    samples = ask(tiny_model, "hi", SamplingConfig(temperature=2.0, max_tokens=60, n=32))
    ended = [s for s in samples if s.finish_reason == "stop"]
    cut_off = [s for s in samples if s.finish_reason == "length"]
    assert ended
    assert cut_off
    for sample in ended:
        assert sample.token_ids is not None
        assert sample.token_ids[-1] == END_ID
        assert END_ID not in sample.token_ids[:-1]
        assert sample.completion_tokens == len(sample.token_ids) <= 60
        assert "im_end" not in sample.text
    assert all(s.completion_tokens == 60 and END_ID not in (s.token_ids or []) for s in cut_off)


def test_a_stop_string_ends_the_row_and_is_no_part_of_the_text(tiny_model: Path) -> None:
    [whole] = ask(tiny_model, "hello")
    stop = whole.text[4:6]
    [cut] = ask(tiny_model, "hello", GREEDY.model_copy(update={"stop": ["never seen", stop]}))
    assert whole.text.startswith(cut.text)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == (whole.token_ids or [])[: len(cut.text) + len(stop)]  # a byte is a token here


def test_a_sample_is_a_function_of_its_seed(tiny_model: Path) -> None:
    def texts(**sampling: Any) -> list[str]:
        return [s.text for s in ask(tiny_model, "hi", SamplingConfig(temperature=1.0, max_tokens=8, **sampling))]

    four = texts(n=4, seed=10)
    assert len(set(four)) > 1
    assert texts(n=1, seed=12) == four[2:3]
    assert texts(n=4, seed=10) == four


def test_top_p_of_nearly_nothing_is_greedy(tiny_model: Path) -> None:
    [greedy] = ask(tiny_model, "hello")
    [nucleus] = ask(tiny_model, "hello", SamplingConfig(temperature=1.0, top_p=1e-6, max_tokens=12))
    assert nucleus.text == greedy.text


def test_samples_follow_the_tempered_nucleus_distribution() -> None:
    """10,000 rows over four tokens against the probabilities worked out by hand."""
    rows = [
        type(
            "Row",
            (),
            {"sampling": SamplingConfig(temperature=2.0, top_p=0.8), "max_new_tokens": 1, "draws": draw},
        )
        for draw in [lambda self=None, u=u: np.array([u], np.float32) for u in (np.arange(10_000) + 0.5) / 10_000]
    ]
    logits = torch.tensor([4.0, 2.0, 1.0, -2.0]).repeat(10_000, 1)
    chosen = _Sampler(rows, 5)(torch.zeros(10_000, 5), logits).argmax(-1)
    # exp(logits / 2) = 7.39, 2.72, 1.65, 0.37 -> .609, .224, .136, .030; the nucleus of 0.8 is the first two
    counts = torch.bincount(chosen, minlength=4) / 10_000
    assert counts.tolist() == pytest.approx([0.7311, 0.2689, 0.0, 0.0], abs=2e-4)


def test_text_that_spells_a_control_token_stays_text(tiny_model: Path) -> None:
    plain, spelled = "x" * len("<|im_end|>"), "<|im_end|>"
    assert ask(tiny_model, plain)[0].prompt_tokens == ask(tiny_model, spelled)[0].prompt_tokens


def test_text_that_spells_the_end_stays_text_for_t5(tiny_t5: Path) -> None:
    assert ask(tiny_t5, "xxxx")[0].prompt_tokens == ask(tiny_t5, "</s>")[0].prompt_tokens == 5  # the end included


def test_an_encoder_decoder_reads_the_contents_joined_by_blank_lines(tiny_t5: Path) -> None:
    messages: list[Message] = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]

    async def use(engine: HfEngine) -> tuple[bytes, bytes]:
        return engine.prompt_key(messages), engine.prompt_key(user("a\n\nb"))

    joined, same = with_engine(tiny_t5, use)
    assert joined == same


@pytest.mark.parametrize(("fixture", "longest"), [("tiny_model", 1023), ("tiny_t5", 512)])
def test_the_longest_prompt_that_fits_is_answered_and_one_more_is_rejected(
    fixture: str, longest: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(fixture)
    overhead = ask(model, "x")[0].prompt_tokens - 1
    [completion] = ask(model, "x" * (longest - overhead), SamplingConfig(temperature=0, max_tokens=4))
    assert completion.prompt_tokens == longest
    if fixture == "tiny_model":  # one position is left
        assert (completion.completion_tokens, completion.finish_reason) == (1, "length")
    with pytest.raises(RequestRejected, match=f"the prompt has {longest + 1} tokens") as caught:
        ask(model, "x" * (longest - overhead + 1))
    assert caught.value.reason == RejectReason.PROMPT_TOO_LONG


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_t5"])
def test_a_stream_is_the_answer_in_pieces(fixture: str, request: pytest.FixtureRequest) -> None:
    async def use(engine: HfEngine) -> tuple[list[str], str]:
        [completion] = await engine.generate(user("hello"), GREEDY)
        return await collect(engine, "hello", GREEDY), completion.text

    pieces, text = with_engine(request.getfixturevalue(fixture), use)
    assert "".join(pieces) == text


def test_a_stream_never_shows_the_stop_string(tiny_model: Path) -> None:
    async def use(engine: HfEngine) -> tuple[list[str], str]:
        [whole] = await engine.generate(user("hello"), GREEDY)
        return await collect(engine, "hello", GREEDY.model_copy(update={"stop": [whole.text[4:6]]})), whole.text

    pieces, text = with_engine(tiny_model, use)
    assert "".join(pieces) == text[: text.index(text[4:6])]


def test_a_stream_that_is_left_early_does_not_block_the_engine(tiny_model: Path) -> None:
    async def use(engine: HfEngine) -> list[Completion]:
        stream = engine.stream(user("hello"), SamplingConfig(temperature=1.0, max_tokens=900))
        async for _ in stream:
            break
        await stream.aclose()
        return await engine.generate(user("hello"), GREEDY)

    assert with_engine(tiny_model, use)


def test_a_failure_in_a_stream_reaches_its_reader(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(engine: HfEngine) -> None:
        monkeypatch.setattr(engine._model.model, "generate", _fail)
        with pytest.raises(TransientEngineError, match="device lost"):
            await collect(engine, "hello", GREEDY)

    with_engine(tiny_model, use)


def _fail(**_: Any) -> None:
    raise RuntimeError("device lost\nand more lines")


def test_a_failing_batch_fails_its_callers_and_not_the_engine(tiny_model: Path) -> None:
    async def use(engine: HfEngine) -> None:
        works = engine._model.model.generate
        engine._model.model.generate = _fail
        failures = await asyncio.gather(*(engine.generate(user(t), GREEDY) for t in "ab"), return_exceptions=True)
        assert [str(f) for f in failures] == ["generate failed (device lost)"] * 2
        engine._model.model.generate = works
        assert await engine.generate(user("a"), GREEDY)

    with_engine(tiny_model, use)


def test_a_batch_that_does_not_fit_is_cut_into_halves(tiny_model: Path) -> None:
    async def use(engine: HfEngine) -> None:
        works, sizes = engine._model.model.generate, []

        def scarce(**kwargs: Any) -> torch.Tensor:
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 2:
                raise torch.OutOfMemoryError("out of memory")
            return works(**kwargs)

        engine._model.model.generate = scarce
        samples = await engine.generate(user("a"), GREEDY.model_copy(update={"n": 5}))
        assert [s.sample_index for s in samples] == [0, 1, 2, 3, 4]
        assert sizes == [5, 2, 3, 1, 2]

    with_engine(tiny_model, use)


def test_a_caller_that_leaves_does_not_disturb_the_others(tiny_model: Path) -> None:
    async def use(engine: HfEngine) -> None:
        leaves = asyncio.create_task(engine.generate(user("a"), GREEDY))
        stays = asyncio.create_task(engine.generate(user("b"), GREEDY))
        await asyncio.sleep(0.02)
        leaves.cancel()
        assert (await stays)[0].completion_tokens == 12

    with_engine(tiny_model, use)


def test_closing_ends_the_requests_that_wait(tiny_model: Path) -> None:
    async def run() -> None:
        engine = HfEngine(HfEngineConfig(model=str(tiny_model), gpus=0, batch_size=1))
        await engine.start()
        waiting = [asyncio.create_task(engine.generate(user("a"), GREEDY)) for _ in range(4)]
        await asyncio.sleep(0.001)
        await engine.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(r, list | TransientEngineError) for r in results)

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(top_logprobs=5), SamplingConfig(structured=StructuredOutput(regex="a"))]
)
def test_what_it_cannot_do_is_refused(tiny_model: Path, sampling: SamplingConfig) -> None:
    with pytest.raises(RequestRejected, match="use vllm"):
        ask(tiny_model, "x", sampling)


def test_a_folder_that_holds_no_weights_is_a_config_error(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"teacher\.model: cannot load"):
        ask(tmp_path, "x")


def test_adapters_change_the_answer_and_the_identity(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path)

    async def use(engine: HfEngine) -> tuple[str, str]:
        return engine.identity, (await engine.generate(user("hello"), GREEDY))[0].text

    plain, adapted = with_engine(tiny_model, use), with_engine(tiny_model, use, adapter=str(tmp_path))
    assert plain[0] != adapted[0]
    assert plain[1] != adapted[1]


def test_a_folder_without_adapters_is_a_config_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with the adapters"):
        ask(tiny_model, "x", adapter=str(tmp_path))
