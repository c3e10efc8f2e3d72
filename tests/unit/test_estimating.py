"""The arithmetic of `plan`, against numbers that were worked out by hand or are printed in papers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config import HardwareConfig, LoraConfig, PlannedEngineConfig, StudentConfig, parse_config
from distill_ray.errors import ConfigError
from distill_ray.pipeline.estimating.calls import Lengths, asks, learnt
from distill_ray.pipeline.estimating.engines import Load
from distill_ray.pipeline.estimating.figures import best
from distill_ray.pipeline.estimating.hardware import GIB, GPUS, gpu_of
from distill_ray.pipeline.estimating.memory import EngineSetup, TrainingSetup
from distill_ray.pipeline.estimating.remedies import engine_remedies, training_remedies
from distill_ray.pipeline.estimating.sizes import ModelSize, model_size
from distill_ray.pipeline.estimating.speed import flops_per_trained_token, on_gpus
from distill_ray.student.load import load_student
from distill_ray.student.size import count_parameters
from tests.unit.big_models import QWEN_7B, QWEN_30B_A3B, make_folder

QWEN = ModelSize(
    name="7B",
    parameters=7_615_616_512,
    active_parameters=7_615_616_512,
    adapter_parameters=80_740_352,
    weight_bytes=0,
    dtype_bytes=2,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    latent=0,
    hidden=3584,
    intermediate=18944,
    vocabulary=152064,
    positions=32768,
    head_is_separable=True,
)


def engine(**changes: Any) -> EngineSetup:
    setup = EngineSetup(
        size=QWEN,
        gpu=GPUS["A100-80GB"],
        tensor=1,
        pipeline=1,
        utilisation=0.9,
        weight_bytes=15_231_233_024,
        cache_dtype_bytes=2,
        max_model_len=8192,
        max_num_seqs=4096,
    )
    return dataclasses.replace(setup, **changes)


def training(**changes: Any) -> TrainingSetup:
    setup = TrainingSetup(
        size=QWEN,
        gpu=GPUS["A100-80GB"],
        workers=1,
        zero_stage=2,
        offload_optimizer=False,
        lora=False,
        dtype_bytes=2,
        max_tokens_per_batch=16384,
        gradient_checkpointing=False,
        completion_share=0.5,
    )
    return dataclasses.replace(setup, **changes)


def named(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(model=str(folder), revision=None, trust_remote_code=False)


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_a_model_is_counted_from_its_config_alone(tmp_path: Path) -> None:
    size = model_size(named(make_folder(tmp_path / "7b", QWEN_7B)), key="teacher.model")
    assert size.parameters == 7_615_616_512  # the sum that its safetensors index on the hub comes to, in bf16
    assert (size.num_layers, size.num_kv_heads, size.head_dim) == (28, 4, 128)


def test_of_a_mixture_a_token_uses_some_experts(tmp_path: Path) -> None:
    size = model_size(named(make_folder(tmp_path / "moe", QWEN_30B_A3B)), key="teacher.model")
    assert size.parameters == pytest.approx(30.5e9, rel=0.002)  # its model card: 30.5 B in total, 3.3 B activated
    assert size.active_parameters == pytest.approx(3.3e9, rel=0.02)


def test_of_a_quantised_model_the_index_says_what_it_weighs(tmp_path: Path) -> None:
    config = QWEN_7B | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    size = model_size(named(make_folder(tmp_path / "awq", config, stored_bytes=5_570_000_000)), key="teacher.model")
    assert size.weight_bytes == 5_570_000_000
    bare = model_size(named(make_folder(tmp_path / "bare", config)), key="teacher.model")
    assert bare.weight_bytes == 7_615_616_512 / 2


def test_an_architecture_that_nobody_knows_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any) -> None:
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr("distill_ray.pipeline.estimating.sizes.count_parameters", unknown)
    stored = make_folder(tmp_path / "stored", QWEN_7B, stored_bytes=15_000_000_000)
    assert model_size(named(stored), key="teacher.model").parameters == 7_500_000_000
    with pytest.raises(ConfigError, match=r"teacher.model: nothing says how large"):
        model_size(named(make_folder(tmp_path / "bare", QWEN_7B)), key="teacher.model")


@pytest.mark.parametrize("lora", [LoraConfig(rank=8), LoraConfig(rank=4, target_modules=["q_proj", "v_proj"])], ids=str)
def test_adapters_are_as_many_as_peft_makes(lora: LoraConfig) -> None:
    model = load_student(StudentConfig(lora=lora), dtype=torch.float32, seed=0)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model.config, lora).adapters == trainable


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_token_of_the_cache_takes_what_vllm_says() -> None:
    assert engine().cache_per_token == 57_344  # 2 x 28 layers x 4 heads x 128 x 2 bytes
    assert engine(tensor=2).cache_per_token == 28_672
    assert engine(tensor=7).cache_per_token == 14_336  # more GPUs than heads: each has one
    assert engine(pipeline=4).cache_per_token == 14_336
    assert engine(cache_dtype_bytes=1).cache_per_token == 28_672


def test_sequences_fill_what_weights_leave() -> None:
    # 0.9 x 79.1 GiB - 15.23 GB - 2 GiB = 59,060,963,778 bytes, and 1,000 tokens in blocks of 16 are 57,802,752
    assert engine().concurrent(1000) == 1021
    # 512 of them are there once: 29,360,128 bytes; each sequence has 488 of its own, 496 in blocks: 28,442,624
    assert engine().concurrent(1000, shared=512) == 2075
    assert engine(max_num_seqs=256).concurrent(1000) == 256


def test_an_engine_starts_only_with_room_for_one_whole_sequence() -> None:
    small = GPUS["L4"]  # 0.9 x 22 GiB = 19.8; weights 14.19, overhead 2: 3.61 GiB are 67,680 tokens in whole blocks
    assert engine(gpu=small, max_model_len=67_680).fits
    assert not engine(gpu=small, max_model_len=67_681).fits
    assert engine(gpu=small).longest() == 67_680


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_shards_what_its_paper_says(stage: int, gigabytes: float) -> None:
    """Figure 1 of arXiv 1910.02054: 7.5 B parameters, 64 workers, K = 12."""
    size = dataclasses.replace(QWEN, parameters=7_500_000_000)
    parts = training(size=size, workers=64, zero_stage=stage).parts
    bucket = 1.0 if stage else 0.0  # 500 M elements in bf16 while they are reduced
    gathered = 2.0 if stage == 3 else 0.0  # 1 B parameters in bf16 while they are used
    state = sum(parts[name] for name in ("weights", "gradients", "optimizer")) / 1e9
    assert state - bucket - gathered == pytest.approx(gigabytes, abs=0.06)


def test_adapters_leave_the_model_without_gradients_and_optimizer() -> None:
    parts = training(lora=True, zero_stage=0).parts
    assert parts["weights"] == 2 * (7_615_616_512 + 80_740_352)
    assert (parts["gradients"], parts["optimizer"]) == (2 * 80_740_352, 12 * 80_740_352)
    assert training(offload_optimizer=True).parts["optimizer"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_what_autograd_saves(dtype: torch.dtype, kv_heads: int) -> None:
    """Of two more layers, so that what is outside the layers does not count."""

    def saved(num_layers: int) -> float:
        from transformers import AutoModelForCausalLM, LlamaConfig

        shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "vocab_size": 64}
        config = LlamaConfig(**shape, num_hidden_layers=num_layers, num_key_value_heads=kv_heads)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.get_decoder()(input_ids=torch.zeros((4, 256), dtype=torch.int64), use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())

    size = dataclasses.replace(
        QWEN, num_layers=2, hidden=256, intermediate=768, num_heads=4, num_kv_heads=kv_heads, head_dim=64
    )
    setup = training(size=size, max_tokens_per_batch=1024, dtype_bytes=dtype.itemsize)
    assert setup.parts["activations"] == pytest.approx(saved(4) - saved(2), rel=0.01)


def test_checkpointing_keeps_inputs_and_one_whole_layer() -> None:
    whole, kept = training().parts["activations"], training(gradient_checkpointing=True).parts["activations"]
    assert kept == whole / 28 + 28 * 2 * 3584 * 16384


def test_logits_are_of_completions_alone_where_the_head_is_separable() -> None:
    assert training(completion_share=0.25).parts["logits"] == 0.25 * 16384 * 152064 * 12
    whole = dataclasses.replace(QWEN, head_is_separable=False)
    assert training(size=whole, completion_share=0.25).parts["logits"] == 16384 * 152064 * 12


gpus = st.sampled_from(sorted(GPUS.values(), key=lambda gpu: gpu.memory))


@given(gpu=gpus, tensor=st.integers(1, 16), pipeline=st.integers(1, 8), tokens=st.integers(16, 100_000))
def test_more_gpus_never_hold_less(gpu: Any, tensor: int, pipeline: int, tokens: int) -> None:
    setup = engine(gpu=gpu, tensor=tensor, pipeline=pipeline, max_model_len=tokens)
    for more in (dataclasses.replace(setup, tensor=tensor + 1), dataclasses.replace(setup, pipeline=pipeline + 1)):
        assert more.needed <= setup.needed
        assert more.concurrent(tokens) >= setup.concurrent(tokens)


@given(
    workers=st.integers(1, 64),
    stage=st.integers(0, 3),
    lora=st.booleans(),
    checkpointing=st.booleans(),
    tokens=st.integers(8, 65536),
)
def test_more_workers_smaller_batches_and_checkpointing_never_need_more(
    workers: int, stage: int, lora: bool, checkpointing: bool, tokens: int
) -> None:
    setup = training(
        workers=workers, zero_stage=stage, lora=lora, gradient_checkpointing=checkpointing, max_tokens_per_batch=tokens
    )
    assert dataclasses.replace(setup, workers=workers + 1).needed <= setup.needed
    assert dataclasses.replace(setup, gradient_checkpointing=True).needed <= setup.needed
    assert dataclasses.replace(setup, max_tokens_per_batch=tokens // 2).needed <= setup.needed
    assert dataclasses.replace(setup, lora=True).needed <= setup.needed


# -- what would fit --------------------------------------------------------------------------------------------------


def test_each_way_to_fit_an_engine_is_named() -> None:
    large = engine(weight_bytes=80 * GIB, size=dataclasses.replace(QWEN, parameters=40 * GIB))
    ways = engine_remedies(large, key="teacher", plan_key="plan.teacher", longest=700)
    assert ways == [
        "teacher.gpus: 2 (tensor parallel)",
        "plan.teacher.gpu: H200",
        "teacher.model: one that is quantised to 8 bits",
    ]
    long = engine(gpu=GPUS["L4"], max_model_len=100_000)
    ways = engine_remedies(long, key="teacher", plan_key="plan.teacher", longest=700)
    assert "teacher.engine_kwargs.max_model_len: 67680 at most (the longest sampled request has 700)" in ways
    ways = engine_remedies(long, key="teacher", plan_key="plan.teacher", longest=90_000)
    assert not any("max_model_len" in way for way in ways)


def test_where_no_single_change_makes_a_training_fit_two_are_named() -> None:
    ways = training_remedies(training(gpu=GPUS["L40S"], workers=2), plan_key="plan.student", longest=8000)
    assert ways
    assert all(way.startswith("train.gradient_checkpointing: true and ") for way in ways)


# -- hardware, figures, speed ----------------------------------------------------------------------------------------


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"plan.teacher.gpu: no GPU `h10`.*did you mean H100.*L4, A10G, .*memory_gb"):
        gpu_of(HardwareConfig(gpu="h10"), key="plan.teacher")


def test_numbers_of_the_config_replace_those_of_the_table() -> None:
    own = HardwareConfig(gpu="mine", memory_gb=48, bf16_tflops=100, bandwidth_gb_per_second=500, price_per_hour=0.5)
    gpu = gpu_of(own, key="plan.teacher")
    assert (gpu.memory, gpu.flops, gpu.bandwidth, gpu.price_per_hour) == (48 * GIB, 1e14, 5e11, 0.5)
    cheap = gpu_of(HardwareConfig(gpu="H100", price_per_hour=0), key="plan.teacher")
    assert (cheap.price_per_hour, cheap.memory) == (0, GPUS["H100"].memory)


def test_measured_comes_before_given_and_given_before_estimated() -> None:
    known: dict[str, Any] = {"estimated": 1.0, "how": "a guess", "key": "plan.x"}
    assert best("x", **known).origin == "estimated"
    assert best("x", **known, given=2.0).value == 2.0
    figure = best("x", **known, given=2.0, measured=3.0, measured_in="runs/trial")
    assert (figure.value, figure.origin, figure.how) == (3.0, "measured", "runs/trial")


@pytest.mark.parametrize(
    ("lora", "checkpointing", "flops"), [(False, False, 6), (False, True, 8), (True, False, 4), (True, True, 6)]
)
def test_a_trained_token_costs_so_many_flops_per_parameter(lora: bool, checkpointing: bool, flops: int) -> None:
    assert flops_per_trained_token(10, lora=lora, gradient_checkpointing=checkpointing) == 10 * flops


def test_an_engine_reads_by_compute_and_writes_by_bandwidth() -> None:
    one = on_gpus(engine(max_num_seqs=1), 1000, 0)
    assert one.prompt == pytest.approx(312e12 * 0.4 / (2 * 7_615_616_512))
    assert one.completion == pytest.approx(2039e9 * 0.6 / (15_231_233_024 + 1000 * 57_344))
    many = on_gpus(engine(max_num_seqs=100_000, gpu=dataclasses.replace(GPUS["H200"], memory=1e15)), 16, 0)
    assert many.completion == pytest.approx(many.prompt)  # so many at once that compute decides


def test_an_api_is_paid_by_the_token() -> None:
    load = Load(requests=1000, answers=1000, prompt=2_000_000, fresh=0, completion=500_000)
    prices = PlannedEngineConfig(price_per_million_prompt_tokens=0.5, price_per_million_completion_tokens=2)
    assert prices.bill(load.prompt, load.completion) == 2.0
    assert PlannedEngineConfig(price_per_million_prompt_tokens=0.5).bill(load.prompt, load.completion) is None


# -- recipes ---------------------------------------------------------------------------------------------------------

LENGTHS = Lengths(
    prompt=100, shared=64, completion=50, critique_request=10, revision_request=20, judge_prompt=30, judge_completion=40
)


def config_of(recipe: dict[str, Any], **sampling: Any) -> Any:
    teacher = {"type": "vllm", "sampling": sampling}
    return parse_config({"recipe": recipe, "data": {"source": "x.jsonl"}, "teacher": teacher})


def test_a_context_is_asked_once_and_scored_again_where_a_part_is_learnt() -> None:
    recipe: dict[str, Any] = {"type": "context", "context": {"text": "x"}}
    [ask] = asks(config_of(recipe, n=3), LENGTHS)
    assert (ask.requests, ask.answers, ask.prompt, ask.fresh, ask.completion) == (1, 3, 100, 36, 50)
    recipe["parse"] = {"after": "so"}
    _, score = asks(config_of(recipe, top_logprobs=5), LENGTHS)
    assert (score.requests, score.prompt, score.fresh, score.completion) == (1, 150, 50, 0)


def test_a_critique_grows_by_turns_and_a_judge_is_asked_twice() -> None:
    recipe = {"type": "self_critique", "reward": {"type": "judge", "mode": "comparison"}, "rounds": 2}
    asked = asks(config_of(recipe, n=2), LENGTHS)
    assert [(ask.name, ask.requests, ask.answers, ask.prompt) for ask in asked] == [
        ("draft", 1, 2, 100),
        ("critique", 2, 1, 160),  # 100 + 50 + 10
        ("revision", 2, 1, 230),  # + 50 + 20
        ("critique", 2, 1, 290),
        ("revision", 2, 1, 360),
        ("judge", 8, 1, 130),  # 2 orders x 2 chains x 2 rounds; 30 and two answers
    ]
    restarted = asks(config_of(recipe | {"restart": True}, n=2), LENGTHS)
    assert [ask.prompt for ask in restarted] == [100, 160, 230, 160, 230, 130]


@pytest.mark.parametrize(
    ("mode", "examples", "completion"), [("task_prefix", 2, 26), ("standard", 1, 2), ("single", 1, 52)]
)
def test_step_by_step_gives_the_examples_of_its_mode(mode: str, examples: int, completion: float) -> None:
    config = config_of({"type": "step_by_step", "label_source": "teacher", "mode": mode})
    each = learnt(config, 10, 50, 2)
    assert (each.examples, each.completion) == (examples, completion)


def test_answers_that_are_in_the_data_cost_nothing() -> None:
    recipe = {"type": "step_by_step", "label_source": "teacher", "rationale_column": "why"}
    assert asks(config_of(recipe), LENGTHS) == []
