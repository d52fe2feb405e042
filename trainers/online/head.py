"""Log-probs and entropies from hidden states, without the logits of a whole batch, and in a backward without a forward.

The gradient of a token's log-prob or entropy to its own hidden state depends on nothing that comes after, but for a
factor: so the forward makes it at once, from the logits it has in hand, and nothing of the vocabulary's size is kept.
Only weights of the head that train make the backward compute logits again, chunk after chunk.

Shapes: N tokens, D width of the model, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_LOGITS = 1 << 22
"""Logits in hand at once, 16 MB of them in fp32."""
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a causal language model: what makes logits `[C, V]` of its last hidden states `[C, D]`."""

    logits: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> "Head":
        """A model's own.

        Some architectures scale their logits or hold them within bounds; the names are those of their configs in
        transformers.
        """
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = next((s for name in _SCALES if (s := getattr(config, name, None)) is not None), 1.0)
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            scale = 1.0 / divisor
        bound = getattr(config, "final_logit_softcapping", None)

        def logits(hidden_CD: Tensor) -> Tensor:
            logits_CV = layer(hidden_CD)
            logits_CV = logits_CV if scale == 1.0 else logits_CV * scale
            return logits_CV if bound is None else bound * torch.tanh(logits_CV / bound)

        return cls(logits, [p for p in layer.parameters() if p.requires_grad], config.vocab_size)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """So many tokens in parts whose logits fit in hand."""
        size = max(1, _CHUNK_LOGITS // self.vocabulary)
        return (slice(start, start + size) for start in range(0, tokens, size))


def token_logprobs(
    hidden_ND: Tensor, tokens_N: Tensor, head: Head, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token under the distribution it was sampled from, and that distribution's entropy; `[N]`.

    Logits are taken to fp32 before the softmax (ScaleRL 2510.13786). The distribution is that of the temperature alone
    (above 0), without top-p or top-k. The entropy has a gradient only when asked: it costs a product with the head.
    """
    learns = torch.is_grad_enabled() and (hidden_ND.requires_grad or bool(head.trained))
    settings = _Settings(head, temperature, learns, entropy_gradient and learns)
    logprobs_N, entropy_N = _TokenLogprobs.apply(hidden_ND, tokens_N, settings, *head.trained)
    return logprobs_N, entropy_N


@dataclass(frozen=True, slots=True)
class _Settings:
    head: Head
    temperature: float
    learns: bool
    entropy_learns: bool


class _Chunk:
    """Logits of some tokens, their distribution, and gradients back through the head."""

    def __init__(self, hidden_CD: Tensor, tokens_C: Tensor, settings: _Settings) -> None:
        self._temperature, self._tokens_C1 = settings.temperature, tokens_C[:, None]
        self.hidden_CD = hidden_CD.detach().requires_grad_(settings.learns)
        with torch.set_grad_enabled(settings.learns):
            self._logits_CV = settings.head.logits(self.hidden_CD)
        logits_CV = self._logits_CV.detach().float()
        logits_CV = logits_CV if self._temperature == 1.0 else logits_CV / self._temperature
        self._logp_CV = logits_CV.log_softmax(-1)
        self._p_CV = self._logp_CV.exp()
        self.logprobs_C = self._logp_CV.gather(-1, self._tokens_C1)[:, 0]
        self.entropy_C = -torch.linalg.vecdot(self._p_CV, self._logp_CV)

    def of_logprob(self, factor_C1: Tensor | float) -> Tensor:
        """Σ factor · log p as gradient to the logits at the temperature: factor · (1[token] − p)."""
        slope_CV = self._p_CV * -factor_C1
        return slope_CV.scatter_add_(-1, self._tokens_C1, slope_CV.new_ones(len(slope_CV), 1) * factor_C1)

    def of_entropy(self, factor_C1: Tensor | float) -> Tensor:
        """Σ factor · H as gradient to the logits at the temperature: −factor · p (log p + H)."""
        return self._p_CV * (self._logp_CV + self.entropy_C[:, None]) * -factor_C1

    def back(self, slope_CV: Tensor, to: Any, *, again: bool = False) -> tuple[Tensor, ...]:
        """A gradient to the logits at the temperature, taken on to the hidden states or to weights of the head."""
        slope_CV = slope_CV if self._temperature == 1.0 else slope_CV / self._temperature
        return torch.autograd.grad(self._logits_CV, to, slope_CV.to(self._logits_CV.dtype), retain_graph=again)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, tokens_N: Tensor, settings: _Settings, *trained: Tensor) -> Any:
        logprobs_N = hidden_ND.new_empty(len(tokens_N), dtype=torch.float32)
        entropy_N, slope_ND, entropy_slope_ND = torch.empty_like(logprobs_N), None, None
        if settings.learns:
            slope_ND = torch.empty_like(hidden_ND)
        if settings.entropy_learns:
            entropy_slope_ND = torch.empty_like(hidden_ND)
        for rows in settings.head.chunks(len(tokens_N)):
            chunk = _Chunk(hidden_ND[rows], tokens_N[rows], settings)
            logprobs_N[rows], entropy_N[rows] = chunk.logprobs_C, chunk.entropy_C
            if entropy_slope_ND is not None:
                (entropy_slope_ND[rows],) = chunk.back(chunk.of_entropy(1.0), chunk.hidden_CD, again=True)
            if slope_ND is not None:
                (slope_ND[rows],) = chunk.back(chunk.of_logprob(1.0), chunk.hidden_CD)
        ctx.settings, ctx.trained = settings, trained
        ctx.save_for_backward(hidden_ND, tokens_N, slope_ND, entropy_slope_ND)
        if not settings.entropy_learns:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logprob_N1, entropy_N1 = (grad[:, None] for grad in grads)
        hidden_ND, tokens_N, slope_ND, entropy_slope_ND = ctx.saved_tensors
        to_hidden_ND = slope_ND * logprob_N1.to(slope_ND.dtype)
        if entropy_slope_ND is not None:
            to_hidden_ND += entropy_slope_ND * entropy_N1.to(slope_ND.dtype)
        to_trained = [torch.zeros_like(weight, dtype=torch.float32) for weight in ctx.trained]
        for rows in ctx.settings.head.chunks(len(tokens_N)) if to_trained else ():
            chunk = _Chunk(hidden_ND[rows], tokens_N[rows], ctx.settings)
            slope_CV = chunk.of_logprob(logprob_N1[rows])
            if entropy_slope_ND is not None:
                slope_CV += chunk.of_entropy(entropy_N1[rows])
            for whole, part in zip(to_trained, chunk.back(slope_CV, ctx.trained), strict=True):
                whole += part
        return to_hidden_ND, None, None, *(g.to(w.dtype) for g, w in zip(to_trained, ctx.trained, strict=True))
