"""What a model gained on held-out text and lost on general text: losses with the adapter on and off, and red flags."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.calls import get
from ..cluster.config import Resources
from ..cluster.errors import InputError
from .adapters import check_adapter, open_base, open_model
from .online.metrics import repetition

if TYPE_CHECKING:
    from torch import Tensor

ALARM = 0.1
"""Nats a token by which the loss on general text may rise."""
LOSS_AT_ZERO = 0.01
REPETITION = 0.5
GENERAL_TEXT = (
    "Water boils at a lower temperature on a high mountain, because the air presses less on its surface.",
    "The committee met on Tuesday to discuss the new library, and agreed that it should open before the winter.",
    "A triangle has three sides; if two of them are equal, so are the angles that lie opposite to them.",
    "She closed the window, put the letter into the drawer, and went downstairs to see who had knocked.",
    "Most birds build their nests in spring, when insects are plentiful and the days are growing longer.",
    "To make bread you need flour, water, salt and yeast, some patience, and an oven that is hot enough.",
)
"""Plain English of no task in particular, written for this purpose; the same in every release."""


def evaluate_folder(
    base: Path, adapter: Path | None, held_out: Sequence[str] = (), *, alarm: float = ALARM, length: int = 512
) -> dict[str, Any]:
    """Measure a model folder, or one with an adapter on it.

    Gives `general` and, with texts, `held_out`: each `loss` in nats a token and, where there is an adapter, `base_loss`
    with it off and `kl_to_base`; `forgetting`, the rise on general text, or none; `flags`, what is wrong, by name.
    Raises `InputError` where folders cannot be read or do not belong together.
    """
    if adapter:
        if not (adapter / "adapter_config.json").is_file():
            raise InputError(f"{adapter} is no adapter folder: it has no adapter_config.json")
        check_adapter(adapter, base)
    model: Any = open_model(base, adapter, None, seed=0) if adapter else open_base(base)
    model.to(_device())
    tokenizer = _tokenizer(base)
    found: dict[str, Any] = {"general": _measured(model, tokenizer, GENERAL_TEXT, length, bool(adapter))}
    if held_out:
        found["held_out"] = _measured(model, tokenizer, held_out, length, bool(adapter))
    found["forgetting"] = found["general"]["loss"] - found["general"]["base_loss"] if adapter else None
    found["repetition"] = _repetition(model, tokenizer)
    return found | {"flags": flags(found, alarm)}


def evaluate_on_ray(
    base: Path, adapter: Path, resources: Resources, *, timeout: float, tick: Callable[[], None]
) -> dict[str, Any]:
    """`evaluate_folder` in a process that reserves what a replica does, since it holds the same model.

    Raises as `cluster.calls.get` does, where it found no place within `timeout` seconds too.
    """
    import ray

    measure = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(evaluate_folder)
    what = "to measure what the model forgot"
    return get(measure.remote(base, adapter), actor="evaluation", what=what, timeout=timeout, tick=tick)


def flags(found: dict[str, Any], alarm: float) -> list[str]:
    """What is wrong, by name: `diverging` is a held-out loss above the base's."""
    held_out = found.get("held_out")
    named = {
        "forgetting": (found["forgetting"] or 0.0) > alarm,
        "loss_at_zero": held_out is not None and held_out["loss"] < LOSS_AT_ZERO,
        "diverging": held_out is not None and held_out["loss"] > held_out.get("base_loss", math.inf),
        "repetition": found["repetition"] > REPETITION,
    }
    return [name for name, is_so in named.items() if is_so]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise InputError(f"{base} has no tokenizer: {str(error).splitlines()[0]}") from error


def _measured(model: Any, tokenizer: Any, texts: Sequence[str], length: int, adapted: bool) -> dict[str, float]:
    """Means over all predicted tokens of all texts."""
    import torch

    total = base_total = divergence = 0.0
    count = 0
    model.eval()
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:length]], device=model.device)
            if ids.shape[1] < 2:
                continue
            logprobs_TV = _logprobs(model, ids)
            targets_T1 = ids[0, 1:, None]
            total -= logprobs_TV.gather(-1, targets_T1).sum().item()
            count += len(targets_T1)
            if adapted:
                with model.disable_adapter():
                    base_TV = _logprobs(model, ids)
                base_total -= base_TV.gather(-1, targets_T1).sum().item()
                divergence += (logprobs_TV.exp() * (logprobs_TV - base_TV)).sum().item()
    if not count:
        raise InputError("no text has two tokens or more: there is nothing to measure")
    found = {"loss": total / count, "tokens": float(count)}
    return found | ({"base_loss": base_total / count, "kl_to_base": divergence / count} if adapted else {})


def _logprobs(model: Any, ids: "Tensor") -> "Tensor":
    return model(ids).logits[0, :-1].float().log_softmax(-1)


def _repetition(model: Any, tokenizer: Any, tokens: int = 48) -> float:
    """How much a greedy continuation of the first general text repeats itself."""
    import torch

    ids = torch.tensor([tokenizer(GENERAL_TEXT[0], add_special_tokens=False)["input_ids"][:16]], device=model.device)
    with torch.inference_mode():
        row = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return repetition(row[0, ids.shape[1] :].cpu().numpy())
