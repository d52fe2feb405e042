"""Models that offline tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's architecture and tokenizer with other random weights: a teacher."""
    from raylign.trainers.adapters import random_model, save_model

    return save_model(random_model(tiny_model, seed=99), tiny_model, tmp_path_factory.mktemp("other") / "model")
