"""The whole YAML, and the one way to load it: file + `--set` overrides -> checked `RunConfig`."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from distill_ray.config.base import Config
from distill_ray.config.data import DataConfig, SynthesizeDataConfig
from distill_ray.config.engine import TOKEN_ID_SWITCHES, EngineConfig, NoEngineConfig, OpenAIEngineConfig
from distill_ray.config.evaluate import EvaluateConfig
from distill_ray.config.flywheel import FlywheelConfig
from distill_ray.config.generate import GenerateConfig
from distill_ray.config.mixture import MixtureConfig, TeacherConfig
from distill_ray.config.plan import PlanConfig
from distill_ray.config.recipe import (
    ContextRecipeConfig,
    RecipeConfig,
    SelfCritiqueRecipeConfig,
    StepByStepRecipeConfig,
)
from distill_ray.config.reward import BaseRewardConfig, JudgeRewardConfig
from distill_ray.config.serve import CalibrateConfig, ServeConfig
from distill_ray.config.train import StudentConfig, TopkKlConfig, TrainConfig
from distill_ray.errors import ConfigError
from distill_ray.plugins import Group, packages


class RunConfig(Config):
    """One distillation: recipe, data, teacher, student."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run in reports; letters, digits, dots, dashes."""

    recipe: RecipeConfig
    """What the teacher does with a row."""

    data: DataConfig
    """Where the rows come from."""

    teacher: TeacherConfig
    """Who answers: one engine, or a mixture of them."""

    student: StudentConfig = StudentConfig()
    """Who learns."""

    generate: GenerateConfig = GenerateConfig()
    """Limits and sizes of the generation stage."""

    train: TrainConfig = TrainConfig()
    """The training loop."""

    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured."""

    calibrate: CalibrateConfig = CalibrateConfig()
    """For which requests the student is as good as the teacher."""

    serve: ServeConfig = ServeConfig()
    """The endpoint in front of student and teacher."""

    flywheel: FlywheelConfig = FlywheelConfig()
    """From collected pairs to the next student."""

    plan: PlanConfig = PlanConfig()
    """What is known of GPUs, prices and speeds before anything is rented."""

    @model_validator(mode="after")
    def _engine_can_do_what_is_asked(self) -> RunConfig:
        for key, engine in self.teachers.items():
            self._require_capabilities(engine, "" if key == "teacher" else f" ({key})")
        if self.recipe.asks_teacher and isinstance(self.teacher, NoEngineConfig):
            raise ValueError(
                f"teacher: the `{self.recipe.type}` recipe asks a teacher; name one (vllm, openai, hf, fake)"
            )
        if isinstance(self.data, SynthesizeDataConfig):
            if isinstance(self.teacher, NoEngineConfig):
                raise ValueError("teacher: it writes the queries (data.type: synthesize); name one (vllm, openai, hf)")
            if self.teacher.sampling.temperature == 0:
                raise ValueError("teacher.sampling.temperature: 0 writes the same queries again and again; raise it")
        if isinstance(self.train.loss, TopkKlConfig) and not self.teacher.sampling.top_logprobs:
            raise ValueError(
                "train.loss: topk_kl trains on the teacher's log-probabilities; set teacher.sampling.top_logprobs "
                "(20 is a good start)"
            )
        if isinstance(self.train.loss, TopkKlConfig):
            self._soft_targets_arrive()
        return self

    def _require_capabilities(self, engine: EngineConfig, where: str) -> None:
        """Refuse what an engine of the teacher cannot do. `where` it stands, for the message."""
        sampling = self.teacher.sampling
        needs = {"top_logprobs": sampling.top_logprobs > 0, "structured": sampling.structured}
        for capability, needed in needs.items():
            if needed and capability not in engine.capabilities:
                raise ValueError(
                    f"teacher.sampling.{capability}: the `{engine.type}` engine{where} cannot do this; "
                    "remove it or take another teacher type"
                )
        is_parsed = isinstance(self.recipe, ContextRecipeConfig) and self.recipe.parse is not None
        if is_parsed and sampling.top_logprobs and "score" not in engine.capabilities:
            raise ValueError(
                "teacher.sampling.top_logprobs: what recipe.parse leaves of an answer is scored again for its "
                f"log-probabilities, which the `{engine.type}` engine{where} cannot do; take vllm, or no recipe.parse"
            )

    @property
    def teachers(self) -> dict[str, EngineConfig]:
        """Who answers, by dotted key: the teacher, or the members of a mixture."""
        if not isinstance(self.teacher, MixtureConfig):
            return {"teacher": self.teacher}
        return {f"teacher.members.{n}.engine": engine for n, engine in enumerate(self.teacher.engines)}

    @property
    def service_teacher(self) -> tuple[str, EngineConfig]:
        """The dotted key and the engine of who answers in a service what its student does not.

        Raises:
            ConfigError: nobody in particular. See `_the_teacher_or`.
        """
        return self._the_teacher_or("serve.teacher", self.serve.teacher)

    @property
    def calibration_judge(self) -> tuple[str, EngineConfig]:
        """The dotted key and the engine of who compares answers for calibration. Raises ConfigError: nobody."""
        return self._judge("calibrate.judge", self.calibrate.judge)

    @property
    def evaluation_judge(self) -> tuple[str, EngineConfig]:
        """The same for `evaluate.metrics: [win_rate]`. Raises ConfigError: nobody."""
        return self._judge("evaluate.judge", self.evaluate.judge)

    def _judge(self, key: str, own: EngineConfig | None) -> tuple[str, EngineConfig]:
        who, engine = self._the_teacher_or(key, own)
        if isinstance(engine, NoEngineConfig):
            raise ConfigError(f"{who}: none answers nothing, so it cannot judge; name an engine in {key}")
        return who, engine

    def _the_teacher_or(self, key: str, own: EngineConfig | None) -> tuple[str, EngineConfig]:
        if own is not None:
            return key, own
        if isinstance(self.teacher, MixtureConfig):
            raise ConfigError(
                f"{key}: missing, and the teacher, a mixture, cannot stand in: one engine has to answer here, so that "
                f"answers can be held against each other; name it in {key} (one of the members, say)"
            )
        return "teacher", self.teacher

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is asked for anything, queries included."""
        return self.recipe.asks_teacher or isinstance(self.data, SynthesizeDataConfig)

    @property
    def plugins(self) -> dict[str, str]:
        """Who answers, and what asks and scores, where other packages bring it: "recipe shout" -> "PACKAGE VERSION"."""
        reward = getattr(self.recipe, "reward", None)
        parts: list[tuple[Group, Any]] = [(Group.RECIPES, self.recipe)]
        parts += [(Group.ENGINES, engine) for engine in self.teachers.values()]
        if isinstance(reward, BaseRewardConfig):
            parts += [(Group.REWARDS, reward)]
        if isinstance(reward, JudgeRewardConfig) and reward.engine is not None:
            parts += [(Group.ENGINES, reward.engine)]
        return packages((group, part.type) for group, part in parts)

    def _soft_targets_arrive(self) -> None:
        """Refuse what would be found out when everything is paid: that no example has soft targets."""
        if isinstance(self.recipe, SelfCritiqueRecipeConfig | StepByStepRecipeConfig):
            raise ValueError(
                f"train.loss: the examples of the `{self.recipe.type}` recipe have no soft targets, which topk_kl "
                "trains on; take cross_entropy, or the `context` recipe"
            )
        for key, engine in self.teachers.items():
            if not isinstance(engine, OpenAIEngineConfig):
                continue
            missing = [name for name in TOKEN_ID_SWITCHES if not engine.extra_body.get(name)]
            if missing:
                raise ValueError(
                    "train.loss: topk_kl needs the teacher's tokens as ids, which an OpenAI-compatible server gives "
                    f"only when asked, and so far only vLLM's does; set {' and '.join(missing)} to true in "
                    f"{key}.extra_body, or take cross_entropy"
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load and check a YAML file.

    Args:
        path: the YAML. Relative paths inside it start at its folder and come back absolute.
        overrides: "dotted.key=value" strings; the value is read as YAML.

    Raises:
        ConfigError: names the file, the dotted key, the value and the way out.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror}); give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the config as UTF-8") from error
    try:
        raw = _load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    return parse_config(raw, where=str(path), base=path.parent, overrides=overrides)


def parse_config(
    raw: Any, *, where: str = "config", base: Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Check an already loaded config. See `load_config`."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected keys and values at the top level, got {_show(raw)}")
    try:
        raw = _copy(raw)
    except RecursionError as error:
        raise ConfigError(f"{where}: an anchor of the YAML (&name) contains itself; write the value out") from error
    for override in overrides:
        _apply_override(raw, override)
    _set_default_types(raw)
    folder = (base or Path()).resolve()
    _make_paths_absolute(raw, folder)
    try:
        return RunConfig.model_validate(raw, context={"folder": folder})
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(detail) for detail in error.errors()))
        raise ConfigError(f"{where}: " + "\n  ".join(lines)) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans, so that `guard: off` and a label `no` are words; and no key twice, which hides a setting."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":bool") or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """Two \\u escapes, as JSON writes an emoji, are one character; one alone is none, and no file can hold it."""
        try:
            return super().construct_scalar(node).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise yaml.MarkedYAMLError(
                problem="half of a surrogate pair, which is no character", problem_mark=node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key `{key.value}` is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """Raises ValueError, in one line: it cannot be read, be it well-formed or not (a date that there is not)."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _set_default_types(raw: dict[str, Any]) -> None:
    """A discriminator has no default of its own."""
    if isinstance(raw.get("data"), dict):
        raw["data"].setdefault("type", "files")
    teacher = raw.get("teacher")
    if isinstance(teacher, dict):
        teacher.setdefault("type", "vllm")
        members = teacher.get("members")
        for member in members if isinstance(members, list) else []:
            if isinstance(member, dict) and isinstance(member.get("engine"), dict):
                member["engine"].setdefault("type", "vllm")
    recipe = raw.get("recipe")
    if isinstance(recipe, dict):
        recipe.setdefault("type", "context")
        gold_only = recipe.get("mode") == "standard" and recipe.get("label_source", "gold") == "gold"
        in_data = recipe.get("rationale_column") is not None or recipe.get("chains") is not None
        if in_data or (gold_only and recipe["type"] == "step_by_step"):
            raw.setdefault("teacher", {"type": "none"})
    train = raw.get("train")
    if isinstance(train, dict) and isinstance(train.get("loss"), dict):
        train["loss"].setdefault("type", "cross_entropy")
    flywheel = raw.get("flywheel")
    if isinstance(flywheel, dict) and isinstance(flywheel.get("trainer"), dict):
        flywheel["trainer"].setdefault("type", "ray")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: expected dotted.key=value, for example --set train.epochs=2")
    try:
        value = _load_yaml(text)
    except ValueError as error:
        raise ConfigError(
            f"--set {override}: the value is not valid YAML: {error}; quote text that holds braces or colons: "
            f"--set '{key.strip()}=\"...\"'"
        ) from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text; everybody else reads it as a number
        value = _number_or_text(value)
    node: Any = raw
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        if isinstance(node, list):
            if not parent.isdigit() or int(parent) >= len(node):
                raise ConfigError(
                    f"--set {override}: `{parent}` is the number of no item; they are 0 to {len(node) - 1}"
                )
            node = node[int(parent)]
            continue
        if node.get(parent) is None:  # also a section with nothing in it
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: `{parent}` is not a section but the value {_show(node)}")
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: `{leaf}` is no key of a section, but of {_show(node)}; set all of it")
    node[leaf] = value


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# Keys whose value is a path or a list of them; those of one path say so by their type (`FilePath`).
_PATH_KEYS = (
    ("data", "source"),
    ("data", "validation"),
    ("data", "test"),
    ("data", "role_prompts"),
    ("data", "seeds_file"),
)
_MODEL_KEYS = (
    ("teacher", "model"),
    ("teacher", "adapter"),
    ("teacher", "members", "engine", "model"),
    ("teacher", "members", "engine", "adapter"),
    ("student", "model"),
    ("recipe", "reward", "model"),
    ("recipe", "reward", "engine", "model"),
)


def _make_paths_absolute(raw: dict[str, Any], base: Path) -> None:
    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        if isinstance(value, dict) and "dataset" in value:
            return {**value, "dataset": model(value["dataset"])}
        if not isinstance(value, str) or "://" in value or not value.strip():
            return value
        return str(base / os.path.expanduser(value))

    def model(value: Any) -> Any:
        """Only what is meant as a path ("./model"): "org/model" is a name on the hub."""
        return absolute(value) if isinstance(value, str) and value.startswith((".", "~", "/")) else value

    for keys in _PATH_KEYS:
        _rewrite(raw, keys, absolute)
    _rewrite(raw, ("data", "alongside"), lambda v: {k: absolute(s) for k, s in v.items()} if isinstance(v, dict) else v)
    for keys in _MODEL_KEYS:
        _rewrite(raw, keys, model)


def _rewrite(node: Any, keys: tuple[str, ...], change: Any) -> None:
    """Change what stands under the keys, in every item of a list on the way."""
    if isinstance(node, list):
        for item in node:
            _rewrite(item, keys, change)
    elif isinstance(node, dict) and node.get(keys[0]) is not None:
        if keys[1:]:
            _rewrite(node[keys[0]], keys[1:], change)
        else:
            node[keys[0]] = change(node[keys[0]])


def _explain(detail: ErrorDetails) -> str:
    """One pydantic error as one line: dotted key, what is wrong, the value, what to do."""
    # Behind their name pydantic puts the variant's.
    unions = {"data", "recipe", "reward", "teacher", "engine", "loss", "trainer"}
    before = ["", *map(str, detail["loc"])]
    if before[1:2] == ["plan"]:  # its `teacher` has no variants
        unions = set()
    if before[1:3] == ["serve", "student"] or before[1:3] == ["calibrate", "judge"]:
        del before[3:4]  # engines too, and the `student` of the top level is none
    parts = [part for previous, part in itertools.pairwise(before) if previous not in unions and part[:1] != "<"]
    value = detail.get("input")
    if detail["type"] == "union_tag_invalid":
        context = detail.get("ctx", {})
        tag = context["tag"]
        known = [name.strip(" '") for name in context["expected_tags"].split(",")]
        close = difflib.get_close_matches(str(tag), known, n=1)
        meant = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
        return f"{'.'.join(parts)}.type: unknown (got {_show(tag)}); {meant}"
    if parts and parts[-1] in ("str", "list[str]"):  # the branches of a union are no keys
        return f"{'.'.join(parts[:-1])}: expected text or a list of texts (got {_show(value)})"
    if before[-1] == "<file>":
        return f"{'.'.join(parts)}: expected a file, a list of files or {{dataset: NAME}} (got {_show(value)})"
    parts = [part for part in parts if part != "list[str]"]
    key = ".".join(parts) or "the config"
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key (value {_show(value, key)}); {_suggest(detail['loc'])}"
    name = parts[-1] if parts else ""  # of a key that is known: what stands above it does not make it a secret
    if detail["type"] == "missing":
        return f"{key}: missing; add it"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "string_type" and isinstance(value, dict | list):
        kind = "a section" if isinstance(value, dict) else "a list"
        return (
            f"{key}: expected text, and YAML reads this as {kind} (got {_show(value, name)}); quote text that holds a "
            f'colon, braces or brackets: {key}: "...", or --set \'{key}="..."\''
        )
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: expected a section, keys with values (got {_show(value, name)}){_way_to_write(detail, name)}"
    if detail["type"] == "list_type":
        how = f"; for one write {key}: [{value}]" if isinstance(value, str) and not _is_secret(name) else ""
        return f"{key}: expected a list (got {_show(value, name)}){how}"
    shown = f" (got {_show(value, name)})" if not isinstance(value, dict) else ""
    return f"{key}: {message}{shown}"


def _way_to_write(detail: ErrorDetails, name: str) -> str:
    """What may stand where a section belongs, and something else stands."""
    nodes = _nodes(RunConfig.model_json_schema(), detail["loc"])
    types = [n["properties"]["type"]["const"] for n in nodes if "const" in n.get("properties", {}).get("type", {})]
    if detail["input"] in types:
        return f"; write {name}: {{type: {detail['input']}, ...}}"
    ways = []
    if any("properties" in node and not node.get("required") for node in nodes):
        ways.append("{} takes the defaults")
    if any(node.get("type") == "null" for node in nodes):
        ways.append("null goes without it")
    return "".join(f"; {way}" for way in ways)


def _suggest(location: tuple[int | str, ...]) -> str:
    known = sorted(_known_keys(RunConfig.model_json_schema(), location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known keys here: {', '.join(known)}" if known else "remove it"


def _known_keys(schema: dict[str, Any], location: Sequence[int | str]) -> set[str]:
    """Names of the properties at a place of a JSON schema, every variant of a union counted in."""
    return {name for node in _nodes(schema, location) for name in node.get("properties", {})}


def _nodes(schema: dict[str, Any], location: Sequence[int | str]) -> list[dict[str, Any]]:
    """What may stand at a place of a JSON schema, every variant of a union."""

    def resolve(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return resolve(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
        options = node.get("anyOf", []) + node.get("oneOf", []) + node.get("allOf", [])
        return [leaf for option in options for leaf in resolve(option)] if options else [node]

    nodes, is_chosen = [schema], False
    for part in location:
        variants = [n for n in nodes if n.get("properties", {}).get("type", {}).get("const") == part]
        if variants and not is_chosen:  # the name of a union's variant; a key of that variant may be called the same
            nodes, is_chosen = variants, True
            continue
        is_chosen = False
        children = [n["properties"][part] for n in nodes if part in n.get("properties", {})]
        if children:
            nodes = [leaf for child in children for leaf in resolve(child)]
            continue
        items = [n["items"] for n in nodes if "items" in n] if isinstance(part, int) else []
        if items:
            nodes = [leaf for item in items for leaf in resolve(item)]
    return nodes


def _is_secret(key: str) -> bool:
    return re.search(r"key|secret|passw|url|token(?!s)", key, re.IGNORECASE) is not None


def _show(value: Any, key: str = "") -> str:
    if isinstance(value, str | dict | list) and _is_secret(key):
        return "a value that is not shown here"  # somebody may have put a secret where none belongs
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
