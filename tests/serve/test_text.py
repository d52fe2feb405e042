"""Pieces of text join to the decoded whole, for characters of several bytes, garbage and stop strings."""

import random
from pathlib import Path

import pytest
from raylign.serve.text import IncrementalText
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model)


def _pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    text = IncrementalText(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), stops)
    return [*(text.push(token) for token in ids), text.finish()]


def test_a_character_of_several_tokens_comes_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("a€b👍")
    assert _pieces(tokenizer, ids) == ["a", "", "", "€", "b", "", "", "", "👍", ""]


def test_pieces_of_random_bytes_join_to_the_decoded_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(5)
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(60)]
        assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_an_unfinished_character_comes_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("x€")[:-1]
    assert _pieces(tokenizer, ids) == ["x", "", "", "�"]


def test_leading_spaces_of_words_are_kept(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    words = Tokenizer(models.WordLevel({"<s>": 0, "▁Hello": 1, "▁world": 2, "!": 3}, unk_token="!"))
    words.add_special_tokens(["<s>"])
    words.decoder = decoders.Metaspace()
    ids = [1, 0, 2, 0, 0, 2, 3]
    text = IncrementalText(lambda tokens: words.decode(tokens, skip_special_tokens=True))
    assert "".join([*(text.push(token) for token in ids), text.finish()]) == "Hello world world!"


@pytest.mark.parametrize(
    ("said", "stops", "kept"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("EENDx", ("END",), "E"),
        ("abc", ("c", "bc"), "a"),
        ("ends in EN", ("END",), "ends in EN"),
        ("a€b", ("€",), "a"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(
    tokenizer: PreTrainedTokenizerFast, said: str, stops: tuple[str, ...], kept: str
) -> None:
    pieces = _pieces(tokenizer, tokenizer.encode(said), stops)
    assert "".join(pieces) == kept


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: PreTrainedTokenizerFast) -> None:
    assert _pieces(tokenizer, tokenizer.encode("aENd"), ("END",)) == ["a", "", "", "ENd", ""]
