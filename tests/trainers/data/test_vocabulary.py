"""Tokenizers and templates of another model are refused."""

import json
from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.data.template import load_tokenizer
from raylign.trainers.data.vocabulary import check_vocabulary


@pytest.mark.parametrize("nested", [False, True])
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    tiny_model: Path, tmp_path: Path, nested: bool
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    size = max(tokenizer.get_vocab().values()) + 1
    for rows in (size, size - 1):
        config = {"vocab_size": rows}
        (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
        if rows == size:
            check_vocabulary(tokenizer, tmp_path)
            continue
        with pytest.raises(InputError, match=f"highest token is {rows}, but the model has embeddings for {rows}"):
            check_vocabulary(tokenizer, tmp_path)


def test_a_template_of_another_model_is_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    check_vocabulary(tokenizer, tiny_model)
    tokenizer.chat_template = "<|start_header_id|>{{ messages[0].role }}<|end_header_id|>"
    with pytest.raises(InputError, match=r"writes '<\|start_header_id\|>', which is no token of its tokenizer"):
        check_vocabulary(tokenizer, tiny_model)
