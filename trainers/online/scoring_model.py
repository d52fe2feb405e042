"""A model that gives the log-probs of completions: the forward that policy and reference share, and the critic's rows.

Shapes: B rows, L longest row, K positions kept for the loss (from the shortest prompt's last token on), V vocabulary.
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
from .ranks import Ranks


@dataclass(frozen=True, slots=True)
class Aligned:
    """A micro-batch as tensors; everything `[B, K]` is aligned with the tokens the model predicts there.

    There is no attention mask: what pads a row stands on its right, where no token of a causal model sees it.
    """

    ids_BL: Tensor
    first: int
    """The position whose logits are the first that count."""
    targets_BK: Tensor
    mask_BK: Tensor
    behaviour_BK: Tensor
    reference_BK: Tensor | None
    old_BK: Tensor | None
    advantages_BK: Tensor
    values_BK: Tensor | None
    returns_BK: Tensor | None


def align(samples: Sequence[TrainSample], device: torch.device | str, *, counts: bool = True) -> Aligned:
    """Pad a micro-batch on the right and line up what the loss needs with the positions it needs it at.

    The mask of one that does not count is 0.

    Raises `ValueError` where some samples have what others lack, such as the reference's log-probs.
    """
    length = max(s.length for s in samples)
    first = min(len(s.prompt) for s in samples) - 1
    ids = pad([np.concatenate([s.prompt, s.tokens]).astype(np.int64) for s in samples], length)

    def at_completion(rows: Sequence[np.ndarray]) -> Tensor:
        out = np.zeros((len(samples), length - 1 - first), np.float32)
        for line, sample, row in zip(out, samples, rows, strict=True):
            start = len(sample.prompt) - 1 - first
            line[start : start + len(row)] = row
        return torch.from_numpy(out).to(device)

    def where_all_have(rows: Sequence[np.ndarray | None], what: str) -> Tensor | None:
        known = [row for row in rows if row is not None]
        if known and len(known) < len(rows):
            raise ValueError(f"{len(rows) - len(known)} of {len(rows)} samples lack {what}")
        return at_completion(known) if known else None

    ids_BL = torch.from_numpy(ids).to(device)
    return Aligned(
        ids_BL=ids_BL,
        first=first,
        targets_BK=ids_BL[:, first + 1 :],
        mask_BK=at_completion([np.full(len(s.tokens), counts, np.float32) for s in samples]),
        behaviour_BK=at_completion([s.behaviour for s in samples]),
        reference_BK=where_all_have([s.reference for s in samples], "the reference's log-probs"),
        old_BK=where_all_have([s.old for s in samples], "the policy's log-probs before the step"),
        advantages_BK=at_completion([s.advantages for s in samples]),
        values_BK=where_all_have([s.values for s in samples], "the critic's values"),
        returns_BK=where_all_have([s.returns for s in samples], "returns"),
    )


def completion_logprobs(
    model: nn.Module, batch: Aligned, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of the completion tokens and the entropies there, `[B, K]`; 0 where none stands."""
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    on_BK = batch.mask_BK > 0

    def forward(input_ids: Tensor, **_: None) -> tuple[Tensor, Tensor]:
        hidden_BLD = whole.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return token_logprobs(
            hidden_BLD[:, batch.first :][on_BK],
            batch.targets_BK[on_BK],
            Head.of(whole),
            temperature,
            entropy_gradient=entropy_gradient,
        )

    with _instead_of_logits(whole, forward):
        logprobs_N, entropy_N = model(input_ids=batch.ids_BL[:, :-1])  # nothing is predicted from a last token
    empty_BK = torch.zeros_like(batch.mask_BK)
    return empty_BK.masked_scatter(on_BK, logprobs_N), empty_BK.masked_scatter(on_BK, entropy_N)


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
    model: nn.Module, samples: Sequence[TrainSample], temperature: float, max_tokens: int, ranks: Ranks
) -> list[np.ndarray]:
    """Log-probs `[T]` of each sample's completion, without gradient, in the order given; all ranks call it."""
    return of_each_sample(lambda batch: completion_logprobs(model, batch, temperature)[0], samples, max_tokens, ranks)


@torch.no_grad()
def of_each_sample(
    compute: Callable[[Aligned], Tensor], samples: Sequence[TrainSample], max_tokens: int, ranks: Ranks
) -> list[np.ndarray]:
    """What `compute` gives of micro-batches, `[B, K]`, at the completion tokens of each sample: `[T]`, float32.

    Each rank computes its part; all call it, and all have all.
    """
    mine: dict[int, np.ndarray] = {}
    for rows, counts in ranks.batches([s.length for s in samples], max_tokens):
        batch = align([samples[i] for i in rows], ranks.device)
        computed = compute(batch).float().cpu().numpy()
        for i, line in zip(rows, computed, strict=True) if counts else ():
            start = len(samples[i].prompt) - 1 - batch.first
            mine[i] = line[start : start + len(samples[i].tokens)].copy()
    rows = {i: row for part in ranks.gathered(mine) for i, row in part.items()}
    return [rows[i] for i in range(len(samples))]
