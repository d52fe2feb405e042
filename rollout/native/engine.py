"""The native engine: continuous batching on torch and transformers, the embedded default for rollouts and serving.

Every step decodes one token for all running rows in one forward; finished rows leave and waiting ones enter between
two steps, without padding. What a row generates depends on its prompt, sampling, seed and adapter alone, bit for bit:
a prompt is prefilled in a forward of its own, the rows of a forward are a multiple of eight (idle rows fill up), and
the cache is read in whole vectors. On a CPU this needs one torch thread, which the caller sets
(`torch.set_num_threads(1)`); `self_check.check_exactness` proves it.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...cluster.errors import InputError
from ..engine import RequestsFailed, TokenEvent, check_request
from ..records import FinishReason, GenerationRequest, TopLogprobs
from .cache import Prefix
from .decoder import Decoder
from .lora import Plan
from .sampling import Knobs, draw, stream_key, uniforms
from .stop_strings import StopStrings

ROWS = 8
"""Rows of a forward come in multiples of this: matrix products of fewer rows round differently."""

_STATE = np.dtype(
    [
        ("token", np.int64),
        ("position", np.int64),
        ("key", np.uint64),
        ("drawn", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("min_p", np.float64),
        ("top_logprobs", np.int64),
    ]
)
"""What the step computes with, a record a slot: the last token, its place in the cache, the random stream and how many
numbers were taken from it, the sampling settings."""


@dataclass(slots=True)
class _Waiting:
    """A request of which some samples have no row yet, and its prompt's prefill once there is one."""

    request: GenerationRequest
    entered: int = 0
    logits: torch.Tensor | None = None
    prefix: Prefix = field(default_factory=list)


class _Row:
    """One running sample: what ends it, and whose it is."""

    __slots__ = ("adapter", "index", "left", "request_id", "stop_ids", "strings")

    def __init__(self, request: GenerationRequest, index: int, strings: StopStrings | None) -> None:
        self.request_id = request.request_id
        self.index = index
        self.adapter = request.adapter
        self.left = request.sampling.max_tokens
        self.stop_ids = frozenset(request.sampling.stop_token_ids)
        self.strings = strings

    def take(self, token: int, logprob: float, top: TopLogprobs | None) -> TokenEvent:
        """Count a new token and say whether it is the last."""
        self.left -= 1
        reason: FinishReason | None = None
        if token in self.stop_ids or (self.strings is not None and self.strings.push(token)):
            reason = "stop"
        elif self.left == 0:
            reason = "length"
        return TokenEvent(self.request_id, self.index, token, logprob, reason, top)


class NativeEngine:
    """Implements the `Engine` protocol on one base model in a Hugging Face folder.

    `slots` is the number of rows that decode at once. `max_length` counts prompt and completion together and is cut to
    the model's own limit. One thread may call the methods. Raises `InputError` for a folder or architecture that it
    cannot run exactly.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        max_length: int,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
    ) -> None:
        if slots < 1 or max_length < 2:
            raise InputError(f"the engine needs at least 1 slot and 2 tokens of length, not {slots} and {max_length}")
        self._folder = folder
        self._slots = slots
        padded = -(-slots // ROWS) * ROWS
        self._decoder = Decoder(folder, slots=padded, max_length=max_length, dtype=dtype, device=device)
        self._state = np.zeros(padded, _STATE)
        self._rows: list[_Row | None] = []
        self._waiting: deque[_Waiting] = deque()
        self._unfinished: Counter[str] = Counter()
        self._events: list[TokenEvent] = []
        self._plan: Plan | None = None
        self._planned: list[str | None] = []
        self._tokenizer: Any = None
        self.forwards = Counter[str]()
        """Forwards so far: `prefill`, `decode`."""

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running, or has tokens that a failed step kept back."""
        return bool(self._waiting or self._events) or any(row is not None for row in self._rows)

    @property
    def max_length(self) -> int:
        """The most tokens a row can hold, prompt and completion together."""
        return self._decoder.max_length

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._decoder.vocabulary

    @property
    def slots(self) -> int:
        """Rows that decode at once."""
        return self._slots

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `InputError` for one that can never be served."""
        check_request(
            request,
            running=self._unfinished,
            vocabulary=self.vocabulary,
            max_length=self.max_length,
            adapters=self.adapters(),
        )
        self._unfinished[request.request_id] = request.n
        self._waiting.append(_Waiting(request))

    def step(self) -> list[TokenEvent]:
        """Advance every running row by one token and admit waiting ones; returns the new tokens, one a row.

        Raises `RequestsFailed` when weights give logits that are not finite; the requests that met them are forgotten,
        the others go on with the next step, which also returns what this one had drawn.
        """
        self._compact()
        if self._rows:
            self._events += self._decode()
        while self._waiting and self._free():
            self._events += self._admit(self._waiting[0])
        events, self._events = self._events, []
        return events

    def abort(self, request_id: str) -> None:
        """Forget a request, known or not; its rows leave at once and no event of it follows."""
        self._unfinished.pop(request_id, None)
        self._events = [event for event in self._events if event.request_id != request_id]
        self._waiting = deque(w for w in self._waiting if w.request.request_id != request_id)
        for slot, row in enumerate(self._rows):
            if row is not None and row.request_id == request_id:
                self._rows[slot] = None

    def load_adapter(self, digest: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """Make an adapter available; one that is loaded already stays. Raises `InputError` for what is not plain LoRA
        on this base."""
        self._decoder.adapters.load(digest, tensors, config)

    def drop_adapter(self, digest: str) -> None:
        """Forget an adapter. Raises `InputError` while a request uses it, or when it is not loaded."""
        users = {w.request.request_id for w in self._waiting if w.request.adapter == digest}
        users |= {row.request_id for row in self._rows if row is not None and row.adapter == digest}
        if users:
            raise InputError(f"adapter {digest[:12]} is in use by {len(users)} requests, {min(users)!r} among them")
        self._decoder.adapters.drop(digest)

    def adapters(self) -> tuple[str, ...]:
        """Digests of the loaded adapters."""
        return self._decoder.adapters.digests()

    def load_base(self, tensors: dict[str, np.ndarray]) -> None:
        """Replace the base model's weights. Raises `InputError` while requests run: their caches are of the old."""
        if self.busy:
            raise InputError("the base weights cannot be replaced while requests run: wait for them or abort them")
        self._decoder.load(tensors)

    def _free(self) -> int:
        return self._slots - len(self._rows) + self._rows.count(None)

    def _compact(self) -> None:
        """Bring the running rows to the front; slots behind them become idle."""
        while self._rows and self._rows[-1] is None:
            self._rows.pop()
        holes = [slot for slot, row in enumerate(self._rows) if row is None]
        if not holes:
            return
        count = len(self._rows) - len(holes)
        to = [slot for slot in holes if slot < count]
        source = [slot for slot in range(count, len(self._rows)) if self._rows[slot] is not None]
        if to:
            self._decoder.move(to, source, int(self._state["position"][source].max()))
            self._state[to] = self._state[source]
            for target, origin in zip(to, source, strict=True):
                self._rows[target] = self._rows[origin]
        del self._rows[count:]

    def _decode(self) -> list[TokenEvent]:
        rows = [row for row in self._rows if row is not None]
        padded = -(-len(rows) // ROWS) * ROWS
        self._state[len(rows) : padded] = np.zeros((), _STATE)
        state = self._state[: len(rows)]
        # An idle row counts as the first row's kind, so that it does not turn one adapter's step into a mixed one.
        plan = self._plan_for([row.adapter for row in rows] + [rows[0].adapter] * (padded - len(rows)))
        positions = self._state["position"][:padded]
        logits = self._decoder.decode(self._state["token"][:padded].copy(), positions.copy(), plan)
        self.forwards["decode"] += 1
        events = self._draw(logits[: len(rows)], state, rows)
        state["position"] += 1
        for slot, event in enumerate(events):
            if event.finish_reason:
                self._rows[slot] = None
                self._finish(event.request_id)
        return events

    def _plan_for(self, adapters: list[str | None]) -> Plan | None:
        if adapters != self._planned:
            self._plan = self._decoder.adapters.plan_for(adapters)
            self._planned = adapters
        return self._plan

    def _admit(self, waiting: _Waiting) -> list[TokenEvent]:
        """Give rows to samples of a request, as many as fit; their first tokens come from its prefill."""
        request = waiting.request
        if waiting.logits is None:
            waiting.logits, waiting.prefix = self._decoder.prefill(request.prompt, request.adapter)
            self.forwards["prefill"] += 1
        count = min(self._free(), request.n - waiting.entered)
        rows = [_Row(request, waiting.entered + i, self._strings(request)) for i in range(count)]
        state = _fresh_state(request, rows)
        events = self._draw(waiting.logits.expand(count, -1), state, rows)
        waiting.entered += count
        if waiting.entered == request.n:
            self._waiting.popleft()
        self._place([i for i, event in enumerate(events) if not event.finish_reason], rows, state, waiting.prefix)
        for event in events:
            if event.finish_reason:
                self._finish(event.request_id)
        return events

    def _place(self, going_on: list[int], rows: list[_Row], state: np.ndarray, prefix: Prefix) -> None:
        """Put rows into free slots: holes first, then behind the running rows."""
        if not going_on:
            return
        holes = [slot for slot, row in enumerate(self._rows) if row is None]
        extra = len(going_on) - len(holes)
        slots = holes[: len(going_on)] + list(range(len(self._rows), len(self._rows) + extra))
        self._rows += [None] * max(0, extra)
        for slot, i in zip(slots, going_on, strict=True):
            self._rows[slot] = rows[i]
        self._state[slots] = state[going_on]
        self._decoder.write(slots, prefix)

    def _finish(self, request_id: str) -> None:
        self._unfinished[request_id] -= 1
        if not self._unfinished[request_id]:
            del self._unfinished[request_id]

    def _draw(self, logits: torch.Tensor, state: np.ndarray, rows: list[_Row]) -> list[TokenEvent]:
        """The next token of every row, from its logits; `state` takes it down."""
        knobs = Knobs(state["temperature"], state["top_p"], state["top_k"], state["min_p"], state["top_logprobs"])
        with torch.inference_mode():
            drawn = draw(logits, knobs, uniforms(state["key"], state["drawn"]))
        finite = np.isfinite(drawn.logprobs)
        if not finite.all():
            self._refuse([row for row, good in zip(rows, finite, strict=True) if not good])
        state["token"] = drawn.tokens
        state["drawn"] += np.uint64(1)
        tops = drawn.tops(knobs.top_logprobs)
        return [
            row.take(token, logprob, top)
            for row, token, logprob, top in zip(rows, drawn.tokens.tolist(), drawn.logprobs.tolist(), tops, strict=True)
        ]

    def _refuse(self, bad: list[_Row]) -> None:
        """Nothing has been advanced yet: without these requests the other rows can go on at the next step."""
        requests = {row.request_id for row in bad}
        slots = [i for i, row in enumerate(self._rows) if row is not None and row.request_id in requests]
        if slots:
            self._decoder.clear(slots)
        for request_id in requests:
            self.abort(request_id)
        weights = {f"adapter {row.adapter[:12]}" if row.adapter else "the base model" for row in bad}
        raise RequestsFailed(
            f"{', '.join(sorted(weights))} gives logits that are not finite numbers: the weights have diverged "
            f"(requests {', '.join(sorted(requests))})",
            frozenset(requests),
        )

    def _strings(self, request: GenerationRequest) -> StopStrings | None:
        if not request.sampling.stop:
            return None
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        return StopStrings(self._tokenizer, request.sampling.stop)


def _fresh_state(request: GenerationRequest, rows: list[_Row]) -> np.ndarray:
    sampling = request.sampling
    state = np.zeros(len(rows), _STATE)
    state["position"] = len(request.prompt)
    state["key"] = [stream_key(request.seed._replace(sample=request.seed.sample + row.index)) for row in rows]
    state["temperature"], state["top_p"], state["top_k"] = sampling.temperature, sampling.top_p, sampling.top_k
    state["min_p"], state["top_logprobs"] = sampling.min_p, sampling.top_logprobs
    return state
