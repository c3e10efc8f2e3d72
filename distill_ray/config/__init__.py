"""The YAML as pydantic models: one model a concept, unknown keys are errors, `type:` picks a variant.

Needs no ray, torch or vllm, so `check` answers at once on any machine. `load_config` is the only way in; it turns
pydantic's errors into one `ConfigError` that names the file, the dotted key, the value and the way out.
"""

from distill_ray.config.base import Config, FilePath, Pattern
from distill_ray.config.data import DataConfig, DatasetSource, FilesDataConfig, SynthesizeDataConfig
from distill_ray.config.engine import (
    BaseEngineConfig,
    EngineConfig,
    FakeEngineConfig,
    HfEngineConfig,
    NoEngineConfig,
    OpenAIEngineConfig,
    Replicas,
    SamplingConfig,
    VllmEngineConfig,
)
from distill_ray.config.evaluate import EvaluateConfig
from distill_ray.config.generate import GenerateConfig
from distill_ray.config.mixture import MemberConfig, MixtureConfig, TeacherConfig
from distill_ray.config.plan import HardwareConfig, PlanConfig, PlannedEngineConfig, PlannedTrainingConfig
from distill_ray.config.recipe import (
    AcceptConfig,
    BaseRecipeConfig,
    ContextRecipeConfig,
    ContextSource,
    ParseConfig,
    RecipeConfig,
    SelfCritiqueRecipeConfig,
    StepByStepRecipeConfig,
)
from distill_ray.config.reward import BaseRewardConfig, ModelRewardConfig, RewardConfig
from distill_ray.config.run import RunConfig, load_config, parse_config
from distill_ray.config.serve import CalibrateConfig, EmbedderConfig, ServeConfig
from distill_ray.config.train import DeepSpeedConfig, LoraConfig, StudentConfig, TrainConfig

__all__ = [
    "AcceptConfig",
    "BaseEngineConfig",
    "BaseRecipeConfig",
    "BaseRewardConfig",
    "CalibrateConfig",
    "Config",
    "ContextRecipeConfig",
    "ContextSource",
    "DataConfig",
    "DatasetSource",
    "DeepSpeedConfig",
    "EmbedderConfig",
    "EngineConfig",
    "EvaluateConfig",
    "FakeEngineConfig",
    "FilePath",
    "FilesDataConfig",
    "GenerateConfig",
    "HardwareConfig",
    "HfEngineConfig",
    "LoraConfig",
    "MemberConfig",
    "MixtureConfig",
    "ModelRewardConfig",
    "NoEngineConfig",
    "OpenAIEngineConfig",
    "ParseConfig",
    "Pattern",
    "PlanConfig",
    "PlannedEngineConfig",
    "PlannedTrainingConfig",
    "RecipeConfig",
    "Replicas",
    "RewardConfig",
    "RunConfig",
    "SamplingConfig",
    "SelfCritiqueRecipeConfig",
    "ServeConfig",
    "StepByStepRecipeConfig",
    "StudentConfig",
    "SynthesizeDataConfig",
    "TeacherConfig",
    "TrainConfig",
    "VllmEngineConfig",
    "load_config",
    "parse_config",
]
