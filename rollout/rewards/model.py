"""A reward model as a reward: one number for prompt and completion. Pulls in torch; only who scores imports it.

What a number does not depend on: who scores, and when. It is float32 on one torch thread, a group is always scored
whole, and which of its rows share a forward depends on their lengths alone. Another group around the same row would
change it by rounding, no more: attention is causal and padding stands on the right.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from ...cluster.errors import InputError
from ..records import Group
from .functions import RewardError, finite

MAX_TOKENS = 16_384
"""Padded tokens of one forward, at most."""
_PADDING = 1 / 8
"""Of a row in a forward, at most: shorter rows wait for another."""


class RewardModel:
    """A sequence-classification model of one label from a folder, on `cpu` or `cuda`.

    The head reads the last token that is not the padding token, as it did in training; where a tokenizer has none of
    its own and pads with the stop token, that is the one before the stop.
    Raises `InputError` where there is none, or where its head is not in the file (it would be random).
    """

    overruns = 0
    """A forward has no time-out of its own: the stage's ends it."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} is not a reward model: {str(error).splitlines()[0]}") from error
        if info["missing_keys"]:
            raise InputError(f"{folder} is not a reward model: it has no weights {', '.join(info['missing_keys'])}")
        self._model, self._device = model.to(device).eval(), device
        self._lock = threading.Lock()
        """Torch's number of threads is the process's: one forward at a time."""
        self._pad = int(model.config.get_text_config().pad_token_id)

    def scores(self, rows: Sequence[np.ndarray]) -> list[float]:
        """The score of each row of tokens `[T]`, prompt and completion, in their order; may be no finite number."""
        out = [0.0] * len(rows)
        with self._lock, _one_thread(), torch.inference_mode():
            for batch in batches([len(row) for row in rows]):
                for i, score in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                    out[i] = score
        return out

    def outcomes(self, group: Group) -> Iterator[float | RewardError]:
        """The score of each sample of a group, or what is wrong with it."""
        for score in self.scores([np.concatenate([group.prompt, sample.tokens]) for sample in group.samples]):
            try:
                yield finite(score)
            except RewardError as error:
                yield error

    def wait_ready(self) -> None:
        """It is, once it is made."""

    def counters(self) -> dict[str, float]:
        """None besides `overruns`."""
        return {}

    def close(self) -> None:
        """Nothing outlives it."""

    def _forward(self, rows: Sequence[np.ndarray]) -> list[float]:
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        given = {"input_ids": ids, "attention_mask": mask}
        made = self._model(**{k: torch.from_numpy(v).to(self._device) for k, v in given.items()}, use_cache=False)
        return made.logits[:, 0].float().tolist()


def batches(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Which rows share a forward: of like length, longest first, at most `max_tokens` and an eighth of it padding."""
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[made[-1][0]] if made else 0
        fits = longest * (len(made[-1]) + 1) <= max_tokens if made else False
        if fits and lengths[i] >= (1 - _PADDING) * longest:
            made[-1].append(i)
        else:
            made.append([i])
    return made


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
