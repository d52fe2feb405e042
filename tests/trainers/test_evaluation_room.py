"""Held-out questions that no service could hold are refused before the run."""

from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.rollout.config import MathReward
from raylign.serve.config import ServeConfig
from raylign.trainers.config import EvaluationConfig
from raylign.trainers.data.inputs import _check_room  # pyright: ignore[reportPrivateUsage]
from raylign.trainers.data.template import encode_prompt, load_tokenizer
from raylign.trainers.stages import DataConfig


def test_a_question_and_its_answer_must_fit_in_what_is_served(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("short", "a longer question")]
    longest = len(encode_prompt(tokenizer, rows[1]["prompt"]))
    evaluation = EvaluationConfig(data=DataConfig(path="held-out.jsonl"), rewards=[MathReward()], max_tokens=9)
    _check_room(evaluation, ServeConfig(alias="a", max_length=longest + 9), rows, tokenizer)
    with pytest.raises(InputError, match=r"held-out.jsonl, row 2: .* raise serve.max_length"):
        _check_room(evaluation, ServeConfig(alias="a", max_length=longest + 8), rows, tokenizer)
