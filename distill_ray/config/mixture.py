"""`teacher:` as one engine, or as several that share the rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializationInfo, ValidationError, field_serializer, field_validator, model_validator

from distill_ray.config.base import Config
from distill_ray.config.engine import BaseEngineConfig, BuiltInEngineConfig, EngineConfig, Replicas, SamplingConfig
from distill_ray.plugins import Group, Variants


class MemberConfig(Config):
    """One engine of a mixture."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """It answers weight / (sum of all members' weights) of the rows."""

    engine: EngineConfig
    """Who answers. It samples as the teacher's `sampling` says, and has none of its own."""

    @field_validator("engine", mode="before")
    @classmethod
    def _is_one_engine(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        if kind == "mixture":
            raise ValueError("a mixture is no member of a mixture; write its members here, each with its weight")
        if kind == "none":
            raise ValueError("type: none answers nothing; name an engine (vllm, openai, hf, fake), or leave it out")
        return value

    @field_validator("engine")
    @classmethod
    def _samples_as_the_teacher(cls, engine: EngineConfig) -> EngineConfig:
        if "sampling" in engine.model_fields_set:
            raise ValueError(
                "`sampling` stands on the teacher, for all members, so that what the student learns is drawn in one "
                "way; move it to teacher.sampling"
            )
        return engine

    @field_serializer("engine")
    def _without_sampling(self, engine: EngineConfig, info: SerializationInfo) -> dict[str, Any]:
        return engine.model_dump(mode=info.mode, exclude={"sampling"})  # what is written can be read again

    def sampling_as(self, sampling: SamplingConfig) -> EngineConfig:
        """The engine with the teacher's sampling. Raises ValidationError: it cannot sample so."""
        return type(self.engine).model_validate({**dict(self.engine), "sampling": sampling})


class MixtureConfig(Config):
    """Several engines share the rows. Each row is answered by one of them in all its turns, whatever else changes.

    Who answers a row is decided by what it asks and by the weights (`distill_ray.engines.mixture`): a new member, or a
    new weight, moves as few rows as can be, and the others are not paid again.
    """

    type: Literal["mixture"] = "mixture"

    members: Annotated[list[MemberConfig], Field(min_length=1)]
    """Who they are. Their order means nothing. One model at two URLs is two members, which share their answers."""

    sampling: SamplingConfig = SamplingConfig()
    """How answers are sampled, by every member."""

    @property
    def engines(self) -> list[EngineConfig]:
        """The members' engines, with the teacher's sampling."""
        return [member.sampling_as(self.sampling) for member in self.members]

    @property
    def shares(self) -> list[float]:
        """Of the rows, of each member."""
        total = sum(member.weight for member in self.members)
        return [member.weight / total for member in self.members]

    @property
    def model(self) -> str:
        """All models with their shares, for people."""
        parts = zip(self.members, self.shares, strict=True)
        return ", ".join(f"{100 * share:.3g} % {member.engine.model}" for member, share in parts)

    @property
    def num_gpus(self) -> int:
        """GPUs per replica, of the member that has most."""
        return max(member.engine.num_gpus for member in self.members)

    @property
    def replicas(self) -> Replicas:
        """Engines of all members together."""
        pools = [member.engine.replicas for member in self.members]
        return Replicas(min=sum(pool.min for pool in pools), max=sum(pool.max for pool in pools))

    @model_validator(mode="after")
    def _members_can_sample_so(self) -> MixtureConfig:
        for number, member in enumerate(self.members):
            try:
                member.sampling_as(self.sampling)
            except ValidationError as error:
                why = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"member {number} (`{member.engine.type}`): {why}") from error
        return self


TeacherConfig = Annotated[BuiltInEngineConfig | MixtureConfig | BaseEngineConfig, Variants(Group.ENGINES)]
