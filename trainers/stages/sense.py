"""Which fields of an online stage cannot work together. Imports neither ray nor torch."""

from typing import TYPE_CHECKING

from ...rollout.rewards.functions import ENVIRONMENT, reward_name
from .adapters import served_per_row
from .wishes import refuse_wishes

if TYPE_CHECKING:
    from .online import OnlineStage

_MOST_UNCORRECTED = 4
"""Of staleness without a correction for it."""


def refuse_nonsense(stage: "OnlineStage") -> None:
    """Raise `ValueError` with what in the stage cannot work, and what would."""
    for refuse in (
        _scale,
        _critic,
        _pairs,
        _reference,
        _minibatches,
        _ranks,
        _wishes,
        _partial,
        _staleness,
        _overlong,
        _groups,
        _broadcast,
        _sampling,
        _held_out,
        _environment,
    ):
        refuse(stage)


def _scale(stage: "OnlineStage") -> None:
    if stage.advantage in ("returns", "gae") and stage.advantage_scale in ("group", "batch"):
        raise ValueError(
            f"advantage_scale {stage.advantage_scale} is the spread about groups' means, and advantage "
            f"{stage.advantage} takes none off: take tokens or none"
        )


def _critic(stage: "OnlineStage") -> None:
    if stage.advantage == "gae" and stage.critic is None:
        raise ValueError("critic null: advantage gae is made of a critic's values; give critic: {}, or take returns")
    if stage.critic and stage.advantage != "gae":
        raise ValueError(
            f"critic: advantage {stage.advantage} asks no values, so a critic would learn for nothing; leave it "
            "out, or take advantage gae"
        )


def _pairs(stage: "OnlineStage") -> None:
    if (stage.loss == "preference") != (stage.advantage == "none"):
        raise ValueError(
            f"loss {stage.loss} with advantage {stage.advantage}: the loss of pairs takes none, and every other one "
            "an advantage"
        )
    if stage.demonstrations and stage.loss != "preference":
        raise ValueError(f"demonstrations: loss {stage.loss} does not compare with answers of the data")
    if stage.demonstrations and stage.dynamic_sampling:
        raise ValueError("dynamic_sampling: pairs with demonstrations need no spread of rewards; leave it out")
    if stage.loss != "preference":
        return
    for name in ("kl", "mismatch", "entropy_bonus"):
        if value := getattr(stage, name):
            shown = value if isinstance(value, float) else "a block"
            raise ValueError(f"{name} {shown}: the loss of pairs has no such term; leave it out (beta holds it)")


def _reference(stage: "OnlineStage") -> None:
    if stage.reference == "adapter_off" and (stage.adapter is None or stage.adapter.path):
        found = "no adapter block" if stage.adapter is None else f"the adapter {stage.adapter.path}"
        raise ValueError(
            f"reference adapter_off: the stage begins with {found}, so the policy without its adapter is not what "
            "it was when the stage began; give the stage a new adapter (adapter: {}), or leave reference out"
        )


def _minibatches(stage: "OnlineStage") -> None:
    if stage.batch_size % stage.minibatches:
        raise ValueError(
            f"batch_size {stage.batch_size} does not divide into minibatches of equal size: minibatches is "
            f"{stage.minibatches}; take a multiple of {stage.minibatches}"
        )


def _ranks(stage: "OnlineStage") -> None:
    of_an_update = stage.batch_size // stage.minibatches
    groups = [
        ("policy", stage.policy.ranks),
        ("critic.resources", stage.critic.resources.ranks if stage.critic else 1),
    ]
    for place, ranks in groups:
        if ranks > of_an_update:
            raise ValueError(
                f"{place}.ranks {ranks}: an update has {of_an_update} completions (batch_size {stage.batch_size} "
                f"over minibatches {stage.minibatches}), so some ranks would have none; take {of_an_update} or less"
            )


def _wishes(stage: "OnlineStage") -> None:
    refuse_wishes(stage.roles)
    low, high = stage.scoring.workers.min, stage.scoring.workers.max
    if low != high and any(r.colocate_with or r.split_from for _, r in stage.roles.values()):
        raise ValueError(
            f"scoring.workers {low} to {high}: where roles wish to stand together or apart, places are planned for "
            f"a fixed number of scorers; write workers: {stage.scoring.workers.start}, or leave the wishes out"
        )


def _partial(stage: "OnlineStage") -> None:
    longest = stage.rollout.sampling.max_tokens
    if stage.partial_tokens and stage.partial_tokens >= longest:
        raise ValueError(
            f"partial_tokens {stage.partial_tokens}: rollout.sampling.max_tokens is {longest}, so no completion "
            f"would be carried; take less, such as {max(1, longest // 2)}, or leave it out"
        )


def _staleness(stage: "OnlineStage") -> None:
    if stage.oldest > _MOST_UNCORRECTED and stage.mismatch is None:
        how = f"staleness {stage.staleness}"
        if stage.partial_tokens:
            how += f" and partial_tokens {stage.partial_tokens} of rollout.sampling.max_tokens, {stage.oldest} in all,"
        raise ValueError(
            f"{how} with mismatch null: completions of weights so old mislead an update that "
            f"is not corrected for them (AReaL, 2505.24298); leave mismatch in, or take {_MOST_UNCORRECTED} or less"
        )
    if stage.staleness and stage.rollout.weights.transport == "nccl":
        raise ValueError(
            f"staleness {stage.staleness} with rollout.weights.transport nccl: a broadcast reaches all workers at "
            "once, and here each takes new weights as it gets free; take object_store, or staleness 0"
        )


def _overlong(stage: "OnlineStage") -> None:
    longest = stage.rollout.sampling.max_tokens
    if stage.overlong and stage.overlong_buffer >= longest:
        raise ValueError(
            f"overlong.buffer {stage.overlong_buffer} leaves no length unpunished: rollout.sampling.max_tokens is "
            f"{longest}; take less, such as {max(1, longest // 5)}"
        )


def _groups(stage: "OnlineStage") -> None:
    size = stage.rollout.group_size
    if stage.batch_size % size:
        raise ValueError(
            f"batch_size {stage.batch_size} is not a multiple of rollout.group_size {size}: "
            f"take {max(1, stage.batch_size // size) * size}"
        )


def _broadcast(stage: "OnlineStage") -> None:
    if stage.rollout.weights.transport == "nccl" and stage.policy.gpus < 1:
        raise ValueError(
            f"rollout.weights.transport nccl needs a GPU for the policy and policy.gpus is {stage.policy.gpus:g}: "
            "write 1, or take object_store"
        )


def _sampling(stage: "OnlineStage") -> None:
    sampling, reason = stage.rollout.sampling, "the trainer's log-probs are those of the temperature alone"
    if sampling.temperature == 0:
        raise ValueError(
            "rollout.sampling.temperature 0: greedy completions of a group are all equal, so there is nothing to "
            "learn from; take 1.0"
        )
    if sampling.top_p < 1:
        raise ValueError(f"rollout.sampling.top_p {sampling.top_p:g}: {reason}; take 1.0")
    if sampling.top_k > 0:
        raise ValueError(f"rollout.sampling.top_k {sampling.top_k}: {reason}; take 0")
    if sampling.min_p > 0:
        raise ValueError(f"rollout.sampling.min_p {sampling.min_p:g}: {reason}; take 0")
    if stage.adapter and not served_per_row(stage.adapter):
        raise ValueError(
            "adapter.modules_to_save and alpha_pattern: engines add plain low-rank factors of one scale to each row; "
            "leave them out, or train them in a stage on Ray Train, which merges them"
        )
    if stage.adapter and stage.adapter.dropout > 0:
        raise ValueError(
            f"adapter.dropout {stage.adapter.dropout:g}: the engine samples without dropout, so the trainer's "
            "log-probs would be of another distribution; take 0"
        )


def _held_out(stage: "OnlineStage") -> None:
    held_out, names = stage.held_out, [reward_name(reward) for reward in stage.rewards]
    if held_out and held_out.right and held_out.right not in names:
        known = ", ".join(names)
        raise ValueError(f"held_out.right {held_out.right!r} is no reward of the stage: there are {known}")
    metric = stage.keep_best.metric if stage.keep_best else ""
    if metric.startswith("held_out/") and not held_out:
        raise ValueError(f"keep_best.metric {metric!r}: nothing is held out; add held_out, or take reward/mean")


def _environment(stage: "OnlineStage") -> None:
    names = [reward_name(reward) for reward in stage.rewards]
    if stage.rollout.environment is None:
        if not names:
            raise ValueError(
                "rewards: there are none, so there is nothing to learn; name one, or a rollout.environment"
            )
        return
    if ENVIRONMENT in names:
        raise ValueError(f"a reward is called {ENVIRONMENT!r}, as what rollout.environment gives: name it otherwise")
    for field, why in (
        ("partial_tokens", "an episode is cut at no token"),
        ("critic", "the values of turns are not defined"),
        ("demonstrations", "the data's answers have one turn"),
    ):
        if getattr(stage, field):
            raise ValueError(f"{field} with a rollout.environment: {why}; leave one of them out")
    if stage.advantage == "returns":
        raise ValueError("advantage returns with a rollout.environment: an episode has one reward; take group_mean")
