"""The native engine: continuous batching on torch and transformers, the embedded default for rollouts and serving.

Every step is one forward over the newest token of each running row and pieces of waiting prompts, side by side and
without padding; finished rows leave and waiting ones enter between two steps. What a row generates depends on its
prompt, sampling, seed and adapter alone, bit for bit: loops and matrix products compute a token by itself. For what is
left to torch on a CPU this needs one torch thread, which the caller sets (`torch.set_num_threads(1)`);
`self_check.check_exactness` proves it.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...cluster.errors import InputError
from ..engine import RequestsFailed, TokenEvent, check_request
from ..records import GenerationRequest
from .blocks import BLOCK
from .cache import Batch
from .decoder import Decoder
from .grammars import Grammars
from .rows import STATE, Prompt, Row, fresh_state, knobs_of
from .sampling import draw, uniforms
from .schedule import Piece, Schedule
from .shaping import Shaper
from .stop_strings import StopStrings


class NativeEngine:
    """Implements the `Engine` protocol on one base model in a Hugging Face folder.

    `slots` is the number of rows that decode at once. `max_length` counts prompt and completion together and is cut to
    the model's own limit. `threads` is for matrix products on a CPU. One thread may call the methods. Raises
    `InputError` for a folder or architecture that it cannot run exactly.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        max_length: int,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        if slots < 1 or max_length < 2:
            raise InputError(f"the engine needs at least 1 slot and 2 tokens of length, not {slots} and {max_length}")
        self._folder = folder
        # A prompt with samples that wait for slots keeps its blocks; there is at most one such, at the queue's head.
        self._decoder = Decoder(
            folder, rows=slots + 1, max_length=max_length, dtype=dtype, device=device, threads=threads
        )
        decoder = self._decoder
        self._schedule = Schedule(
            slots, decoder.blocks, decoder.blocks_per_row, decoder.prompt_tokens, decoder.copy_blocks
        )
        self._state = np.zeros(slots, STATE)
        self._unfinished: Counter[str] = Counter()
        self._tokenizer: Any = None
        self._grammars: Grammars | None = None
        self.computed = 0
        """Prompt tokens that were computed, since the start."""

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._unfinished)

    @property
    def max_length(self) -> int:
        """The most tokens a row can hold, prompt and completion together."""
        return self._decoder.max_length

    @property
    def reused(self) -> int:
        """Prompt tokens that were found in the cache instead of computed, since the start."""
        return self._schedule.reused

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._decoder.vocabulary

    @property
    def slots(self) -> int:
        """Rows that decode at once."""
        return len(self._state)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `InputError` for one that can never be served."""
        check_request(
            request,
            running=self._unfinished,
            vocabulary=self.vocabulary,
            max_length=self.max_length,
            adapters=self.adapters(),
        )
        if request.sampling.grammar:
            self._matcher(request)
        self._unfinished[request.request_id] = request.n
        self._schedule.waiting.append(Prompt(request, self._decoder.adapters.number(request.adapter)))

    def step(self) -> list[TokenEvent]:
        """Advance every running row by one token and admit waiting ones; returns the new tokens, one a row.

        Raises `RequestsFailed` when weights give logits that are not finite; the requests that met them are forgotten,
        the others repeat the step at the next call.
        """
        running = self._schedule.running()
        self._schedule.reserve()
        pieces = self._schedule.pieces()
        if not running and not self._schedule.reserved:
            return []
        logits = self._forward(running, pieces)
        entering = self._entering(pieces, logits[len(running) :])
        return self._draw(running, entering, logits[: len(running)])

    def abort(self, request_id: str) -> None:
        """Forget a request, known or not; its rows leave at once and no event of it follows."""
        if self._unfinished.pop(request_id, 0):
            self._schedule.remove(request_id)

    def load_adapter(self, digest: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """Make an adapter available; one that is loaded already stays. Raises `InputError` for what is not plain LoRA
        on this base."""
        self._decoder.adapters.load(digest, tensors, config)

    def drop_adapter(self, digest: str) -> None:
        """Forget an adapter. Raises `InputError` while a request uses it, or when it is not loaded."""
        users = {request.request_id for request in self._schedule.requests() if request.adapter == digest}
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
        self._schedule.forget()

    def _forward(self, running: list[int], pieces: list[Piece]) -> torch.Tensor:
        """Logits `[running + complete prompts, V]` after the running rows' newest tokens and the prompts' last."""
        state = self._state[running]
        for i in np.flatnonzero(state["position"] % BLOCK == 0):
            slot = running[i]
            self._schedule.extend(slot, self._schedule.row(slot).blocks, int(state["position"][i]) + 1)
        if not running and not pieces:
            return torch.empty(0, self.vocabulary, device=self._decoder.device)
        batch = self._batch(running, state, pieces)
        ends = len(running) + np.cumsum([p.end - p.begin for p in pieces], dtype=np.int64) - 1
        wanted = [*range(len(running)), *(int(end) for end, p in zip(ends, pieces, strict=True) if p.last)]
        try:
            logits = self._decoder.forward(batch, wanted, len(running))
        except BaseException:
            self._schedule.forget()
            raise
        self.computed += len(batch.tokens) - len(running)
        for piece in pieces:
            if not piece.last:
                piece.prompt.done = piece.end
        return logits

    def _batch(self, running: list[int], state: np.ndarray, pieces: list[Piece]) -> Batch:
        tokens, positions, adapters = [state["token"]], [state["position"]], [state["adapter"]]
        rows = [np.array(running, np.int64)]
        for piece in pieces:
            count = piece.end - piece.begin
            tokens.append(piece.prompt.request.prompt[piece.begin : piece.end].astype(np.int64))
            positions.append(np.arange(piece.begin, piece.end))
            rows.append(np.full(count, piece.slot))
            adapters.append(np.full(count, piece.prompt.adapter))
        return Batch(
            tokens=np.concatenate(tokens),
            positions=np.concatenate(positions),
            rows=np.concatenate(rows),
            tables=self._schedule.tables,
            adapters=np.concatenate(adapters),
        )

    def _entering(self, pieces: list[Piece], logits: torch.Tensor) -> list[tuple[int, Prompt]]:
        """The slots whose first token can be drawn, with their prompts; new logits come in the order of the pieces."""
        complete = [piece.prompt for piece in pieces if piece.last]
        for prompt, row in zip(complete, logits, strict=True):
            prompt.logits = row
        return [(slot, prompt) for slot, prompt in self._schedule.reserved.items() if prompt.logits is not None]

    def _draw(self, running: list[int], entering: list[tuple[int, Prompt]], logits: torch.Tensor) -> list[TokenEvent]:
        """The next token of the running rows and the first of the entering ones; then who is done leaves."""
        begun: Counter[int] = Counter()
        fresh = np.zeros(len(entering), STATE)
        rows = [self._schedule.row(slot) for slot in running]
        for i, (_, prompt) in enumerate(entering):
            index = prompt.entered + begun[id(prompt)]
            begun[id(prompt)] += 1
            fresh[i] = fresh_state(prompt.request, index, prompt.adapter)
            rows.append(self._new_row(prompt.request, index))
        state = np.concatenate([self._state[running], fresh]) if entering else self._state[running]
        firsts = [prompt.logits for _, prompt in entering if prompt.logits is not None]
        drawn = self._next(torch.cat([logits, torch.stack(firsts)]) if firsts else logits, state, rows)
        state["token"], state["drawn"] = drawn.tokens, state["drawn"] + np.uint64(1)
        state["position"][: len(running)] += 1
        tops = drawn.tops(state["top_logprobs"])
        values = zip(rows, drawn.tokens.tolist(), drawn.logprobs.tolist(), tops, strict=True)
        events = [row.take(token, logprob, top) for row, token, logprob, top in values]
        self._state[running] = state[: len(running)]
        for (slot, _), row, record in zip(entering, rows[len(running) :], state[len(running) :], strict=True):
            self._schedule.enter(slot, row)
            self._state[slot] = record
        for slot, event in zip([*running, *(slot for slot, _ in entering)], events, strict=True):
            if event.finish_reason:
                self._schedule.leave(slot)
                self._finish_one(event.request_id)
        return events

    def _next(self, logits: torch.Tensor, state: np.ndarray, rows: list[Row]) -> Any:
        """Draw a token for each row. Raises `RequestsFailed` before anything is advanced."""
        with torch.inference_mode():
            self._shape(logits, state, rows)
            drawn = draw(logits, knobs_of(state), uniforms(state["key"], state["drawn"]), self.slots)
        bad = [row for row, good in zip(rows, np.isfinite(drawn.logprobs), strict=True) if not good]
        if bad:
            self._refuse(bad)
        return drawn

    def _shape(self, logits: torch.Tensor, state: np.ndarray, rows: list[Row]) -> None:
        """Change the logits of the rows that ask for it, in place."""
        failures: dict[str, str] = {}
        for i in np.flatnonzero(state["shaped"]):
            shaper = rows[i].shaper
            assert shaper is not None, "fresh_state and _new_row read the same request"
            if shaper.failure:
                failures[rows[i].request.request_id] = shaper.failure
            else:
                shaper.apply(logits[i])
        if failures:
            for request_id in failures:
                self.abort(request_id)
            why = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
            raise RequestsFailed(f"a grammar cannot go on ({why})", frozenset(failures))

    def _new_row(self, request: GenerationRequest, index: int) -> Row:
        sampling = request.sampling
        shaper = Shaper(request, self._matcher(request)) if sampling.shaped else None
        stops = frozenset(sampling.stop_token_ids)
        return Row(request, index, self._strings(request), [], sampling.max_tokens, stops, shaper)

    def _finish_one(self, request_id: str) -> None:
        self._unfinished[request_id] -= 1
        if not self._unfinished[request_id]:
            del self._unfinished[request_id]

    def _refuse(self, bad: list[Row]) -> None:
        """Nothing has been advanced yet: without these requests the other rows can repeat the step."""
        requests = {row.request.request_id for row in bad}
        weights = {f"adapter {row.request.adapter[:12]}" if row.request.adapter else "the base model" for row in bad}
        for request_id in requests:
            self.abort(request_id)
        self._schedule.forget()
        raise RequestsFailed(
            f"{', '.join(sorted(weights))} gives logits that are not finite numbers: the weights have diverged "
            f"(requests {', '.join(sorted(requests))})",
            frozenset(requests),
        )

    def _strings(self, request: GenerationRequest) -> StopStrings | None:
        return StopStrings(self._text(), request.sampling.stop) if request.sampling.stop else None

    def _matcher(self, request: GenerationRequest) -> Any:
        """The request's grammar at the beginning of a text, or none. Raises `InputError` for one that is no grammar."""
        if not request.sampling.grammar:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self._text())
        return self._grammars.matcher(request.sampling.grammar)

    def _text(self) -> Any:
        """The model's tokenizer, read when a request first needs it."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        return self._tokenizer
