"""Drawing tokens where the logits lie on an accelerator: the same distribution as `sampling_kernel`, in torch.

Shapes: n rows, V tokens of the vocabulary.
"""

import numpy as np
import torch

from ..records import MAX_TOP_LOGPROBS, TopLogprobs
from .sampling import Drawn, Knobs


def draw_on_device(logits: torch.Tensor, knobs: Knobs, uniform: np.ndarray) -> Drawn:
    """Draw one token per row of `logits` `[n, V]` float32, as `sampling.draw` says."""
    greedy = knobs.temperature == 0
    scale = np.where(greedy, 1.0, np.minimum(1 / np.where(greedy, 1.0, knobs.temperature), 3e38)).astype(np.float32)
    best, first = logits.max(dim=1)
    scores = (logits - best[:, None]) * _on(logits, scale)[:, None]
    weights = scores.exp()
    _restrict(weights, knobs, greedy)
    sums = weights.cumsum(dim=1, dtype=torch.float64)
    total = sums[:, -1]
    chosen = torch.searchsorted(sums, (_on(logits, uniform) * total)[:, None], right=True).clamp_(
        max=logits.shape[1] - 1
    )
    # A parallel sum may rise where a weight is 0; that token is impossible, and the best one is not.
    possible = weights.gather(1, chosen) > 0
    tokens = torch.where(_on(logits, greedy)[:, None] | ~possible, first[:, None], chosen)
    logs = total.log()[:, None]
    logprobs = (scores.gather(1, tokens).double() - logs)[:, 0].float()
    return Drawn(
        tokens[:, 0].cpu().numpy(), logprobs.cpu().numpy(), _top(scores.masked_fill(weights == 0, -np.inf), logs, knobs)
    )


def _on(like: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device)


def _restrict(weights: torch.Tensor, knobs: Knobs, greedy: np.ndarray) -> None:
    """Set the weights that min-p, top-k and then top-p leave out to 0; rows that ask for none are not touched."""
    likely = np.flatnonzero((knobs.min_p > 0) & ~greedy)
    if len(likely):  # the best token's weight is 1
        _keep(weights, likely, _on(weights, knobs.min_p[likely].astype(np.float32)))
    cut = np.flatnonzero((knobs.top_k > 0) & (knobs.top_k < weights.shape[1]) & ~greedy)
    if len(cut):
        kth = knobs.top_k[cut]
        values = weights[cut].topk(int(kth.max()), dim=1).values
        _keep(weights, cut, values.gather(1, _on(weights, kth - 1)[:, None])[:, 0])
    nucleus = np.flatnonzero((knobs.top_p < 1) & ~greedy)
    if len(nucleus):
        _keep(weights, nucleus, _nucleus_least(weights[nucleus], _on(weights, knobs.top_p[nucleus])))


def _keep(weights: torch.Tensor, rows: np.ndarray, least: torch.Tensor) -> None:
    part = weights[rows]
    weights[rows] = part.masked_fill(part < least[:, None], 0)


def _nucleus_least(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The last weight of each row's smallest set that holds `top_p` of the whole."""
    ordered = weights.sort(dim=1, descending=True).values
    sums = ordered.cumsum(dim=1, dtype=torch.float64)
    last = (sums < top_p[:, None] * sums[:, -1:]).sum(dim=1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    return ordered.gather(1, last)[:, 0]


def _top(scores: torch.Tensor, logs: torch.Tensor, knobs: Knobs) -> TopLogprobs | None:
    """The likeliest tokens of the rows that ask for them; the others' places hold nothing of meaning."""
    rows, most = np.flatnonzero(knobs.top_logprobs), int(knobs.top_logprobs.max(initial=0))
    if not most:
        return None
    # Always the same number: how many a neighbour asks for must not decide which of two equals is left out.
    values, ids = scores[rows].topk(min(MAX_TOP_LOGPROBS, scores.shape[1]), dim=1)
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    ids, values = ids.gather(1, by_value), (values.double() - logs[rows]).float()
    top = TopLogprobs(
        np.zeros((len(scores), ids.shape[1]), np.int32), np.full((len(scores), ids.shape[1]), -np.inf, np.float32)
    )
    top.ids[rows], top.logprobs[rows] = ids.cpu().numpy(), values.cpu().numpy()
    return TopLogprobs(top.ids[:, :most], top.logprobs[:, :most])
