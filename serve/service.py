"""The service without HTTP: which model a request means, its prompt in tokens, and what is generated."""

import asyncio
import logging
import secrets
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cluster.errors import InputError, NotFound
from ..rollout.engine import TokenEvent
from ..rollout.engine_thread import EngineThread
from ..rollout.records import GenerationRequest, Sampling, SeedKey
from .adapter_cache import AdapterCache
from .admission import Admission, Quotas
from .api_errors import adapter_failed, bad_request, no_model
from .bridge import Bridge
from .config import Limits
from .grammar import check_size, json_grammar
from .keys import Key
from .messages import ObjectFormat, SchemaFormat
from .metrics import Metrics
from .outcomes import Outcomes, Watch
from .pieces import Piece, Row
from .prompts import Prompts
from .protocol import MAX_CHOICES, ChatRequest, GenerationFields
from .registry import Entry, Registry
from .text import IncrementalText
from .tools import CallReader, calls_grammar

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one request has generated: a number of completions of each prompt, by one model, for one key."""

    entry: Entry
    prompts: Sequence[list[int]]
    fields: GenerationFields
    key: Key | None = None

    @property
    def rows(self) -> int:
        """How many completions that is."""
        return len(self.prompts) * self.fields.n

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt) for prompt in self.prompts)


class Service:
    """One base model, every adapter of it in the registry, one engine; all methods but `__init__` on one event loop."""

    def __init__(
        self, *, engine: EngineThread, tokenizer: Any, registry: Registry, base: Entry, limits: Limits | None = None
    ) -> None:
        self.base = base
        self.limits = limits or Limits()
        self.prompts = Prompts(tokenizer)
        self.metrics = Metrics()
        self._bridge = Bridge(engine)
        self._registry = registry
        self.outcomes = Outcomes()
        self.adapters = AdapterCache(engine, self.limits.adapters)
        self._admission = Admission(self.limits.completions)
        self._quotas = Quotas()
        self.max_length: int = engine.call(lambda owned: owned.max_length).result()

    def entry(self, name: str, key: Key | None = None, user: str | None = None) -> Entry:
        """The registry's entry of a model that this service has and this key may use; raises a 404 otherwise.

        Where a name is split over several models, `user` decides, else the key: who asks again gets the same one.
        """
        try:
            entry = self._registry.resolve(name, user or (key.name if key else None))
        except (NotFound, InputError, OSError, ValueError):
            raise no_model(name) from None
        if entry.base != self.base.digest or not self._allows(key, name, entry):
            raise no_model(name)
        return entry

    def models(self, key: Key | None = None) -> dict[str, Entry]:
        """What this key may ask for, by id: every alias, and the digest of what has none."""
        entries = {
            e.digest: e
            for e in self._registry.entries()
            if e.base == self.base.digest and not self._registry.is_retired(e.digest)
        }
        aliases = {name: entries[digest] for name, digest in self._registry.aliases().items() if digest in entries}
        named = {entry.digest for entry in aliases.values()}
        known = aliases | {digest: entry for digest, entry in entries.items() if digest not in named}
        return {name: entry for name, entry in known.items() if self._allows(key, name, entry)}

    def _allows(self, key: Key | None, name: str, entry: Entry) -> bool:
        """By its name, its digest, or the digest of a name on the key's list."""
        if key is None or key.models is None or name in key.models or entry.digest in key.models:
            return True
        aliases = self._registry.aliases()
        return any(aliases.get(allowed) == entry.digest for allowed in key.models)

    async def generate(self, work: Work) -> AsyncGenerator[list[Piece], None]:
        """Generate; choice `p * n + i` is completion `i` of prompt `p`. Leaving early aborts what still runs.

        What is wrong is raised at the first step: a 400 for what does not fit, a 429 where there is no place or the key
        has no more, what the registry and the engine say of an adapter, `TimeoutError` after `limits.request_seconds`.
        """
        requests = self._requests(work)
        rows = {
            (request.request_id, i): self._row(p * work.fields.n + i, work.fields)
            for p, request in enumerate(requests)
            for i in range(work.fields.n)
        }
        stream = self._bridge.stream(requests, self.limits.request_seconds)
        began, sampled = time.monotonic(), 0
        watch = Watch(self.outcomes, work.entry.digest)
        async with self._place(work), watch, self._adapter(work.entry), aclosing(stream) as steps:
            try:
                async for events in steps:
                    if not sampled:
                        watch.first_token()
                        self.metrics.first_token.observe(time.monotonic() - began)
                    sampled += len(events)
                    self._quotas.spend(work.key, len(events), time.monotonic())
                    yield _pieces(rows, events)
            finally:
                self.metrics.completion_tokens.inc(sampled)
        self.metrics.answer.observe(time.monotonic() - began)

    async def busy(self, timeout: float = 30.0) -> bool:
        """Whether the engine has work; raises `TimeoutError` when it does not answer in `timeout` seconds."""
        return await self._bridge.busy(timeout)

    @property
    def full(self) -> bool:
        """Whether no further completion would be let in."""
        return self._admission.inside >= self._admission.most

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return self.metrics.page(completions=self._admission.inside, adapters=len(self.adapters.held()))

    @asynccontextmanager
    async def _place(self, work: Work) -> AsyncIterator[None]:
        began = time.monotonic()
        with self._admission.enter(work.rows):
            self._quotas.enter(work.key, began)
            self._quotas.spend(work.key, work.prompt_tokens, began)
            self.metrics.prompt_tokens.inc(work.prompt_tokens)
            yield
        self._admission.took(time.monotonic() - began)

    @asynccontextmanager
    async def _adapter(self, entry: Entry) -> AsyncIterator[None]:
        """Have the model's adapter in the engine. Raises a 503 where it cannot be: its files have changed, say."""
        if entry.kind != "adapter":
            yield
            return
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self.limits.request_seconds):
                    use = self.adapters.use(entry.digest, lambda: self._registry.read_adapter(entry))
                    await stack.enter_async_context(use)
            except (InputError, OSError) as error:
                logger.error("adapter %s cannot be loaded: %s", entry.digest, error)
                raise adapter_failed(entry.digest) from None
            yield

    def _requests(self, work: Work) -> list[GenerationRequest]:
        prompts, fields = work.prompts, work.fields
        if not prompts or not all(prompts):
            raise bad_request("the prompt is empty", param="prompt")
        if work.rows > MAX_CHOICES:
            raise bad_request(f"{len(prompts)} prompts with n = {fields.n} are more than {MAX_CHOICES}", param="n")
        seed = secrets.randbits(63) if fields.seed is None else fields.seed % 2**63
        name, grammar = uuid.uuid4().hex, self._grammar(fields)
        return [
            GenerationRequest(
                request_id=f"{name}/{p}",
                prompt=np.array(prompt, np.int32),
                sampling=Sampling(
                    temperature=fields.temperature,
                    top_p=fields.top_p,
                    max_tokens=self._room(len(prompt), fields.limit),
                    stop_token_ids=self.prompts.stop_tokens,
                    stop=fields.stops,
                    top_logprobs=fields.alternatives,
                    logit_bias=tuple(fields.logit_bias.items()),
                    presence_penalty=fields.presence_penalty,
                    frequency_penalty=fields.frequency_penalty,
                    grammar=grammar,
                ),
                seed=SeedKey(seed, 0, p),
                n=fields.n,
                adapter=work.entry.digest if work.entry.kind == "adapter" else None,
            )
            for p, prompt in enumerate(prompts)
        ]

    def _grammar(self, fields: GenerationFields) -> str:
        """What the answer's text must follow; empty for any text."""
        if not isinstance(fields, ChatRequest):
            return ""
        if fields.forced and self.prompts.notation:
            return check_size(calls_grammar(fields.forced, self.prompts.notation), "tools")
        match fields.response_format:
            case ObjectFormat():
                return json_grammar({"type": "object"})
            case SchemaFormat(json_schema=named):
                return check_size(json_grammar(named.schema_), "response_format")
            case _:
                return ""

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

    def _row(self, choice: int, fields: GenerationFields) -> Row:
        offered = fields.offered if isinstance(fields, ChatRequest) else []
        names = {tool.function.name for tool in offered}
        notation = self.prompts.notation
        return Row(
            choice=choice,
            text=IncrementalText(self.prompts.decode, fields.stops),
            stop_tokens=frozenset(self.prompts.stop_tokens),
            reader=CallReader(notation, names) if names and notation else None,
        )


def _pieces(rows: dict[tuple[str, int], Row], events: list[TokenEvent]) -> list[Piece]:
    """What each row has gained, in the order in which their first tokens came."""
    if len(events) == 1:
        return [rows[events[0].request_id, events[0].index].take(events)]
    by_row: defaultdict[tuple[str, int], list[TokenEvent]] = defaultdict(list)
    for event in events:
        by_row[event.request_id, event.index].append(event)
    return [rows[key].take(its_events) for key, its_events in by_row.items()]
