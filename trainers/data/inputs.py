"""Everything a run reads, read and proven before any actor starts: model, tokenizer, rows, masks, rewards, overlap."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...cluster.errors import InputError
from ...rollout.chat import encode_prompt
from ...rollout.config import CodeReward, ExactReward, JudgeReward, MathReward, ModelReward, RewardConfig
from ...rollout.environments.dialogue import observation_ids
from ...rollout.environments.process import EnvironmentPool
from ...rollout.interpreter import check_interpreter
from ...rollout.rewards.functions import check_names
from ...rollout.rewards.model_folder import check_reward_model, check_same_body
from ...rollout.rewards.scorer import begin_reward
from ...serve.config import ServeConfig
from ..adapters import check_adapter
from ..config import EvaluationConfig, ModelConfig, RunConfig, stage_name
from ..recipe import resolve_prepared
from ..stages import DataConfig, DistillStage, LoraConfig, OnlineStage, RewardModelStage, StageConfig
from .mixture import Loaded, Source, load_data
from .proof import Proof, prove_stage, refuse_overlap
from .rows import Row, kind_of_stage
from .template import Tokenizer, load_tokenizer, stop_tokens
from .vocabulary import check_vocabulary


@dataclass(frozen=True, slots=True)
class StageInput:
    """The rows of one stage and the proof of what it trains on."""

    rows: list[Row]
    proof: Proof
    held_out: "StageInput | None" = None
    """What a stage is measured on: a reward model's pairs, an online stage's prompts."""
    sources: tuple[Source, ...] = ()
    """What was read of each path."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recipe reads, by stage, with the held-out rows."""

    model: Path
    tokenizer: Tokenizer
    stages: list[StageInput]
    evaluation: list[Row]


def read_inputs(config: RunConfig, run: Path, say: Callable[[str], None] = lambda _: None) -> Inputs:
    """Read and prove everything. Raises `InputError` for the first thing that is wrong; `say` is told of progress."""
    model = locate_model(config.model, run)
    tokenizer = load_tokenizer(model, chat=any(s.type != "cpt" for s in config.stages) or config.evaluation is not None)
    check_vocabulary(tokenizer, model)
    _check_adapter(config, model)
    _check_rewards(config, run, model, tokenizer)
    _check_critics(config, run, model, tokenizer)
    _check_interpreters(config)
    _check_teachers(config, run, tokenizer)
    stages = []
    for stage in config.stages:
        say(f"{stage_name(stage)}: reading {stage.data.path}")
        loaded = _rows(stage.data, run, stage, config.seed)
        _tell(loaded, stage_name(stage), say)
        tools = _tools(stage, tokenizer)
        held_out = _held_out(stage, loaded.rows, tokenizer, run, tools, config.seed)
        proof = prove_stage(stage, loaded.rows, tokenizer, tools, loaded.places)
        stages.append(StageInput(loaded.rows, proof, held_out, loaded.sources))
    asked = []
    if config.evaluation:
        say(f"evaluation: reading {config.evaluation.data.path}")
        loaded = load_data(config.evaluation.data, run, "prompt", config.seed)
        _tell(loaded, "evaluation", say)
        asked = loaded.rows
        _check_answers(config.evaluation.rewards, asked, config.evaluation.data.path)
        if config.serve:
            _check_room(config.evaluation, config.serve, asked, tokenizer)
        for stage, given in zip(config.stages, stages, strict=True):
            refuse_overlap(asked, given.rows, stage_name(stage))
    return Inputs(model, tokenizer, stages, asked)


def _check_room(evaluation: EvaluationConfig, serve: ServeConfig, rows: list[Row], tokenizer: Tokenizer) -> None:
    """Every question and its answer fit in a served row: a service would refuse the longer ones after the training."""
    for number, row in enumerate(rows, 1):
        where = f"{evaluation.data.path}, row {number}"
        try:
            tokens = len(encode_prompt(tokenizer, row["prompt"]))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if tokens + evaluation.max_tokens > serve.max_length:
            raise InputError(
                f"{where}: {tokens} prompt tokens and evaluation.max_tokens {evaluation.max_tokens} are more than "
                f"serve.max_length {serve.max_length}: raise serve.max_length or lower evaluation.max_tokens"
            )


def locate_model(model: ModelConfig, run: Path) -> Path:
    """The folder of a model; a hub id is fetched first. Raises `InputError` where there is neither."""
    path = resolve_prepared(model.path, run)
    if path.is_absolute():
        if not path.is_dir():
            raise InputError(f"no model folder at {path}{_nearest(path)}")
    else:
        path = _fetch(model.path)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model folder: it has no config.json")
    if model.init == "pretrained" and not list(path.glob("*.safetensors")):
        raise InputError(f"{path} has no *.safetensors: save the model there, or set model.init: random")
    return path


def _nearest(path: Path) -> str:
    """`: did you mean x?`, where a name beside the missing path is close to it."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    return f": did you mean {near[0]}?" if near else ""


def _check_adapter(config: RunConfig, model: Path) -> None:
    """The adapter a recipe starts from is for this model; a recipe may name one in its first stage only."""
    lora = config.stages[0].adapter
    if not isinstance(lora, LoraConfig) or lora.path is None:
        return
    folder, where = Path(lora.path), "stages.0.adapter.path"
    if not folder.is_dir():
        raise InputError(f"{where}: no adapter folder at {folder}{_nearest(folder)}")
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{where}: {folder} has no adapter_config.json: save the adapter there with save_pretrained")
    try:
        check_adapter(folder, model)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{where}: {folder} cannot be read: {error}") from None


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {hub_id!r} is no folder here and cannot be fetched from the hub: {reason}") from None


def _tell(loaded: Loaded, section: str, say: Callable[[str], None]) -> None:
    for source in loaded.sources:
        say(f"{section}: {source}")


def _rows(data: DataConfig, run: Path, stage: StageConfig, seed: int) -> Loaded:
    loaded = load_data(data, run, kind_of_stage(stage), seed)
    if isinstance(stage, OnlineStage):
        _check_answers(stage.rewards, loaded.rows, data.path)
    return loaded


def _tools(stage: StageConfig, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What the policy of a stage may call: the environment loads as it will in its workers, and its observations can
    follow the policy's messages by the chat template."""
    if not isinstance(stage, OnlineStage) or stage.rollout.environment is None:
        return []
    with EnvironmentPool(stage.rollout.environment) as environment:
        tools = list(environment.tools)
    role = "tool" if tools else "user"
    said, answer = {"role": "assistant", "content": "x"}, {"role": role, "content": "x"}
    observation_ids(tokenizer, said, [answer], sorted(stop_tokens(tokenizer)), tools)
    return tools


def _held_out(
    stage: StageConfig, rows: list[Row], tokenizer: Tokenizer, run: Path, tools: list[dict[str, Any]], seed: int
) -> StageInput | None:
    """What a stage is measured on, encoded as it trains; none of the prompts is trained on."""
    if not isinstance(stage, RewardModelStage | OnlineStage) or stage.held_out is None:
        return None
    asked = _rows(stage.held_out, run, stage, seed).rows
    refuse_overlap(asked, rows, stage_name(stage))
    proof = prove_stage(stage.model_copy(update={"data": stage.held_out}), asked, tokenizer, tools)
    proof.require()
    return StageInput(asked, proof)


def _check_rewards(config: RunConfig, run: Path, model: Path, tokenizer: Tokenizer) -> None:
    """Every reward loads as it will in its actor: in a process of its own, so that an import cannot hang us.
    The sandbox is proved, and an address that a reward may not ask is refused.

    Of a reward model the files are looked at, where they are there already.
    """
    lists = {f"stages.{i}.rewards": s.rewards for i, s in enumerate(config.stages) if isinstance(s, OnlineStage)}
    lists |= {"evaluation.rewards": config.evaluation.rewards} if config.evaluation else {}
    for where, rewards in lists.items():
        check_names(rewards)
        for index, reward in enumerate(rewards):
            if isinstance(reward, ModelReward):
                if reward.path:
                    check_reward_model(resolve_prepared(reward.path, run), model, tokenizer, f"{where}.{index}.path")
                continue
            with closing(begin_reward(reward, Path("/"))) as begun:
                begun.wait_ready()


def _check_critics(config: RunConfig, run: Path, model: Path, tokenizer: Tokenizer) -> None:
    """The reward models that critics start from, where they are there already."""
    for index, stage in enumerate(config.stages):
        if isinstance(stage, OnlineStage) and stage.critic and stage.critic.path:
            folder, where = resolve_prepared(stage.critic.path, run), f"stages.{index}.critic.path"
            check_reward_model(folder, model, tokenizer, where)
            check_same_body(folder, model, where)


def _check_teachers(config: RunConfig, run: Path, tokenizer: Tokenizer) -> None:
    """A teacher's folder is there, and its tokens are the student's: their distributions are compared by number."""
    for index, stage in enumerate(config.stages):
        if not isinstance(stage, DistillStage):
            continue
        where, folder = f"stages.{index}.teacher.path", resolve_prepared(stage.teacher.path, run)
        if not (folder / "config.json").is_file():
            raise InputError(f"{where}: no model folder at {folder}{_nearest(folder)}")
        if load_tokenizer(folder, chat=False).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{where}: {folder} has another tokenizer than the student: take a teacher of the same family, or let "
                "it write answers and train on them with an sft stage"
            )


def _check_interpreters(config: RunConfig) -> None:
    """The Python of rollout actors has the engine, where it is another than ours or the engine is no part of us."""
    for index, stage in enumerate(config.stages):
        if isinstance(stage, OnlineStage) and (stage.rollout.python or stage.rollout.engine != "native"):
            check_interpreter(stage.rollout, f"stages.{index}.rollout")


def _check_answers(rewards: Sequence[RewardConfig], rows: list[Row], path: str) -> None:
    for reward in rewards:
        for column in _columns(reward):
            for number, row in enumerate(rows, 1):
                if column not in row:
                    raise InputError(f"{path}, row {number}: the {reward.type} reward's column {column!r} is missing")


def _columns(reward: RewardConfig) -> list[str]:
    """What a reward reads of every row."""
    if isinstance(reward, MathReward | ExactReward):
        return [reward.answer]
    if isinstance(reward, CodeReward):
        return [column for column in (reward.tests, reward.entry_point, reward.prefix) if column]
    return [reward.question] if isinstance(reward, JudgeReward) else []
