"""The registry of online algorithms: what each stage type presets, and where it comes from.

An algorithm is an advantage (a function of `trainers/online/advantages.py`), a loss (a function of
`trainers/online/objectives.py`) or `preference`, which learns from pairs and needs no advantage, and the defaults of an
`OnlineStage` that its paper chose. A recipe may override each.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple


class Algorithm(NamedTuple):
    """What a stage type presets.

    `defaults` are keys of the stage; `kl.place` sets a key of a block, where the recipe or the stage's own default has
    that block.
    """

    advantage: str
    loss: str
    defaults: Mapping[str, Any] = {}


_PPO_CLIP = {"clip.high": 0.2, "clip.dual": None}
_KL_IN_REWARD = {"kl.place": "reward", "kl.estimator": "k1"}
_PAIRS = {"advantage_scale": "none", "aggregation": "sequence", "mismatch": None}

ALGORITHMS: dict[str, Algorithm] = {
    # 2402.03300, with the defaults that later work settled on
    "grpo": Algorithm("group_mean", "clipped"),
    # 2503.20783: neither lengths nor deviations divide
    "dr_grpo": Algorithm("group_mean", "clipped", {"advantage_scale": "none", "aggregation": "constant", **_PPO_CLIP}),
    # 2503.14476
    "dapo": Algorithm(
        "group_mean", "clipped", {"advantage_scale": "group", "dynamic_sampling": {}, "overlong": {}, "clip.dual": None}
    ),
    # 2507.18071
    "gspo": Algorithm(
        "group_mean",
        "clipped",
        {
            "advantage_scale": "group",
            "ratio": "sequence",
            "aggregation": "sequence",
            "clip.low": 3e-4,
            "clip.high": 4e-4,
            "clip.dual": None,
        },
    ),
    # 2506.13585; the bound of the weights is ScaleRL's, 2510.13786
    "cispo": Algorithm("group_mean", "cispo", {"clip.high": 4.0}),
    # 2402.14740
    "rloo": Algorithm(
        "leave_one_out",
        "clipped",
        {"advantage_scale": "none", "ratio": "product", "aggregation": "sequence", **_PPO_CLIP, **_KL_IN_REWARD},
    ),
    # 2501.03262
    "reinforce_pp": Algorithm("returns", "clipped", {"advantage_scale": "tokens", **_PPO_CLIP, **_KL_IN_REWARD}),
    # 2501.03262, its variant with a group baseline
    "reinforce_pp_baseline": Algorithm(
        "group_mean", "clipped", {"advantage_scale": "tokens", **_PPO_CLIP, "kl.estimator": "k2"}
    ),
    # 1707.06347, for language models 2203.02155
    "ppo": Algorithm("gae", "clipped", {"advantage_scale": "tokens", "critic": {}, **_PPO_CLIP, **_KL_IN_REWARD}),
    # 2402.04792
    "online_dpo": Algorithm("none", "preference", _PAIRS),
    # 2401.01335: a step is an iteration, its opponent the policy as the step began
    "spin": Algorithm("none", "preference", {"demonstrations": True, "epochs": 2, "minibatches": 4, **_PAIRS}),
}

if TYPE_CHECKING:
    AlgorithmName = AdvantageName = LossName = str
else:  # what a recipe may write, so that an unknown name is refused with the nearest known one
    AlgorithmName = Literal[*ALGORITHMS]
    AdvantageName = Literal[*dict.fromkeys(a.advantage for a in ALGORITHMS.values())]
    LossName = Literal[*dict.fromkeys(a.loss for a in ALGORITHMS.values())]
