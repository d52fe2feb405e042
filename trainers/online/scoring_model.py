"""A model that gives the log-probs of completions: the forward that policy and reference share, and the critic's rows.

Shapes: R rows of a forward, L the longest; B samples, T the longest completion, N completion tokens; D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from .batch import TrainSample, pad
from .head import Head, token_logprobs
from .prefixes import Bundle, Packing, Row
from .ranks import Ranks

_PAIR_COST = 0.2
"""What attention takes for a pair of tokens, in tokens and times the width: measured with 128 and 512, forward and
backward; by operations it is 1/6."""
_WINDOWS = ("sliding_window", "attention_chunk_size")
"""What configs in transformers call the tokens that a layer looks back at."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """A micro-batch as tensors: rows of a forward, and what a loss needs of each sample's completion.

    Rows that hold a sample each have neither positions nor a mask: what pads them stands on their right, where no token
    of a causal model sees it.
    """

    ids_RL: Tensor
    positions_RL: Tensor | None
    sees_R1LL: Tensor | None
    predictors_N: Tensor
    """The places in all rows, one row after the other, from which the completion tokens are predicted."""
    targets_BT: Tensor
    mask_BT: Tensor
    behaviour_BT: Tensor
    reference_BT: Tensor | None
    old_BT: Tensor | None
    advantages_BT: Tensor
    values_BT: Tensor | None
    returns_BT: Tensor | None

    def hidden(self, body: nn.Module) -> Tensor:
        """The last hidden states `[N, D]` of a model's body from which completion tokens are predicted."""
        placed = {} if self.sees_R1LL is None else {"position_ids": self.positions_RL, "attention_mask": self.sees_R1LL}
        hidden_RLD = body(input_ids=self.ids_RL, use_cache=False, **placed).last_hidden_state
        # indexing with [] would add gradients of a place in any order when there are several threads
        return hidden_RLD.flatten(0, 1).index_select(0, self.predictors_N)

    def at_completions(self, given_N: Tensor) -> Tensor:
        """What is known of each completion token as `[B, T]`; 0 where none stands."""
        return torch.zeros_like(self.mask_BT).masked_scatter(self.mask_BT > 0, given_N)


def align(bundles: Sequence[Bundle], device: torch.device | str, *, counts: bool = True) -> Aligned:
    """Pad a micro-batch on the right and line up what the loss needs with its completion tokens.

    One that does not count has no place that predicts, and its mask is 0.

    Raises `ValueError` where some samples have what others lack, such as the reference's log-probs.
    """
    rows = [row for bundle in bundles for row in bundle.rows]
    samples = [sample for row in rows for sample in row.samples]
    length, longest = max(row.length for row in rows), max(len(s.tokens) for s in samples)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def where_all_have(given: Sequence[np.ndarray | None], what: str) -> Tensor | None:
        known = [row for row in given if row is not None]
        if known and len(known) < len(given):
            raise ValueError(f"{len(given) - len(known)} of {len(given)} samples lack {what}")
        return on_device(pad(known, longest)) if known else None

    shared = any(row.shared for row in rows)
    places = [place + i * length for i, row in enumerate(rows) for place in row.predictors()] if counts else []
    return Aligned(
        ids_RL=on_device(pad([row.ids_L for row in rows], length).astype(np.int64)),
        positions_RL=on_device(pad([row.depths_L for row in rows], length)) if shared else None,
        sees_R1LL=on_device(np.stack([row.sees(length) for row in rows])[:, None]) if shared else None,
        predictors_N=on_device(np.concatenate([np.zeros(0, np.int64), *places])),
        targets_BT=on_device(pad([s.tokens for s in samples], longest).astype(np.int64)),
        mask_BT=on_device(pad([(s.learned & counts).astype(np.float32) for s in samples], longest)),
        behaviour_BT=on_device(pad([s.behaviour for s in samples], longest)),
        reference_BT=where_all_have([s.reference for s in samples], "the reference's log-probs"),
        old_BT=where_all_have([s.old for s in samples], "the policy's log-probs before the step"),
        advantages_BT=on_device(pad([s.advantages for s in samples], longest)),
        values_BT=where_all_have([s.values for s in samples], "the critic's values"),
        returns_BT=where_all_have([s.returns for s in samples], "returns"),
    )


def completion_logprobs(
    model: nn.Module, batch: Aligned, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of the completion tokens and the entropies there, `[B, T]`; 0 where none stands."""
    whole = without_peft(model)
    targets_N = batch.targets_BT[batch.mask_BT > 0]

    def forward(**_: Any) -> tuple[Tensor, Tensor]:
        hidden_ND = batch.hidden(whole.base_model)
        return token_logprobs(hidden_ND, targets_N, Head.of(whole), temperature, entropy_gradient=entropy_gradient)

    with _instead_of_logits(whole, forward):
        logprobs_N, entropy_N = model(input_ids=batch.ids_RL)
    return batch.at_completions(logprobs_N), batch.at_completions(entropy_N)


def without_peft(model: nn.Module) -> Any:
    """The transformers model that PEFT may have wrapped."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def packing_for(model: nn.Module, max_tokens: int) -> Packing:
    """How a causal model's samples may share rows: proved on a few tokens, since not every architecture takes positions
    and a mask as they are meant. Call it in evaluation mode and before the model is sharded.
    """
    whole, (first, *_) = without_peft(model), model.parameters()
    config = whole.config.get_text_config()
    windows = [w for name in _WINDOWS if (w := getattr(config, name, None))]
    none = np.zeros(0, np.float32)
    samples = [
        TrainSample(prompt=np.array([3, 4, 5]), tokens=np.array(tokens), behaviour=none, advantages=none)
        for tokens in ([6, 7, 8], [6, 7, 4, 5], [9, 3])
    ]
    together = Packing(max_tokens, _PAIR_COST / config.hidden_size, min(windows, default=None))
    with torch.no_grad():
        alone_ND = align(Packing(max_tokens).bundles(samples), first.device).hidden(whole.base_model)
        try:
            shared_ND = align([Bundle((0, 1, 2), (Row.of(samples),))], first.device).hidden(whole.base_model)
        except (TypeError, ValueError, RuntimeError):  # what forwards raise that know no positions or no such mask
            return Packing(max_tokens)
    allowed = alone_ND.abs().max() * (1e-4 if first.dtype == torch.float32 else 5e-2)
    return together if (alone_ND - shared_ND).abs().max() <= allowed else Packing(max_tokens)


@contextmanager
def _instead_of_logits(whole: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a model another forward. It is called through whatever is around the model, which may have to gather its
    weights first."""
    before = vars(whole).get("forward")
    whole.forward = forward
    try:
        yield
    finally:
        del whole.forward
        if before is not None:  # such as the one that moves what goes in to the model's device
            whole.forward = before


@torch.no_grad()
def logprobs_of(
    model: nn.Module, samples: Sequence[TrainSample], temperature: float, packing: Packing, ranks: Ranks
) -> list[np.ndarray]:
    """Log-probs `[T]` of each sample's completion, without gradient, in the order given; all ranks call it."""
    return of_each_sample(lambda batch: completion_logprobs(model, batch, temperature)[0], samples, packing, ranks)


@torch.no_grad()
def of_each_sample(
    compute: Callable[[Aligned], Tensor], samples: Sequence[TrainSample], packing: Packing, ranks: Ranks
) -> list[np.ndarray]:
    """What `compute` gives of micro-batches, `[B, T]`, at the completion tokens of each sample: `[T]`, float32.

    Each rank computes its part; all call it, and all have all.
    """
    mine: dict[int, np.ndarray] = {}
    for bundles, counts in ranks.batches(samples, packing):
        computed = compute(align(bundles, ranks.device)).float().cpu().numpy()
        places = [place for bundle in bundles for place in bundle.places]
        for i, line in zip(places, computed, strict=True) if counts else ():
            mine[i] = line[: len(samples[i].tokens)].copy()
    rows = {i: row for part in ranks.gathered(mine) for i, row in part.items()}
    return [rows[i] for i in range(len(samples))]
