"""What a stage would train on, proven before any actor starts: counts, refusals, masks, and overlap with evaluation."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...cluster.errors import InputError
from ..config import stage_name
from ..stages import (
    CptStage,
    DistillStage,
    DpoStage,
    KtoStage,
    OnlineStage,
    OrpoStage,
    ProcessRewardModelStage,
    RewardModelStage,
    SftStage,
    SimpoStage,
    StageConfig,
)
from .files import Place, Row
from .template import (
    IGNORED,
    Encoded,
    EncodedAnswer,
    EncodedPair,
    Tokenizer,
    encode_answer,
    encode_conversation,
    encode_pair,
    encode_prompt,
    encode_steps,
    encode_text,
    stop_tokens,
)

if TYPE_CHECKING:
    from rich.text import Text

EncodedRow = Encoded | EncodedPair | EncodedAnswer


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that cannot be trained on; rows count from 1."""

    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The encoded rows of one stage and what is wrong with the others; lengths are in tokens."""

    stage: str
    rows: int
    encoded: tuple[EncodedRow, ...]
    refusals: tuple[Refusal, ...]
    tokens: int
    supervised: int
    longest: int
    cut: int
    """Rows that `truncate` shortened."""
    path: str
    """The data file, as the recipe has it."""
    places: tuple[Place, ...] = ()
    """Where each row stands, where that is known."""

    def require(self) -> tuple[EncodedRow, ...]:
        """The encoded rows. Raises `InputError` with the first refusal if there is any."""
        if self.refusals:
            first = self.refusals[0]
            more = f" (and {len(self.refusals) - 1} more rows are refused)" if len(self.refusals) > 1 else ""
            where = self.places[first.row - 1] if self.places else self.path
            raise InputError(f"{where}: stage {self.stage}, data row {first.row}: {first.reason}{more}")
        return self.encoded

    def facts(self) -> dict[str, object]:
        """The proof as JSON: counts, and each refusal with its row."""
        return {
            "stage": self.stage,
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "longest": self.longest,
            "cut": self.cut,
            "refused": len(self.refusals),
            "refusals": [{"row": r.row, "reason": r.reason} for r in self.refusals[:20]],
        }


def prove_stage(
    stage: StageConfig,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, Any]] = (),
    places: Sequence[Place] = (),
) -> Proof:
    """Encode every row as the stage will train on it (online: the prompts, of which no token is
    supervised, or with demonstrations their answers). `tools` are those that prompts show, as JSON schemas;
    `places` say where rows stand, for refusals."""
    stops = stop_tokens(tokenizer)
    encoded: list[EncodedRow] = []
    refusals: list[Refusal] = []
    for number, row in enumerate(rows, 1):
        try:
            encoded.append(_encode(stage, row, tokenizer, stops, tools))
        except InputError as error:
            refusals.append(Refusal(number, str(error)))
    lengths = [_lengths(e) for e in encoded]
    return Proof(
        stage=stage_name(stage),
        rows=len(rows),
        encoded=tuple(encoded),
        refusals=tuple(refusals),
        tokens=sum(tokens for tokens, _, _ in lengths),
        supervised=sum(supervised for _, supervised, _ in lengths),
        longest=max((longest for _, _, longest in lengths), default=0),
        cut=sum(e.cut for e in encoded),
        path=stage.data.path,
        places=tuple(places),
    )


def _encode(
    stage: StageConfig, row: Row, tokenizer: Tokenizer, stops: frozenset[int], tools: Sequence[dict[str, Any]]
) -> EncodedRow:
    match stage:
        case CptStage():
            return encode_text(tokenizer, row["text"], stage.max_length, truncate=stage.truncate)
        case SftStage() | DistillStage():
            limit, cut = stage.max_length, stage.truncate
            called = row.get("tools", ())
            return encode_conversation(tokenizer, row["messages"], limit, truncate=cut, stops=stops, tools=called)
        case DpoStage() | OrpoStage() | SimpoStage() | RewardModelStage():
            pair = (row["prompt"], row["chosen"], row["rejected"])
            return encode_pair(tokenizer, *pair, stage.max_length, truncate=stage.truncate, stops=stops)
        case KtoStage():
            answer = (row["prompt"], row["completion"], row["label"])
            return encode_answer(tokenizer, *answer, stage.max_length, truncate=stage.truncate, stops=stops)
        case ProcessRewardModelStage():
            steps, cut = (row["prompt"], row["completions"], row["labels"]), stage.truncate
            return encode_steps(tokenizer, *steps, stage.max_length, separator=stage.separator, truncate=cut)
        case OnlineStage() if stage.demonstrations:
            return _encode_demonstration(stage, row, tokenizer, stops)
        case OnlineStage():
            ids = encode_prompt(tokenizer, row["prompt"], tools)
            _check_prompt(stage, len(ids))
            return Encoded(ids, [IGNORED] * len(ids), ())


def _encode_demonstration(stage: OnlineStage, row: Row, tokenizer: Tokenizer, stops: frozenset[int]) -> Encoded:
    """A prompt and the answer to it, whose tokens are learned."""
    messages = [*row["prompt"], *row["completion"]]
    longest = stage.rollout.sampling.max_tokens
    whole = encode_conversation(tokenizer, messages, sys.maxsize, stops=stops)
    start, end = whole.spans[-1]
    _check_prompt(stage, start)
    if end - start > longest:
        raise InputError(
            f"an answer of {end - start} tokens, more than rollout.sampling.max_tokens {longest}: raise it or drop the "
            "row"
        )
    ids = whole.input_ids[:end]
    return Encoded(ids, [IGNORED] * start + ids[start:], ((start, end),))


def _check_prompt(stage: OnlineStage, tokens: int) -> None:
    limit = stage.rollout.max_prompt_tokens
    if tokens > limit:
        raise InputError(f"{tokens} tokens, more than rollout.max_prompt_tokens {limit}: raise it or drop the row")


def _lengths(encoded: EncodedRow) -> tuple[int, int, int]:
    """Tokens a step reads, tokens it is trained on, and the longest sequence of one row."""
    if isinstance(encoded, Encoded):
        return len(encoded.input_ids), encoded.supervised, len(encoded.input_ids)
    if isinstance(encoded, EncodedAnswer):
        tokens = len(encoded.prompt_ids) + len(encoded.completion_ids)
        return tokens, len(encoded.completion_ids), tokens
    prompt, chosen, rejected = len(encoded.prompt_ids), len(encoded.chosen_ids), len(encoded.rejected_ids)
    return 2 * prompt + chosen + rejected, chosen + rejected, prompt + max(chosen, rejected)


# ---- the mask in colour

SUPERVISED, MASKED = ("bold green", "bold cyan"), ("dim", "dim italic")
"""Styles of tokens that count and that do not; each pair alternates, so that token borders show."""


def render_mask(encoded: EncodedRow, tokenizer: Tokenizer) -> "Text":
    """The row token by token: what the loss counts in bold colour, the rest dim, line breaks drawn as ⏎."""
    from rich.text import Text

    if isinstance(encoded, Encoded):
        return _coloured(encoded.input_ids, encoded.labels, tokenizer)
    text = Text()
    if isinstance(encoded, EncodedAnswer):
        text.append("wanted: " if encoded.label else "not wanted: ", "bold")
        ids = [*encoded.prompt_ids, *encoded.completion_ids]
        labels = [IGNORED] * len(encoded.prompt_ids) + encoded.completion_ids
        return text.append_text(_coloured(ids, labels, tokenizer))
    for name, answer in (("chosen", encoded.chosen_ids), ("rejected", encoded.rejected_ids)):
        text.append(f"{name}: ", "bold")
        ids = [*encoded.prompt_ids, *answer]
        text.append_text(_coloured(ids, [IGNORED] * len(encoded.prompt_ids) + answer, tokenizer)).append("\n")
    return text


def _coloured(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> "Text":
    from rich.text import Text

    text = Text()
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        styles = MASKED if label == IGNORED else SUPERVISED
        text.append(tokenizer.decode([token]).replace("\n", "⏎\n"), styles[position % 2])
    return text


# ---- evaluation against training


def overlap(evaluation: Sequence[Row], training: Iterable[Row]) -> list[str]:
    """Evaluation prompts (their last user message) that training rows of any kind hold.

    In conversations, pairs and prompts a user message must be the same text; in plain text it must stand
    there with no letter or digit against it.
    """
    asked: set[str] = set()
    texts: list[str] = []
    for row in training:
        if "text" in row:
            texts.append(row["text"])
        for message in [*row.get("messages", ()), *row.get("prompt", ())]:
            if message["role"] == "user":
                asked.add(message["content"].strip())
    corpus = "\0".join(texts)
    return [p for p in dict.fromkeys(map(_question, evaluation)) if p in asked or _stands_in(p, corpus)]


def refuse_overlap(evaluation: Sequence[Row], training: Iterable[Row], stage: str) -> None:
    """Raise `InputError` where a stage trains on what the evaluation asks."""
    found = overlap(evaluation, training)
    if found:
        raise InputError(
            f"stage {stage} trains on {len(found)} of the evaluation's prompts, the first is {found[0][:80]!r}: "
            "take them out of the one or the other, or the accuracy says nothing"
        )


def _question(row: Row) -> str:
    return next((m["content"].strip() for m in reversed(row["prompt"]) if m["role"] == "user"), "")


def _stands_in(prompt: str, corpus: str) -> bool:
    if not prompt or prompt not in corpus:
        return False
    return re.search(rf"(?<!\w){re.escape(prompt)}(?!\w)", corpus) is not None
