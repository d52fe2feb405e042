"""The service without HTTP: which model a request means, its prompt in tokens, and the text that comes back."""

import secrets
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cluster.errors import InputError, NotFound
from ..rollout.chat import encode_prompt, stop_tokens
from ..rollout.engine import TokenEvent
from ..rollout.engine_thread import EngineThread
from ..rollout.records import GenerationRequest, Sampling, SeedKey
from .bridge import Bridge
from .protocol import MAX_CHOICES, ApiError, GenerationFields, Message, bad_request
from .registry import Entry, Registry
from .text import IncrementalText


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one choice has gained since its last piece; the last one carries the reason it ended."""

    choice: int
    text: str
    tokens: list[int]
    """Sampled tokens that are part of the text (a stop token is not), with their log-probs."""
    logprobs: list[float]
    sampled: int
    """Tokens generated, the stop token included."""
    finish_reason: str | None


@dataclass(slots=True)
class _Row:
    """A completion that is being generated."""

    choice: int
    text: IncrementalText
    pieces: list[str] = field(default_factory=list)


class Service:
    """One base model, every adapter of it in the registry, one engine; all methods but `__init__` on one event loop."""

    def __init__(self, *, engine: EngineThread, tokenizer: Any, registry: Registry, base: Entry) -> None:
        self.base = base
        self._bridge = Bridge(engine)
        self._tokenizer = tokenizer
        self._registry = registry
        self._stop_tokens = tuple(sorted(stop_tokens(tokenizer)))
        self.max_length: int = engine.call(lambda owned: owned.max_length).result()

    async def select(self, name: str) -> Entry:
        """The entry a request's `model` means, ready to generate.

        Raises a 404 for a name that is not there or sits on another base.
        """
        entry = self.entry(name)
        if entry.kind == "adapter":
            await self._bridge.load_adapter(entry.digest, lambda: self._registry.read_adapter(entry))
        return entry

    def entry(self, name: str) -> Entry:
        """The registry's entry of a model that this service has; raises a 404 otherwise."""
        try:
            entry = self._registry.resolve(name)
        except (NotFound, InputError) as error:
            raise _no_model(str(error)) from None
        if entry.base != self.base.digest:
            raise _no_model(
                f"model {name!r} sits on base {entry.base[:12]}; this service has base {self.base.digest[:12]}"
            )
        return entry

    def models(self) -> dict[str, Entry]:
        """What may be asked for, by id: every alias, and the digest of what has none."""
        entries = {e.digest: e for e in self._registry.entries() if e.base == self.base.digest}
        aliases = {name: entries[digest] for name, digest in self._registry.aliases().items() if digest in entries}
        named = {entry.digest for entry in aliases.values()}
        return aliases | {digest: entry for digest, entry in entries.items() if digest not in named}

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation in tokens, through the model's own template, open for the assistant's turn.

        Raises a 400 where the model has no template, or it refuses the messages.
        """
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return encode_prompt(self._tokenizer, turns)
        except InputError as error:
            if self._tokenizer.chat_template:
                raise bad_request(str(error), param="messages") from None
            raise bad_request(f"{error}: ask /v1/completions", param="model") from None

    def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """A prompt in tokens. Raises a 400 for tokens that the model does not have."""
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        if not all(0 <= token < len(self._tokenizer) for token in prompt):
            raise bad_request(f"prompt has tokens outside 0..{len(self._tokenizer) - 1}", param="prompt")
        return prompt

    async def generate(
        self, entry: Entry, prompts: Sequence[list[int]], fields: GenerationFields, limit: int | None
    ) -> AsyncGenerator[list[Piece], None]:
        """Draw `fields.n` completions of each prompt; choice `p * n + i` is completion `i` of prompt `p`.

        `limit` is the most tokens of one; by default whatever room there is. Raises a 400 for what does not fit.
        """
        requests = self._requests(entry, prompts, fields, limit)
        rows = {
            (request.request_id, i): _Row(p * fields.n + i, IncrementalText(self._decode, fields.stops))
            for p, request in enumerate(requests)
            for i in range(fields.n)
        }
        async with aclosing(self._bridge.stream(requests)) as steps:
            async for events in steps:
                by_row: defaultdict[tuple[str, int], list[TokenEvent]] = defaultdict(list)
                for event in events:
                    by_row[event.request_id, event.index].append(event)
                yield [self._piece(rows[key], its_events) for key, its_events in by_row.items()]

    def token_text(self, token: int) -> str:
        """One token as text, for log-probs."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    async def busy(self, timeout: float = 30.0) -> bool:
        """Whether the engine has work; raises `TimeoutError` when it does not answer in `timeout` seconds."""
        return await self._bridge.busy(timeout)

    def _requests(
        self, entry: Entry, prompts: Sequence[list[int]], fields: GenerationFields, limit: int | None
    ) -> list[GenerationRequest]:
        if not prompts or not all(prompts):
            raise bad_request("the prompt is empty", param="prompt")
        if len(prompts) * fields.n > MAX_CHOICES:
            raise bad_request(f"{len(prompts)} prompts with n = {fields.n} are more than {MAX_CHOICES}", param="n")
        seed = secrets.randbits(63) if fields.seed is None else fields.seed % 2**63
        name = uuid.uuid4().hex
        return [
            GenerationRequest(
                request_id=f"{name}/{p}",
                prompt=np.array(prompt, np.int32),
                sampling=Sampling(
                    temperature=fields.temperature,
                    top_p=fields.top_p,
                    max_tokens=self._room(len(prompt), limit),
                    stop_token_ids=self._stop_tokens,
                    stop=fields.stops,
                ),
                seed=SeedKey(seed, 0, p),
                n=fields.n,
                adapter=entry.digest if entry.kind == "adapter" else None,
            )
            for p, prompt in enumerate(prompts)
        ]

    def _room(self, prompt: int, limit: int | None) -> int:
        room = self.max_length - prompt
        if room < 1 or (limit or 0) > room:
            raise bad_request(
                f"{prompt} prompt tokens and {limit or 1} new ones are more than the {self.max_length} this service "
                "holds: shorten the prompt or lower max_tokens",
                param="max_tokens" if room > 0 else None,
                code="context_length_exceeded",
            )
        return limit or room

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _piece(self, row: _Row, events: list[TokenEvent]) -> Piece:
        kept = [e for e in events if not (e.finish_reason == "stop" and e.token in self._stop_tokens)]
        text = "".join(row.text.push(event.token) for event in kept)
        reason = events[-1].finish_reason
        if reason:
            text += row.text.finish()
        return Piece(
            choice=row.choice,
            text=text,
            tokens=[event.token for event in kept],
            logprobs=[event.logprob for event in kept],
            sampled=len(events),
            finish_reason="stop" if reason and row.text.stopped else reason,
        )


def _no_model(message: str) -> ApiError:
    return ApiError(404, message, type="invalid_request_error", param="model", code="model_not_found")
