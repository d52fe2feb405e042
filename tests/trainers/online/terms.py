"""A random micro-batch as losses see it, and the settings that TRL's names stand for."""

import torch
from raylign.trainers.online.losses import Tokens, Totals

LENGTHS = (6, 3, 1, 4)
MAX_TOKENS = 9


def tokens(seed: int = 0) -> Tokens:
    """Four completions of 6, 3, 1 and 4 tokens, float64, one advantage a completion, ratios on both sides of 1."""
    torch.manual_seed(seed)
    B, T = len(LENGTHS), max(LENGTHS)
    logprobs = -torch.rand(B, T, dtype=torch.float64) * 2
    return Tokens(
        logprobs_BT=logprobs.requires_grad_(),
        old_BT=logprobs.detach() + torch.randn(B, T, dtype=torch.float64) * 0.4,
        behaviour_BT=logprobs.detach() + torch.randn(B, T, dtype=torch.float64) * 0.4,
        advantages_BT=torch.randn(B, dtype=torch.float64)[:, None].expand(B, T),
        mask_BT=(torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]).double(),
        reference_BT=-torch.rand(B, T, dtype=torch.float64) * 2,
        entropy_BT=torch.rand(B, T, dtype=torch.float64),
    )


def totals(rows: int = len(LENGTHS)) -> Totals:
    """Those of a step that is this micro-batch alone."""
    return Totals(tokens=sum(LENGTHS[:rows]), sequences=rows, constant=rows * MAX_TOKENS)
