"""Check: everything that can be found wrong before anything is paid for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import httpx
import ray

from distill_ray.config import (
    MixtureConfig,
    OpenAIEngineConfig,
    RunConfig,
    StepByStepRecipeConfig,
    SynthesizeDataConfig,
    VllmEngineConfig,
)
from distill_ray.config.engine import EngineConfig, FakeEngineConfig, HfEngineConfig, NoEngineConfig
from distill_ray.config.reward import JudgeRewardConfig, RewardConfig, RewardModelConfig
from distill_ray.config.train import TopkKlConfig
from distill_ray.engines import make_engine
from distill_ray.errors import ConfigError, DataError, InputError, first_line, raise_all
from distill_ray.model_files import in_store
from distill_ray.models import (
    Prompts,
    is_encoder_decoder,
    load_model_config,
    load_tokenizer,
    prompts_of,
    require_safetensors,
    resolve_model,
)
from distill_ray.object_store import try_out
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.evaluate import require_evaluation_engine
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.helpers import require_generation, reward_of
from distill_ray.pipeline.judging import comparison_of
from distill_ray.pipeline.planning.plan import find_files, plan_rows
from distill_ray.pipeline.progress import say
from distill_ray.pipeline.synthesize import Requests
from distill_ray.pipeline.training.gang import available_gang
from distill_ray.recipes import Recipe, make_recipe
from distill_ray.recipes.template import columns_of
from distill_ray.rewards.judge import JudgeReward
from distill_ray.rewards.labels import OwnModelReward, require_chat_template, require_head, require_labels

SAMPLE_ROWS = 100
ANSWER_S = 5.0  # for a server to say anything


def check(config: RunConfig, *others: Iterator[str]) -> Iterator[str]:
    """Yield one line per thing found in order.

    Args:
        config: the whole YAML.
        others: checks of what is not known here.

    Raises:
        InputError: what is wrong, all of it; a broken teacher does not hide a broken student.
    """
    wrong: list[InputError] = []
    recipe = None
    try:
        recipe = make_recipe(config.recipe)
        yield f"recipe `{config.recipe.type}`: template and context"
        yield from recipe_warnings(config)
    except InputError as error:
        wrong.append(error)
    asked = check_teacher(config), check_reward(config), check_evaluation(config)
    for part in (_check_data(config, recipe), *asked, check_student(config), *others):
        try:
            yield from part
        except InputError as error:
            wrong.append(error)
    raise_all(wrong)
    with connected():
        yield check_resources(config)


def check_places(config: RunConfig, run_dir: str | None) -> Iterator[str]:
    """Whether files can be written where a store is to keep them: the run, a service's pairs and bundles.

    Args:
        config: the whole YAML.
        run_dir: of the run, if that is known.

    Raises:
        InputError: where they cannot, all of it.
    """
    store, wrong = config.serve.collect.store, list[InputError]()
    places = {"--run-dir": run_dir, "serve.bundles": config.serve.bundles}
    if store.type == "lance":
        places["serve.collect.store.url"] = store.url
    for key, url in places.items():
        if url is None or "://" not in url:
            continue
        try:
            try_out(url)
        except Exception as error:  # each store's client has exceptions of its own
            wrong.append(ConfigError(f"{key}: {url}: cannot be used: {first_line(error)}"))
        else:
            yield f"{key}: {url}: can be written and read"
    raise_all(wrong)


def recipe_warnings(config: RunConfig) -> list[str]:
    """What is allowed and hardly meant: a prompt that is the same for every row."""
    recipe = config.recipe
    names = ["query"] if hasattr(recipe, "query") else []
    if isinstance(recipe, StepByStepRecipeConfig) and recipe.mode == "task_prefix":
        names += ["label_prompt", "rationale_prompt"]
    said = "names no column, so it is the same for every row; columns are written as {{ column }}"
    return [f"warning: recipe.{name}: {said}" for name in names if not columns_of(getattr(recipe, name))]


def _check_data(config: RunConfig, recipe: Recipe | None) -> Iterator[str]:
    """Its first rows (without a recipe only its files), or what the teacher will be asked to write.

    Raises:
        InputError: all that is wrong.
    """
    if isinstance(config.data, SynthesizeDataConfig):
        Requests(config.data)
        yield f"data: the teacher will write {config.data.count} queries, in {config.data.calls_needed} calls or more"
        return
    if recipe is None:
        yield f"data: {find_files(config)} files found (their rows were not read)"
        return
    with tempfile.TemporaryDirectory(prefix="distill-ray-check-") as scratch:
        plan = plan_rows(config, recipe, RunFolder(scratch), limit=SAMPLE_ROWS)
        bad, first = _problems(RunFolder(scratch))
    if bad == plan.rows_in:
        raise DataError(f"data: none of the {bad} first rows can be used, for example {first}")
    yield f"data: {plan.rows_in} first rows read, {bad} of them unusable" + (f", for example {first}" if bad else "")


def check_student(config: RunConfig) -> Iterator[str]:
    """What the student's training needs of its model. Raises ConfigError."""
    student = config.student
    _say_if_from_hub(student.model, "student.model")
    prompts = prompts_of(student, key="student.model")
    require_safetensors(student.model, key="student.model")
    require_evaluation_engine(config)
    if isinstance(config.train.loss, TopkKlConfig):
        for key, engine in config.teachers.items():
            if isinstance(engine, VllmEngineConfig | HfEngineConfig):
                _require_same_tokens(prompts_of(engine, key=f"{key}.model"), prompts)
    yield f"student `{student.model}`: tokenizer, chat template and weights"


def _require_same_tokens(teacher: Prompts, student: Prompts) -> None:
    """Raises ConfigError: a token id means one text to the teacher and another to the student."""
    theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    different = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if different:
        raise ConfigError(
            f"train.loss: topk_kl needs one tokenizer for both, and teacher and student differ in {len(different)} "
            f"tokens (for example {different[0]!r}); take a student of the teacher's family, or cross_entropy"
        )


def check_resources(config: RunConfig) -> str:
    """What the stages ask Ray for, held against what there is. Raises ConfigError."""
    require_generation(config)
    available_gang(config)
    resources = ray.cluster_resources()
    return f"Ray: {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs are enough to start"


def _problems(folder: RunFolder) -> tuple[int, str]:
    """How many planned rows are unusable, and the first of them in words."""
    tables = folder.read_tables("rows", columns=["source", "reject_reason", "reject_detail"])
    bad = [row for table in tables for row in table.to_pylist() if row["reject_reason"] is not None]
    return len(bad), "{source}: {reject_reason}: {reject_detail}".format(**bad[0]) if bad else ""


def check_teacher(config: RunConfig) -> Iterator[str]:
    """Whether it can be asked, where it is asked for anything: each member of a mixture. Raises InputError."""
    if not config.asks_teacher:
        yield "teacher: nobody is asked"
        return
    wrong: list[InputError] = []
    for key, engine in config.teachers.items():
        try:
            yield f"{key} {_check_engine(engine, key)}"
        except ConfigError as error:
            wrong.append(error)
    raise_all(wrong)
    if isinstance(config.teacher, MixtureConfig):
        yield f"teacher: each row is answered by one member: {config.teacher.model}"


def check_service(config: RunConfig) -> Iterator[str]:
    """Whether those who answer for a service can be asked: its teacher, and a student that is a server.

    Yields as `check`; a server that does not answer yet is a warning, since it may come up later.

    Raises:
        ConfigError: what is wrong with the first of them.
    """
    engines = [config.service_teacher]
    if isinstance(config.serve.student, OpenAIEngineConfig):
        engines.append(("serve.student", config.serve.student))
    for key, engine in engines:
        if isinstance(engine, NoEngineConfig):
            raise ConfigError(
                f"{key}.type: none answers nothing, and a service has to answer what its student does not; set "
                "serve.teacher (vllm, openai, hf)"
            )
        yield f"{key} {_check_engine(engine, key)}"
        if isinstance(engine, OpenAIEngineConfig) and (why := _why_no_answer(engine)) is not None:
            yield (
                f"warning: {key}.base_url: {engine.base_url} does not answer ({why}); the service starts, and does "
                "without it until it is up"
            )


def _why_no_answer(engine: OpenAIEngineConfig) -> str | None:
    """Any answer of a server is one, a refusal too."""
    try:
        response = httpx.get(f"{engine.base_url}/models", timeout=ANSWER_S, trust_env=False)
    except httpx.HTTPError as error:
        return type(error).__name__
    return f"HTTP {response.status_code}" if response.status_code >= 500 else None


def check_judge(config: RunConfig) -> Iterator[str]:
    """Whether who compares answers can be asked, where somebody is. Raises ConfigError."""
    if config.calibrate.metric == "judge":
        key, engine = config.calibration_judge
        yield f"judge {_check_engine(engine, key)}"


def check_evaluation(config: RunConfig) -> Iterator[str]:
    """Whether who judges the student can be asked, where somebody is to. Raises ConfigError."""
    yield from evaluation_warnings(config)
    if "win_rate" in config.evaluate.metrics:
        comparison_of(config)  # its prompt
        key, engine = config.evaluation_judge
        yield f"judge of the evaluation: {_check_engine(engine, key)}"


def evaluation_warnings(config: RunConfig) -> list[str]:
    """What is allowed and hardly meant: a student that nothing can be known of, a judge that nobody asks."""
    found = []
    if config.data.holdout == 0 and config.data.test is None:
        found.append(
            "warning: data.holdout is 0 and data.test is missing, so no row is left to evaluate the student on: `run` "
            "will stop after the training; set one of them"
        )
    if "win_rate" not in config.evaluate.metrics and (config.evaluate.judge or config.evaluate.judge_prompt):
        key = "judge" if config.evaluate.judge else "judge_prompt"
        found.append(f"warning: evaluate.{key} is for win_rate, which evaluate.metrics does not have; nobody judges")
    return found


def check_reward(config: RunConfig) -> Iterator[str]:
    """Whether it can be asked, where the recipe has one. Raises ConfigError."""
    reward = reward_of(config)
    if reward is not None:
        yield f"reward {_check_reward(reward)}"


def _check_reward(reward: RewardConfig) -> str:
    if isinstance(reward, JudgeRewardConfig):
        JudgeReward(reward)  # its prompt
        if reward.engine is None:
            return "`judge`: the teacher"
        return f"`judge`: {_check_engine(reward.engine, 'recipe.reward.engine')}"
    if not isinstance(reward, OwnModelReward):
        return f"`{reward.type}`"
    key = "recipe.reward.model"
    _say_if_from_hub(reward.model, key)
    loaded = load_model_config(reward, key=key)
    require_head(reward, loaded.architectures or ())
    require_labels(reward, loaded.id2label)
    tokenizer = load_tokenizer(reward, key=key)
    if isinstance(reward, RewardModelConfig):
        require_chat_template(reward, tokenizer.chat_template)
    require_safetensors(reward.model, key=key)
    return f"`{reward.type}`: {reward.model} has {', '.join(loaded.id2label.values())}"


def _check_engine(engine: EngineConfig, key: str) -> str:
    """What an engine needs before it starts. `key` is the dotted config key of its section."""
    if isinstance(engine, FakeEngineConfig | NoEngineConfig):
        return f"`{engine.type}`"
    if isinstance(engine, OpenAIEngineConfig):
        if engine.api_key_env and not os.environ.get(engine.api_key_env):
            raise ConfigError(
                f"{key}.api_key_env: the environment variable {engine.api_key_env} is not set; "
                f"run `export {engine.api_key_env}=...` (for a Ray job: env_vars in its runtime environment), "
                "or set `api_key_env: null` for a server without keys"
            )
        return f"`{engine.model}` at {engine.base_url}: key is set (the server was not asked)"
    if not isinstance(engine, VllmEngineConfig | HfEngineConfig):  # of another package, which knows what to look at
        return f"`{engine.type}`: {make_engine(engine).identity} (nothing else was checked)"
    _say_if_from_hub(engine.model, f"{key}.model")
    prompts_of(engine, key=f"{key}.model")
    if isinstance(engine, VllmEngineConfig) and is_encoder_decoder(engine, key=f"{key}.model"):
        raise ConfigError(f"{key}: vLLM runs no encoder-decoder models, and {engine.model} is one; take type hf")
    if isinstance(engine, VllmEngineConfig):
        _require_vocabulary(engine, key)
    if not (isinstance(engine, VllmEngineConfig) and "load_format" in engine.engine_kwargs):
        require_safetensors(engine.model, key=f"{key}.model")
    where = f"{engine.num_gpus} GPUs per replica" if engine.num_gpus else "CPU"
    pool = f", {engine.replicas.min} to {engine.replicas.max} replicas" if isinstance(engine, VllmEngineConfig) else ""
    return f"`{engine.model}` on {engine.type}: tokenizer and chat template; {where}{pool}"


def _require_vocabulary(engine: VllmEngineConfig, key: str) -> None:
    """Raises ConfigError: more alternatives per token than there are tokens, of which vLLM's engine would die."""
    vocabulary = load_model_config(engine, key=f"{key}.model").get_text_config().vocab_size
    if engine.sampling.top_logprobs > vocabulary:
        raise ConfigError(
            f"{key}.sampling.top_logprobs: {engine.sampling.top_logprobs}, and {engine.model} has a vocabulary of "
            f"{vocabulary} tokens; lower it (20 is a good start)"
        )


def _say_if_from_hub(model: str, key: str) -> None:
    """Without a network that takes a while to fail."""
    if not in_store(model) and resolve_model(model, key=key) == model and not os.path.isdir(model):
        say(f"{key}: looking for {model} on the Hugging Face hub or in its cache")
