"""Which tokens are supervised, worked out by hand on a byte-level tokenizer: one token a character."""

from pathlib import Path

import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.data.template import (
    Encoded,
    Tokenizer,
    encode_conversation,
    encode_pair,
    encode_prompt,
    encode_text,
    load_tokenizer,
    stop_tokens,
)

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_STOP = MARKED.replace(
    "{{ m.content }}<|im_end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
)
# Like templates that drop a former turn's reasoning once another turn follows.
REWRITES = PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}",
)
# Like templates that put an empty thought before every answer but not into the prompt.
OTHER_PROMPT = PLAIN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
NO_STOP = PLAIN.replace("<|im_end|>", "")
REFUSES = "{{ raise_exception('roles must alternate') }}"

ONE_TURN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "2?"}, {"role": "assistant", "content": "<t></think>3"}]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


def said(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The supervised text, span by span."""
    return [tokenizer.decode(encoded.input_ids[a:b]) for a, b in encoded.spans]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_loss_counts_the_answer_and_its_stop_token(tokenizer: Tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    encoded = encode_conversation(tokenizer, ONE_TURN, 64)
    # <|im_start|> u s e r \n h i <|im_end|> \n = 10 tokens, <|im_start|> a s s i s t a n t \n = 11, y o <|im_end|>, \n
    assert len(encoded.input_ids) == 25
    assert encoded.spans == ((21, 24),)
    assert encoded.labels[:21] == [-100] * 21
    assert encoded.labels[21:24] == encoded.input_ids[21:24]
    assert encoded.labels[24] == -100
    assert said(tokenizer, encoded) == ["yo<|im_end|>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_every_assistant_turn_counts(tokenizer: Tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    encoded = encode_conversation(tokenizer, TWO_TURNS, 128)
    assert said(tokenizer, encoded) == ["yo<|im_end|>", "<t></think>3<|im_end|>"]
    assert encoded.supervised == 3 + 13


def test_training_begins_with_the_tokens_of_the_served_prompt(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(tokenizer, TWO_TURNS, 128)
    for turn, (start, _) in zip((1, 3), encoded.spans, strict=True):
        assert encoded.input_ids[:start] == encode_prompt(tokenizer, TWO_TURNS[:turn])


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (OTHER_PROMPT, ONE_TURN, "renders the prompt differently"),
        (NO_STOP, ONE_TURN, "no stop token"),
        (MARKED_WITHOUT_STOP, ONE_TURN, "no stop token"),
        (REFUSES, ONE_TURN, "roles must alternate"),
        (PLAIN, ONE_TURN[:1], "no assistant message"),
        (PLAIN, ONE_TURN[1:], "begins with an assistant message"),
        (PLAIN, [ONE_TURN[0], {"role": "assistant", "content": ""}], "the assistant's message is empty"),
        (PLAIN, [{"role": "user", "content": "<|im_end|>"}, ONE_TURN[1]], "control token '<|im_end|>'"),
    ],
)
def test_what_cannot_be_proven_is_refused(
    tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], says: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError) as caught:
        encode_conversation(tokenizer, messages, 128)
    assert says in str(caught.value)


def test_a_template_that_rewrites_history_is_refused_only_where_it_does(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = REWRITES
    assert said(tokenizer, encode_conversation(tokenizer, TWO_TURNS, 128)) == [
        "yo<|im_end|>",
        "<t></think>3<|im_end|>",
    ]
    thinking = [ONE_TURN[0], {"role": "assistant", "content": "hm</think>yo"}, *TWO_TURNS[2:]]
    with pytest.raises(InputError, match="rewrites this turn"):
        encode_conversation(tokenizer, thinking, 128)


def test_a_long_row_is_refused_and_cut_only_when_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="25 tokens, more than max_length 22"):
        encode_conversation(tokenizer, ONE_TURN, 22)
    cut = encode_conversation(tokenizer, ONE_TURN, 22, truncate=True)
    assert (len(cut.input_ids), cut.spans, cut.cut) == (22, ((21, 22),), True)
    with pytest.raises(InputError, match="no supervised tokens"):
        encode_conversation(tokenizer, ONE_TURN, 20, truncate=True)


def test_text_ends_with_one_end_token(tokenizer: Tokenizer) -> None:
    assert encode_text(tokenizer, "ab", 8).input_ids[-1] == tokenizer.eos_token_id
    assert encode_text(tokenizer, "ab", 8).spans == ((0, 3),)
    written_out = encode_text(tokenizer, "<|im_start|>user\nhi<|im_end|>\n", 32)
    assert written_out.input_ids.count(tokenizer.eos_token_id) == 1


def test_a_pair_shares_the_served_prompt(tokenizer: Tokenizer) -> None:
    pair = encode_pair(tokenizer, ONE_TURN[:1], ONE_TURN[1:], [{"role": "assistant", "content": "no"}], 64)
    assert pair.prompt_ids == encode_prompt(tokenizer, ONE_TURN[:1])
    assert tokenizer.decode(pair.chosen_ids) == "yo<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "no<|im_end|>"
    with pytest.raises(InputError, match="the same"):
        encode_pair(tokenizer, ONE_TURN[:1], ONE_TURN[1:], ONE_TURN[1:], 64)


def test_control_tokens_in_a_prompt_are_plain_text(tokenizer: Tokenizer) -> None:
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}])
    assert ids.count(tokenizer.eos_token_id) == 1


def test_stop_tokens_include_those_of_the_generation_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert stop_tokens(load_tokenizer(tmp_path)) == {tokenizer.eos_token_id, 5, 6}


def test_a_folder_without_tokenizer_or_template_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no chat template"):
        load_tokenizer(tmp_path)
    load_tokenizer(tmp_path, chat=False)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLING = PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
).replace("{% for m in messages %}", "{{ tools | tojson if tools }}{% for m in messages %}", 1)


def test_a_template_writes_tools_and_calls_or_the_row_is_refused(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [ONE_TURN[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(InputError, match="leaves out the tool 'add'"):
        encode_conversation(tokenizer, messages, 512, tools=TOOLS)
    tokenizer.chat_template = CALLING
    encoded = encode_conversation(tokenizer, messages, 512, tools=TOOLS)
    (answer,) = said(tokenizer, encoded)
    assert answer == '{"name": "add", "arguments": {"a": 2}}<|im_end|>'
    assert encoded.input_ids[: encoded.spans[0][0]] == encode_prompt(tokenizer, messages[:1], TOOLS)
