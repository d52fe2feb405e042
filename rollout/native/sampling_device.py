"""Drawing tokens where the logits lie on an accelerator: the same distribution as `sampling_kernel`, in torch.

Shapes: n rows, V tokens of the vocabulary.
"""

import numpy as np
import torch
from torch.nn import functional

from ..records import MAX_TOP_LOGPROBS, TopLogprobs
from .sampling import Drawn, Knobs

_PART = 1024
"""Tokens of the vocabulary whose weights are added up together."""


def draw_on_device(logits: torch.Tensor, knobs: Knobs, uniform: np.ndarray, most: int = 0) -> Drawn:
    """Draw one token per row of `logits` `[n, V]` float32, as `sampling.draw` says; `most` rows are computed."""
    count, greedy = len(logits), knobs.temperature == 0
    given = np.ones((3, max(count, most)))
    given[0, :count] = np.where(greedy, 1.0, np.minimum(1 / np.where(greedy, 1.0, knobs.temperature), 3e38))
    given[1, :count], given[2, :count] = uniform, greedy
    scale, places, certain = _on(logits, given)[:, :, None]  # one way there, and below one back
    size = logits.shape[1]
    logits = functional.pad(logits, (0, -size % _PART), value=-np.inf)
    logits = functional.pad(logits, (0, 0, 0, len(scale) - count))
    best, first = logits.max(dim=1, keepdim=True)
    scores = (logits - best).mul_(scale.float())
    weights = scores.exp()
    _restrict(weights, knobs, greedy)
    chosen, total = _choose(weights, places)
    # A parallel sum may rise where a weight is 0; that token is impossible, and the best one is not.
    possible = weights.gather(1, chosen) > 0
    tokens = torch.where((certain > 0) | ~possible, first, chosen)
    logs = total.log()
    logprobs = scores.gather(1, tokens).double() - logs
    drawn = torch.cat([tokens.double(), logprobs], dim=1)[:count].cpu().numpy()
    top = _top(scores.masked_fill(weights == 0, -np.inf)[:, :size], logs, knobs) if knobs.top_logprobs.any() else None
    return Drawn(drawn[:, 0].astype(np.int64), drawn[:, 1].astype(np.float32), top)


def _choose(weights: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens `[n, 1]` at which the cumulative weight exceeds `places` `[n, 1]` of the whole, and that, float64.

    First the part of the vocabulary, then the token in it: a cumulative sum of all would be written to memory whole.
    """
    parts = weights.view(len(weights), -1, _PART)
    sums = parts.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    total = sums[:, -1:]
    wanted = places * total
    part = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1)
    before = functional.pad(sums, (1, 0)).gather(1, part)
    own = parts.gather(1, part[:, :, None].expand(-1, -1, _PART))[:, 0]
    inside = own.cumsum(dim=1, dtype=torch.float64).add_(before)
    return part * _PART + torch.searchsorted(inside, wanted, right=True).clamp_(max=_PART - 1), total


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
    if len(nucleus):  # of all rows: how many there are decides in which order torch adds up
        share = np.ones(len(weights))
        share[nucleus] = knobs.top_p[nucleus]
        _keep(weights, nucleus, _nucleus_least(weights, _on(weights, share))[nucleus])


def _keep(weights: torch.Tensor, rows: np.ndarray, least: torch.Tensor) -> None:
    part = weights[rows]
    weights[rows] = part.masked_fill(part < least[:, None], 0)


def _nucleus_least(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The last weight of each row's smallest set that holds `top_p` of the whole."""
    ordered = weights.sort(dim=1, descending=True).values
    sums = ordered.cumsum(dim=1, dtype=torch.float64)
    last = (sums < top_p[:, None] * sums[:, -1:]).sum(dim=1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    return ordered.gather(1, last)[:, 0]


def _top(scores: torch.Tensor, logs: torch.Tensor, knobs: Knobs) -> TopLogprobs:
    """The likeliest tokens of the rows that ask for them; the others' places hold nothing of meaning."""
    rows, most = np.flatnonzero(knobs.top_logprobs), int(knobs.top_logprobs.max(initial=0))
    # Always the same number: how many a neighbour asks for must not decide which of two equals is left out.
    values, ids = scores[rows].topk(min(MAX_TOP_LOGPROBS, scores.shape[1]), dim=1)
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    ids, values = ids.gather(1, by_value), (values.double() - logs[rows]).float()
    top = TopLogprobs(
        np.zeros((len(knobs.top_k), ids.shape[1]), np.int32),
        np.full((len(knobs.top_k), ids.shape[1]), -np.inf, np.float32),
    )
    top.ids[rows], top.logprobs[rows] = ids.cpu().numpy(), values.cpu().numpy()
    return TopLogprobs(top.ids[:, :most], top.logprobs[:, :most])
