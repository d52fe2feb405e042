"""Merging: an adapter into its base, several adapters into one, two whole models into one.

Everything is added in float32. What is written is an ordinary folder, whole or not at all.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..cluster.errors import InputError
from ..cluster.imports import importing
from ..cluster.weights import Tensors, adapter_digest, base_digest, load_adapter
from .adapters import check_adapter, export_weights, merge_adapter, open_base, open_draft, save_model

if TYPE_CHECKING:
    from torch import Tensor

Combination = Literal[
    "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
"""How PEFT combines adapters: weighted sums of factors or of whole changes (`svd`), with TIES (2306.01708), DARE
(2311.03099) or the smallest values left out."""
COMBINATIONS: tuple[str, ...] = Combination.__args__  # type: ignore[attr-defined]
_PRUNES = ("ties", "dare", "magnitude")
_ONE_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""They add factors, which must be of one rank; those of `svd` add what the factors multiply to."""


def merge_into_base(base: Path, adapter: Path, out: Path, *, quantized: bool = False) -> Path:
    """Write base + adapter as a model folder; `quantized` adds to the values that the base has in NF4.

    Raises `InputError` where they do not belong together.
    """
    _require(base, adapter)
    _refuse_existing(out)
    if not quantized:
        return merge_adapter(base, adapter, out)
    model = _dequantised(base)
    with importing():
        from peft import PeftModel

    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    return save_model(merged, base, out)


def combine_adapters(
    base: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    how: str = "linear",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> Path:
    """Write one adapter made of several on the same base. `density` is the share of values that stay where some are
    left out; `rank` that of the result of an `svd`, the largest by default.

    Raises `InputError` for adapters of different bases, and of different ranks where factors are added.
    """
    shares = list(weights or [1.0 / len(adapters)] * len(adapters))
    _check_combination(base, adapters, how, shares, density)
    _refuse_existing(out)
    import torch

    with importing():
        from peft import PeftModel

    model: Any = PeftModel.from_pretrained(open_base(base), str(adapters[0]), adapter_name="0")
    for number, folder in enumerate(adapters[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(number))
    options: dict[str, Any] = {"density": density} if how.startswith(_PRUNES) else {}
    options |= {"svd_rank": rank} if "svd" in how and rank else {}
    names = [str(number) for number in range(len(adapters))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # DARE drops at random
        model.add_weighted_adapter(names, shares, "default", combination_type=how, **options)
    for name in names:
        model.delete_adapter(name)
    model.set_adapter("default")
    provenance = {"base_digest": base_digest(base), "merged": [p.name for p in adapters], "how": how, "weights": shares}
    return _write_adapter(*export_weights(model), provenance, out)


def slerp_models(first: Path, second: Path, out: Path, *, t: float = 0.5) -> Path:
    """Write the model at `t` on the arc between two of one architecture (Shoemake 1985), tensor by tensor in float32.

    Raises `InputError` where their tensors differ in name or shape.
    """
    if not 0 <= t <= 1:
        raise InputError(f"t {t:g} is not between the two models: take 0 (the first) to 1 (the second)")
    _refuse_existing(out)
    import torch

    model, other = open_base(first), open_base(second)
    theirs = dict(other.named_parameters())
    ours = dict(model.named_parameters())
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(p[name].shape) if name in p else None for p in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{first} and {second} are of different architectures: {name} is {shapes[0] or 'absent'} and "
                f"{shapes[1] or 'absent'}; slerp needs the same shapes"
            )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(slerp(parameter, theirs[name], t))
    return save_model(model, first, out)


def slerp(a: "Tensor", b: "Tensor", t: float) -> "Tensor":
    """sin((1−t)θ)/sin θ · a + sin(tθ)/sin θ · b, θ the angle between the tensors as vectors; linear where it is small.

    Any shape, both alike. A tensor of zeros makes it linear too.
    """
    norms = (a.norm() * b.norm()).item()
    cosine = min(1.0, max(-1.0, ((a * b).sum() / norms).item())) if norms else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < 1e-4:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def _check_combination(
    base: Path, adapters: Sequence[Path], how: str, weights: Sequence[float], density: float
) -> None:
    if len(adapters) < 2:
        raise InputError("a combination is of two adapters or more: to merge one into its base leave --how out")
    if how not in COMBINATIONS:
        raise InputError(f"how {how!r} is no combination: take one of {', '.join(COMBINATIONS)}")
    if len(weights) != len(adapters):
        raise InputError(f"{len(weights)} weights for {len(adapters)} adapters: give one each")
    if not 0 < density <= 1:
        raise InputError(f"density {density:g} is no share of values that stay: take one above 0, at most 1")
    for folder in adapters:
        _require(base, folder)
    configs = [load_adapter(folder)[1] for folder in adapters]
    ranks = [config["r"] for config in configs]
    if how in _ONE_RANK and len(set(ranks)) > 1:
        listed = ", ".join(f"{folder} r={r}" for folder, r in zip(adapters, ranks, strict=True))
        raise InputError(f"how {how} adds factors of one rank, and these differ: {listed}; take svd, or ties_svd")
    targets = [sorted(config["target_modules"]) for config in configs]
    for folder, own in zip(adapters, targets, strict=True):
        if own != targets[0]:
            raise InputError(f"{folder} is on {', '.join(own)}, {adapters[0]} on {', '.join(targets[0])}: they differ")


def _require(base: Path, adapter: Path) -> None:
    if not base.is_dir():
        raise InputError(f"no model folder at {base}")
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} is no adapter folder: it has no adapter_config.json")
    check_adapter(adapter, base)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} is there already: name another folder, or remove it")


def _dequantised(base: Path) -> Any:
    """The base with the values that it has in NF4, in float32."""
    import torch

    quantised, plain = open_base(base, quantize="nf4"), open_base(base)
    from bitsandbytes.functional import dequantize_4bit

    packed = dict(quantised.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            state = getattr(packed[name], "quant_state", None)
            if state is not None:
                parameter.copy_(dequantize_4bit(packed[name], state))
    return plain


def _write_adapter(tensors: Tensors, config: dict[str, Any], provenance: dict[str, Any], out: Path) -> Path:
    from safetensors.numpy import save_file

    digest = adapter_digest(tensors, config, provenance["base_digest"])
    with open_draft(out) as draft:
        save_file(tensors, draft / "adapter_model.safetensors")
        (draft / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        (draft / "provenance.json").write_text(json.dumps(provenance | {"digest": digest}, indent=1))
    return out
