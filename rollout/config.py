"""The part of a recipe that speaks of generation and rewards. Imports neither ray nor torch."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ..cluster.config import Config, ElasticWorkers, RoleResources, RolloutWorkers, WeightsConfig


class SamplingConfig(Config):
    """How completions are drawn; a `grpo` stage takes only settings whose log-probs its trainer mirrors."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps every token."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keeps tokens at least this fraction as likely as the likeliest; 0 keeps every token."""
    max_tokens: int = Field(default=256, ge=1)


class EnvironmentBase(Config):
    """What answers the policy between its turns, in processes of its own."""

    turns: int = Field(default=4, ge=1)
    """Messages of the policy in an episode, at most; all of its tokens and observations are within `max_tokens`."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """For one answer."""
    processes: int = Field(default=1, ge=1)
    """Of each rollout worker: so many episodes are answered at once."""


class ToolsConfig(EnvironmentBase):
    """Python functions that the policy may call by its chat template, until it says something without a call."""

    type: Literal["tools"] = "tools"
    functions: list[str] = Field(min_length=1)
    """Each by file (`calculator.py:calculate`) or import path, with annotations and a docstring for the policy."""


class PythonEnvironmentConfig(EnvironmentBase):
    """A class with `step(messages, row) -> (observation, reward, done)`; see `raylign.rollout.environments`."""

    type: Literal["python"] = "python"
    path: str


EnvironmentConfig = Annotated[ToolsConfig | PythonEnvironmentConfig, Field(discriminator="type")]


class RolloutConfig(Config):
    """The rollout role: which engine, how many workers, how many completions a prompt."""

    engine: Literal["native", "vllm"] = "native"
    """`vllm` is faster on GPUs, and does not repeat a run bit for bit."""
    python: str | None = None
    """The Python that rollout actors run in, of another environment (`../.venv-vllm/bin/python`); ours by default."""
    exact: bool = True
    """Prove at every worker's start that tokens do not depend on which rows run together. `false` lets torch's own
    operations, too, use all CPUs of the worker, and a repetition may differ."""
    workers: RolloutWorkers = RolloutWorkers()
    group_size: int = Field(default=8, ge=2)
    """Completions per prompt; an advantage compares them with each other."""
    sampling: SamplingConfig = SamplingConfig()
    environment: EnvironmentConfig | None = None
    """Episodes of several turns; without it a completion is one message."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    slots: int = Field(default=64, ge=8)
    """Rows a worker decodes at once (at least 8, so that a row's arithmetic does not depend on its company)."""
    resources: RoleResources = RoleResources()
    timeout_seconds: float = Field(default=600.0, gt=0)
    """How long one group, or loading new weights, may take before the worker counts as lost and is replaced."""
    health_seconds: float = Field(default=30.0, gt=0)
    """How long a worker may give no sign of life (a stopped process, a node without network) before it is replaced."""

    @property
    def is_exact(self) -> bool:
        """Whether the tokens are the same bits for any workers: those of the native engine on CPUs, which prove it."""
        return self.exact and self.engine == "native" and not self.resources.gpus

    weights: WeightsConfig = WeightsConfig()

    @model_validator(mode="after")
    def _fleet_fits_transport(self) -> "RolloutConfig":
        if self.weights.transport != "nccl":
            return self
        low, high = self.workers.min, self.workers.max
        if low != high:
            raise ValueError(
                f"weights.transport nccl needs a fixed fleet and workers are {low} to {high}: write workers: {high}, "
                "or take object_store"
            )
        if self.resources.gpus < 1:
            raise ValueError(
                f"weights.transport nccl needs a GPU in every worker and resources.gpus is {self.resources.gpus:g}: "
                "write 1, or take object_store"
            )
        return self

    @model_validator(mode="after")
    def _vllm_draws_so(self) -> "RolloutConfig":
        temperature = self.sampling.temperature
        if self.engine == "vllm" and not (temperature == 0 or 0.01 <= temperature <= 2):
            raise ValueError(f"sampling.temperature {temperature:g}: vLLM draws at 0.01 to 2, or 0: take engine native")
        return self


class RewardBase(Config):
    """What all rewards share."""

    name: str | None = None
    """The name in metrics; the type, or the function's or the stage's name, by default."""
    weight: float = 1.0


class TextRewardBase(RewardBase):
    """A reward that reads a completion's text, in a process of its own."""

    timeout_seconds: float = Field(default=10.0, gt=0)
    """Per completion; a reward that takes longer counts as an error (math: as 0, since models do write `10^10^10`)."""


class FunctionReward(TextRewardBase):
    """A Python function `f(completion: str, row: dict) -> float`, by file (`rewards.py:exact`) or import path."""

    type: Literal["function"] = "function"
    path: str


class FormatReward(TextRewardBase):
    """1.0 when the whole completion matches a regular expression, else 0.0."""

    type: Literal["format"] = "format"
    pattern: str


class MathReward(TextRewardBase):
    """1.0 when math-verify finds the completion's answer equal to the row's, else 0.0."""

    type: Literal["math"] = "math"
    answer: str = "answer"
    """The column that holds the gold answer."""
    answer_after: str | None = None
    """Take what follows the last occurrence of this mark in that column (`####` for GSM8K)."""


class RewardModelSource(Config):
    """Where a reward model comes from: a stage, or a folder."""

    stage: str | None = None
    """A `reward_model` stage of this recipe that comes before."""
    path: str | None = None
    """A folder with a sequence-classification model of one label, on the policy's tokenizer."""


class ModelReward(RewardBase, RewardModelSource):
    """The number that a reward model gives to prompt and completion, as it is: no scale, no bounds."""

    type: Literal["model"] = "model"

    @model_validator(mode="after")
    def _has_one_source(self) -> "ModelReward":
        if (self.stage is None) == (self.path is None):
            given = "both stage and path" if self.stage else "neither stage nor path"
            raise ValueError(f"{given}: name the reward_model stage that makes the model, or the folder that holds it")
        return self


class ExactReward(TextRewardBase):
    """1.0 when the completion, without white space around it, is the row's answer, else 0.0."""

    type: Literal["exact"] = "exact"
    answer: str = "answer"
    """The column that holds the gold answer."""
    answer_after: str | None = None
    """Take what follows the last occurrence of this mark in that column."""
    completion_after: str | None = None
    """Take what follows the last occurrence of this mark in the completion; one without it scores 0."""


class JsonSchemaReward(TextRewardBase):
    """1.0 when the completion is JSON that a JSON Schema allows, else 0.0; references to elsewhere are not followed."""

    type: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, Any]
    """Draft 2020-12, unless its `$schema` names another."""

    @model_validator(mode="after")
    def _is_a_schema(self) -> "JsonSchemaReward":
        from .rewards.json_schema import schema_fault

        if fault := schema_fault(self.json_schema):
            raise ValueError(f"json_schema is no JSON Schema: {fault}")
        return self


class LengthReward(RewardBase):
    """0 up to `max_tokens - buffer` tokens, then down in a line to -1 at `max_tokens` (DAPO's soft overlong punishment,
    2503.14476, equation 13)."""

    type: Literal["length"] = "length"
    max_tokens: int = Field(ge=1)
    buffer: int = Field(ge=1)

    @model_validator(mode="after")
    def _buffer_fits(self) -> "LengthReward":
        if self.buffer > self.max_tokens:
            raise ValueError(f"buffer {self.buffer} is more than max_tokens {self.max_tokens}")
        return self


class ConcurrentRewardBase(RewardBase):
    """A reward that has many completions under way at once in each scorer."""

    concurrency: int = Field(default=2, ge=1, le=1024)
    """Completions under way at once, of each scorer."""
    timeout_seconds: float = Field(default=10.0, gt=0)
    """For one try at a completion."""
    retries: int = Field(default=3, ge=0)
    """More tries where the machine or the service failed: with pauses that double, or as long as the service says."""


class CodeReward(ConcurrentRewardBase):
    """1.0 when the completion's code passes the row's tests, else 0.0; both run in a sandbox or not at all.

    The code is the completion's last fenced block, else all of it. Too slow, too much memory or output is a 0.
    """

    type: Literal["code"] = "code"
    tests: str = "test"
    """The column with the tests: Python source, or a list of statements."""
    entry_point: str | None = None
    """The column with the name of the function that the tests' `check` is given, as HumanEval has it."""
    prefix: str | None = None
    """The column with code that stands before the completion's, and which the tests may use too."""
    memory_mb: int = Field(default=512, ge=64)
    output_kb: int = Field(default=1024, ge=1)


class RemoteRewardBase(ConcurrentRewardBase):
    """A reward that somebody answers over HTTP."""

    url: str
    """`http://` or `https://`."""
    allow_private: bool = False
    """Also of addresses that are no public ones (loopback, private networks, link-local)."""
    key_env: str | None = None
    """The variable of the scorer's environment that has the bearer token."""
    concurrency: int = Field(default=64, ge=1, le=1024)
    timeout_seconds: float = Field(default=60.0, gt=0)
    max_bytes: int = Field(default=1 << 20, ge=1)
    """Of an answer; a longer one is an error, and no more of it is read."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address: write http://host:port/path or https://…")
        if parts.username or parts.password:
            raise ValueError("the address has a password in it: put the key into a variable and name it in key_env")
        return url


class HttpReward(RemoteRewardBase):
    """`POST {"completion": …, "row": …}`, and the answer `{"score": number}`."""

    type: Literal["http"] = "http"


class JudgeReward(RemoteRewardBase):
    """A language model's score, 0 to 1, of how well a completion keeps to written principles (2212.08073, 2309.00267).

    The answer's last line is to be `Score: N`, N from 0 to 10; another answer is asked for again, and counted.
    """

    type: Literal["judge"] = "judge"
    url: str
    """An OpenAI-compatible API, such as `http://127.0.0.1:8000/v1`."""
    model: str
    principles: list[str] = Field(min_length=1)
    question: str = "prompt"
    """The column with what was asked: text or messages."""
    max_tokens: int = Field(default=512, ge=1)


TextReward = FunctionReward | FormatReward | MathReward | ExactReward | JsonSchemaReward
TextRewardConfig = Annotated[TextReward, Field(discriminator="type")]
ConcurrentReward = CodeReward | HttpReward | JudgeReward
RewardConfig = Annotated[TextReward | ModelReward | LengthReward | ConcurrentReward, Field(discriminator="type")]


class ScoringConfig(Config):
    """The reward role: how many scorers, and what a reward that fails means for its group."""

    workers: ElasticWorkers = ElasticWorkers()
    on_error: Literal["fail", "drop", "zero"] = "fail"
    resources: RoleResources = RoleResources(cpus=0.5)
