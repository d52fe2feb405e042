"""`RunConfig`: a whole recipe, composed of what each folder says of itself. Imports neither ray nor torch."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..cluster.config import ClusterConfig, Config, ControllerConfig, Name
from ..rollout.config import ModelReward, RewardModelSource, TextRewardConfig
from ..serve.config import ServeConfig
from .stages import DataConfig, OnlineStage, RewardModelStage, StageConfig
from .stages.adapters import trains_all, virtual


class ModelConfig(Config):
    """The model a run starts from."""

    path: str
    """A Hugging Face folder (relative to the recipe, or `prepared://…`) or a hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the architecture of the folder's config.json with fresh weights from the run's seed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen base under a GRPO adapter; wherever all weights train, and on Ray Train, they are float32."""


class PrepareConfig(Config):
    """A function `f(out: Path, seed: int)` run once, before anything else; what it writes is `prepared://`."""

    path: str
    """`file.py:function`, relative to the recipe."""
    options: dict[str, int | float | str | bool] = Field(default_factory=dict)

    @field_validator("path")
    @classmethod
    def _names_a_function(cls, path: str) -> str:
        file, _, function = path.rpartition(":")
        if not (file.endswith(".py") and function.isidentifier()):
            raise ValueError(f"{path!r} names no function: write file.py:function")
        return path


class EvaluationConfig(Config):
    """Held-out prompts asked through the served models at the end of the run."""

    data: DataConfig
    rewards: list[TextRewardConfig] = Field(min_length=1, max_length=1)
    """What counts as right: one reward, 1.0 for a right answer."""
    temperatures: tuple[Annotated[float, Field(ge=0, le=2)], ...] = (0.0, 1.0)
    """Each from 0 (greedy) to 2, as the API takes it."""
    max_tokens: int = Field(default=256, ge=1)
    concurrency: int = Field(default=64, ge=1)


class TrackingConfig(Config):
    """Where metrics go besides the run directory."""

    wandb: Literal["off", "offline", "online"] = "off"
    trackio: bool = False
    """Keep them for `trackio show` in the run's directory; needs `raylign[trackio]`."""
    prometheus: bool = True
    """Show those of the last step where Prometheus scrapes the cluster's nodes, as `ray_raylign_…`."""
    project: str = "raylign"


class RunConfig(Config):
    """One recipe. Everything that can be known to be wrong without reading a file is refused here."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    storage: str = "runs"
    """Where run directories and the registry live: a folder, relative to the working directory."""
    model: ModelConfig
    prepare: PrepareConfig | None = None
    stages: list[StageConfig] = Field(min_length=1)
    evaluation: EvaluationConfig | None = None
    serve: ServeConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    controller: ControllerConfig = ControllerConfig()

    @field_validator("storage")
    @classmethod
    def _is_a_folder(cls, storage: str) -> str:
        if "://" in storage:
            raise ValueError(f"{storage!r} is a URL: storage is a folder that all nodes see, such as runs or /mnt/runs")
        return storage

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        names = [stage_name(s) for s in self.stages]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}: give one of them a name of its own")
        served = [f"{self.name}-{n}" for n in [*names, "base"]]
        longest = max(served, key=len)
        if self.serve and len(longest) > 64:
            raise ValueError(f"{longest!r} would name a served model, but is longer than 64 characters: shorten name")
        if self.serve and self.serve.alias in served:
            raise ValueError(
                f"serve.alias {self.serve.alias!r} is the name that the run serves its "
                f"{self.serve.alias.removeprefix(f'{self.name}-')} model under: take another"
            )
        if self.evaluation and not self.serve:
            raise ValueError("evaluation asks the served models: add a serve section with an alias")
        if self.model.init == "random" and not (self.stages[0].type == "cpt" and trains_all(self.stages[0].adapter)):
            raise ValueError("model.init is random: the first stage must be cpt without an adapter, all weights train")
        paths = [self.model.path, *(s.data.path for s in self.stages)]
        paths += [self.evaluation.data.path] if self.evaluation else []
        paths += [s.held_out.path for s in self.stages if isinstance(s, RewardModelStage | OnlineStage) and s.held_out]
        paths += [source.path or "" for _, _, source in self._reward_models()]
        if not self.prepare and any(p.startswith("prepared://") for p in paths):
            raise ValueError("a path begins with prepared:// but there is no prepare section to write it")
        for index, stage in enumerate(self.stages[1:], 1):
            path = getattr(stage.adapter, "path", None)
            if path:
                raise ValueError(
                    f"stages.{index}.adapter.path {path!r}: the stages before it change the model that the "
                    "adapter was made for; give it in the first stage"
                )
        return self

    @model_validator(mode="after")
    def _virtual_tokens_come_last(self) -> "RunConfig":
        for index, stage in enumerate(self.stages):
            if not virtual(stage.adapter) or (index == len(self.stages) - 1 and not self.serve):
                continue
            what = "a later stage cannot train on from it" if index < len(self.stages) - 1 else "it cannot be served"
            raise ValueError(
                f"stages.{index}.adapter.type {stage.adapter.type}: virtual tokens are no low-rank change of weights, "  # type: ignore[union-attr]
                f"so {what}: take lora, or make it the last stage of a recipe without serve, for PEFT to load"
            )
        return self

    def _reward_models(self) -> Iterator[tuple[int, str, RewardModelSource]]:
        """What is made of reward models, rewards and critics: the index of the stage, the key, and the model."""
        for index, stage in enumerate(self.stages):
            if not isinstance(stage, OnlineStage):
                continue
            for place, reward in enumerate(stage.rewards):
                if isinstance(reward, ModelReward):
                    yield index, f"stages.{index}.rewards.{place}", reward
            if stage.critic:
                yield index, f"stages.{index}.critic", stage.critic

    @model_validator(mode="after")
    def _reward_models_come_first(self) -> "RunConfig":
        made = {stage_name(s): i for i, s in enumerate(self.stages) if isinstance(s, RewardModelStage)}
        others = {stage_name(s): s.type for s in self.stages if not isinstance(s, RewardModelStage)}
        for index, key, source in self._reward_models():
            if source.stage is None or made.get(source.stage, index) < index:
                continue
            where = f"{key}.stage {source.stage!r}"
            before = [name for name, i in made.items() if i < index]
            mend = f"there is {', '.join(before)}" if before else "add a reward_model stage before this one"
            if source.stage in made:
                raise ValueError(f"{where}: that stage comes after stages.{index}: put it before")
            if source.stage in others:
                raise ValueError(f"{where} is of type {others[source.stage]}, which makes no reward model: {mend}")
            near = get_close_matches(source.stage, before, n=1)
            raise ValueError(f"{where}: there is no such stage: {f'did you mean {near[0]!r}?' if near else mend}")
        return self

    @model_validator(mode="after")
    def _dtype_is_honoured(self, info: ValidationInfo) -> "RunConfig":
        """A plan may ask what a dtype would need that the stages do not compute in yet."""
        if self.model.dtype == "float32" or info.context == {"planning": True}:
            return self
        for index, stage in enumerate(self.stages):
            where = f"model.dtype {self.model.dtype}: stages.{index} ({stage.type})"
            if not isinstance(stage, OnlineStage):
                raise ValueError(f"{where} runs on Ray Train, where weights are float32; leave dtype out")
            if not self.stages[0].adapter:  # type: ignore[union-attr]  # the first stage is online here
                raise ValueError(
                    f"{where} trains all weights, and small updates are lost in {self.model.dtype}: they are float32; "
                    "leave dtype out, or give the stage an adapter"
                )
        return self


def stage_name(stage: StageConfig) -> str:
    """The name a stage goes by: its own, or its type."""
    return stage.name or stage.type
