"""From messages to tokens, with a proof of which tokens the loss counts.

A token is supervised when the assistant says it: its text and the stop token that ends it, nothing before and nothing
after (ChatML's newline behind `<|im_end|>` is the template's). Where the chat template carries `{% generation %}`
marks they decide; elsewhere each turn is rendered twice, as the prompt the model will see when it is served and as
the conversation it is trained on, and the first must begin the second, as text and as tokens. What cannot be proven
is refused with `InputError`, never guessed: a wrong mask trains for a night without a visible sign.

Labels are token ids, or -100 where the loss does not count; both lists have the length of the row.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from ...cluster.errors import InputError
from ...cluster.imports import importing
from ...rollout.chat import encode_prompt as encode_prompt
from ...rollout.chat import stop_tokens as stop_tokens
from .messages import Message

IGNORED = -100
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer, whose own annotations are too wide to check against."""

    name_or_path: str
    eos_token: str | None
    eos_token_id: int | None
    chat_template: str | None
    all_special_tokens: list[str]

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any: ...

    def get_chat_template(self) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def save_pretrained(self, save_directory: Path) -> Any: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row: `input_ids` `[T]`, `labels` `[T]`, and the supervised token ranges `[start, end)`."""

    input_ids: list[int]
    labels: list[int]
    spans: tuple[tuple[int, int], ...]
    cut: bool = False
    """Whether `truncate` took tokens off its end."""

    @property
    def supervised(self) -> int:
        """How many tokens the loss counts."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One preference pair: the tokens of the prompt and of either answer, stop token included."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """One answer and whether it is wanted: the tokens of its prompt and its own, stop token included."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool
    cut: bool = False


def load_tokenizer(path: Path | str, *, chat: bool = True) -> Tokenizer:
    """The tokenizer of a model folder or hub id; with `chat` it must have a chat template.

    Raises `InputError` where there is none.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise InputError(f"{path} has no tokenizer: save one there with tokenizer.save_pretrained")
    try:
        with importing():  # most of transformers comes with its first object
            from transformers import AutoTokenizer

            tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(str(path)))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    if chat and not tokenizer.chat_template:
        raise InputError(
            f"{path} has no chat template: put chat_template.jinja beside the tokenizer, or start from the model's "
            "instruction-tuned tokenizer"
        )
    return tokenizer


# ---- one row of each kind


def encode_text(tokenizer: Tokenizer, text: str, max_length: int, *, truncate: bool = False) -> Encoded:
    """A document for pre-training: every token counts.

    The tokenizer's own beginning-of-text token is put before it where it has one, and its end token behind it, unless
    the document ends with it already (a conversation written out in the model's chat form does).
    """
    if not text.strip():
        raise InputError("the text is empty")
    ids: list[int] = list(tokenizer(text)["input_ids"])
    stop, written = tokenizer.eos_token_id, tokenizer.eos_token
    if stop is not None and written and not text.rstrip().endswith(written) and ids[-1] != stop:
        ids.append(stop)
    return _fit(ids, ((0, len(ids)),), max_length, truncate)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_length: int,
    *,
    truncate: bool = False,
    stops: frozenset[int] | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> Encoded:
    """A conversation whose supervised tokens are what the assistant says, stop tokens included.

    `stops` is `stop_tokens(tokenizer)` unless given; `tools` are those the conversation may call.
    """
    stops = stop_tokens(tokenizer) if stops is None else stops
    _check_messages(tokenizer, messages)
    marked = _MARKS.search(tokenizer.get_chat_template() or "")
    ids, spans = (_marked if marked else _by_prefix)(tokenizer, messages, stops, tools)
    _check_tools(tokenizer, messages, ids, tools)
    if not any(ids[end - 1] in stops for _, end in spans):
        raise InputError(
            f"no stop token ({_shown(tokenizer, stops)}) is supervised: the model would never learn to stop; end the "
            "assistant's turn with it in the chat template, inside the {% generation %} marks if there are any"
        )
    if all(end - start == 1 and ids[start] in stops for start, end in spans):
        raise InputError("no supervised tokens: the assistant's message is empty")
    return _fit(ids, spans, max_length, truncate)


def encode_pair(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    max_length: int,
    *,
    truncate: bool = False,
    stops: frozenset[int] | None = None,
) -> EncodedPair:
    """A preference pair; both answers follow exactly the prompt the model is served with."""
    stops = stop_tokens(tokenizer) if stops is None else stops
    start, answers = 0, []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            start, ids = _last_turn(tokenizer, [*prompt, *answer], stops)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        answers.append(ids)
    if answers[0] == answers[1]:
        raise InputError("chosen and rejected are the same: such a pair teaches nothing")
    longest = max(len(a) for a in answers)
    if longest > max_length and not truncate:
        raise InputError(_too_long(longest, max_length))
    if start >= max_length:
        raise InputError(f"no supervised tokens: the first {max_length} tokens are all prompt; raise max_length")
    cut = [a[:max_length] for a in answers]
    return EncodedPair(cut[0][:start], cut[0][start:], cut[1][start:], cut != answers)


def encode_answer(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    answer: Sequence[Message],
    label: bool,
    max_length: int,
    *,
    truncate: bool = False,
    stops: frozenset[int] | None = None,
) -> EncodedAnswer:
    """One answer to the prompt that the model is served with, and whether it is wanted."""
    start, ids = _last_turn(tokenizer, [*prompt, *answer], stop_tokens(tokenizer) if stops is None else stops)
    whole = _fit(ids, ((start, len(ids)),), max_length, truncate)
    return EncodedAnswer(whole.input_ids[:start], whole.input_ids[start:], label, whole.cut)


def encode_steps(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    steps: Sequence[str],
    labels: Sequence[bool],
    max_length: int,
    *,
    separator: str,
    truncate: bool = False,
) -> Encoded:
    """An answer in steps, each ended by `separator`: the label at a step's last token is 1 if it is right, else 0."""
    _check_messages(tokenizer, [*prompt, {"role": "assistant", "content": separator.join(steps)}])
    ids, marks = list(encode_prompt(tokenizer, list(prompt))), []
    end = _ids(tokenizer, separator)
    for step, label in zip(steps, labels, strict=True):
        ids += _ids(tokenizer, step) + end
        marks.append((len(ids) - 1, int(label)))
    if len(ids) > max_length and not truncate:
        raise InputError(_too_long(len(ids), max_length))
    kept = [(at, label) for at, label in marks if at < max_length]
    if not kept:
        raise InputError(f"no step ends within the first {max_length} tokens: raise max_length")
    labelled = [IGNORED] * min(len(ids), max_length)
    for at, label in kept:
        labelled[at] = label
    return Encoded(ids[:max_length], labelled, tuple((at, at + 1) for at, _ in kept), len(ids) > max_length)


# ---- which tokens the assistant says


def _last_turn(tokenizer: Tokenizer, messages: Sequence[Message], stops: frozenset[int]) -> tuple[int, list[int]]:
    """Where the answer that ends a conversation begins, and the tokens up to its end."""
    _check_messages(tokenizer, messages)
    full = _render(tokenizer, messages)
    start, end, ids = _turn(tokenizer, messages, len(messages) - 1, full, _ids(tokenizer, full), stops)
    return start, ids[:end]


def _by_prefix(
    tokenizer: Tokenizer, messages: Sequence[Message], stops: frozenset[int], tools: Sequence[dict[str, Any]]
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """The row's tokens and supervised ranges, by rendering each turn's prompt."""
    full = _render(tokenizer, messages, tools=tools)
    ids = _ids(tokenizer, full)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return ids, tuple(_turn(tokenizer, messages, i, full, ids, stops, tools)[:2] for i in turns)


def _turn(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    index: int,
    full: str,
    ids: list[int],
    stops: frozenset[int],
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[int, int, list[int]]:
    """First and last supervised token of one assistant turn, and the row's tokens."""
    prompt = _render(tokenizer, messages[:index], prompt=True, tools=tools)
    through = full if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1], tools=tools)
    if not through.startswith(prompt):
        raise InputError(
            f"messages[{index}]: the chat template renders the prompt differently when the answer follows, at "
            f"{_difference(prompt, through)}; training on it would not match what is served: "
            "use a template with {% generation %} marks, or one that renders both alike"
        )
    if not full.startswith(through):
        raise InputError(
            f"messages[{index}]: the chat template rewrites this turn when later ones follow, at "
            f"{_difference(through, full)}: split the conversation after it, or use a template that keeps history"
        )
    before = _ids(tokenizer, prompt)
    said = ids if through is full else _ids(tokenizer, through)
    start, end = len(before), len(said)
    if before != ids[:start] or said != ids[:end]:
        raise InputError(
            f"messages[{index}]: the end of the prompt and the start of the answer merge into one token, so the "
            "training prompt is not the one that is served: end the generation prompt on a token boundary"
        )
    stop = max((i for i in range(start, end) if ids[i] in stops), default=None)
    return start, end if stop is None else stop + 1, ids


def _marked(
    tokenizer: Tokenizer, messages: Sequence[Message], stops: frozenset[int], tools: Sequence[dict[str, Any]]
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """The row's tokens and supervised ranges, by the template's own `{% generation %}` marks."""
    encoded = _jinja(
        partial(
            tokenizer.apply_chat_template,
            tools=list(tools) or None,
            return_dict=True,
            return_assistant_tokens_mask=True,
        ),
        messages,
    )
    mask = [0, *encoded["assistant_masks"], 0]
    edges = [i for i in range(len(mask) - 1) if mask[i] != mask[i + 1]]
    spans = tuple(zip(edges[::2], edges[1::2], strict=True))
    if not spans:
        raise InputError("no supervised tokens: the template's {% generation %} marks enclose none of the messages")
    return list(encoded["input_ids"]), spans


def _check_messages(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Refuse what would train nothing, or end a turn in its middle."""
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no supervised tokens: the conversation has no assistant message")
    if messages[0]["role"] == "assistant":
        raise InputError("the conversation begins with an assistant message: there is no prompt that it answers")
    for index, message in enumerate(messages):
        for token in tokenizer.all_special_tokens:
            if token in message["content"] or token in str(message.get("tool_calls", "")):
                raise InputError(f"messages[{index}] contains the control token {token!r}: take it out of the text")


def _check_tools(
    tokenizer: Tokenizer, messages: Sequence[Message], ids: list[int], tools: Sequence[dict[str, Any]]
) -> None:
    """Refuse a row whose tools or calls the chat template leaves out: the loss would never see them."""
    called = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    if not called and not tools:
        return
    rendered = tokenizer.decode(ids)
    for function in [*called, *(tool["function"] for tool in tools)]:
        if function["name"] not in rendered:
            raise InputError(
                f"the chat template leaves out the tool {function['name']!r}: use the template of a model that calls "
                "tools, or write tools and calls as text"
            )


def _fit(ids: list[int], spans: tuple[tuple[int, int], ...], max_length: int, truncate: bool) -> Encoded:
    """The row with its labels, cut to `max_length` where that is allowed."""
    if len(ids) > max_length and not truncate:
        raise InputError(_too_long(len(ids), max_length))
    kept = tuple((start, min(end, max_length)) for start, end in spans if start < max_length)
    if not kept:
        raise InputError(f"no supervised tokens: the first {max_length} tokens are all prompt; raise max_length")
    labels = [IGNORED] * min(len(ids), max_length)
    for start, end in kept:
        labels[start:end] = ids[start:end]
    return Encoded(ids[:max_length], labels, kept, len(ids) > max_length)


def _too_long(length: int, max_length: int) -> str:
    return f"{length} tokens, more than max_length {max_length}: raise it, drop the row, or set `truncate: true`"


# ---- the tokenizer


def _jinja(render: Callable[[list[Message]], Any], messages: Sequence[Message]) -> Any:
    from jinja2 import TemplateError

    try:
        return render([dict(m) for m in messages])
    except TemplateError as error:
        raise InputError(f"the chat template refuses these messages: {error}") from None


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    options = {"tokenize": False, "add_generation_prompt": prompt, "tools": list(tools) or None}
    return _jinja(partial(tokenizer.apply_chat_template, **options), messages)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _shown(tokenizer: Tokenizer, stops: frozenset[int]) -> str:
    return ", ".join(repr(tokenizer.decode([i])) for i in sorted(stops)) or "the tokenizer has none"


def _difference(a: str, b: str) -> str:
    """Where two renderings part, with a little of both."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"character {at} ({a[at : at + 20]!r} against {b[at : at + 20]!r})"
