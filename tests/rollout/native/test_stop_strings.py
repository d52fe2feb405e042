"""Stop strings are found at the token that completes them, however text is cut into tokens."""

import random
from pathlib import Path
from typing import Any

import pytest
from raylign.rollout.native.stop_strings import StopStrings
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """A token for each byte, so that letters beyond ASCII are several."""
    return AutoTokenizer.from_pretrained(tiny_model)


def first_stop(watch: StopStrings, ids: list[int]) -> int | None:
    """How many tokens were pushed when the first string was complete."""
    return next((i for i, token in enumerate(ids, 1) if watch.push(token)), None)


@pytest.mark.parametrize(
    ("text", "stops", "rest"),
    [
        ("one two three", ("two",), " three"),
        ("a\n\nb", ("\n\n",), "b"),
        ("naïve café au lait", ("café",), " au lait"),
        ("数は七 🙂🙂 終", ("🙂🙂",), " 終"),
        ("x <|im_end|> y", ("<|im_end|>",), " y"),
        ("aaab", ("aab", "aaa"), "b"),
        ("never", ("no such text", ""), None),
        ("x" * 300 + "end of it" + "y" * 9, ("end of it",), "y" * 9),
    ],
)
def test_the_row_ends_with_the_token_that_completes_a_string(
    tokenizer: Any, text: str, stops: tuple[str, ...], rest: str | None
):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = None if rest is None else len(ids) - len(tokenizer(rest, add_special_tokens=False)["input_ids"])
    assert first_stop(StopStrings(tokenizer, stops), ids) == expected


def test_random_bytes_give_what_decoding_everything_at_every_token_gives(tokenizer: Any):
    rng = random.Random(5)
    pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in ("a", "b", "é", "七", "🙂")]
    for _ in range(60):
        # Whole letters, and now and then only the first byte of one.
        ids = [token for _ in range(120) for token in rng.choice(pieces)[: rng.choice((4, 4, 4, 1))]]
        stops = tuple("".join(rng.choices("abé七🙂", k=rng.randint(2, 4))) for _ in range(2))
        texts = (tokenizer.decode(ids[:i], skip_special_tokens=False) for i in range(1, len(ids) + 1))
        expected = next((i for i, text in enumerate(texts, 1) if any(stop in text for stop in stops)), None)
        assert first_stop(StopStrings(tokenizer, stops), ids) == expected
