"""The critic's model: a body without its vocabulary's head, and a value head on its last hidden state.

Shapes: as in `scoring_model.py`; D the model's width.
"""

from torch import Tensor, nn

from .scoring_model import Aligned


class Valuer(nn.Module):
    """Gives a value of every position that predicts a token. The head begins at 0, and so do all values."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Aligned) -> Tensor:
        """Values of a micro-batch, `[B, T]`, in float32."""
        return batch.at_completions(self.head(batch.hidden(self.body).float())[:, 0])
