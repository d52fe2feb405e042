"""A rollout worker: one engine, the weights it proved, and the groups it generates.

`RolloutWorker` is plain and tests without Ray; `RolloutActor` is its shell.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster.errors import RunFailed
from ..cluster.imports import importing
from ..cluster.weights import Piece, Tensors, WeightVersion, open_transport, tensors_of, version_digest
from .config import RolloutConfig
from .engine import Engine
from .engine_thread import EngineThread, collect
from .engines import ENGINES
from .environments.dialogue import with_response_template
from .environments.episodes import Episodes, Stage
from .environments.process import EnvironmentPool
from .records import Completion, GenerationRequest, Group, Sample, Sampling, SeedKey, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What every worker of a stage is built from; `base` is a model folder that each node can read."""

    base: Path
    dtype: str
    config: RolloutConfig
    seed: int
    max_length: int
    stop_token_ids: tuple[int, ...]

    def sampling(self) -> Sampling:
        """The recipe's sampling with the model's stop tokens."""
        return Sampling(**self.config.sampling.model_dump(), stop_token_ids=self.stop_token_ids)


class RolloutWorker:
    """Generates groups under one weight version at a time; may be called from several threads.

    Raises `RunFailed` at start when the engine's arithmetic depends on the batch, and for a group that asks for
    another version than the one loaded.
    """

    def __init__(self, name: str, spec: WorkerSpec) -> None:
        self.name = name
        self._spec = spec
        with importing():  # most of transformers comes with its first object
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(spec.base)
        self._environment: Stage | None = None
        if spec.config.environment:
            tokenizer = with_response_template(self._tokenizer)
            self._environment = Stage(
                spec.config, EnvironmentPool(spec.config.environment), tokenizer, spec.stop_token_ids
            )
        self._engine = EngineThread(self._build)
        self._hashing = ThreadPoolExecutor(1, "digest")
        self._weights: tuple[int, str] | None = None
        self._adapter: str | None = None
        self._lock = threading.Lock()
        """Between what begins, what is aborted and what the weights are."""
        self._running: dict[int, tuple[list[str], Future[list[Completion]]]] = {}
        """Calls and the engine's requests for them."""
        self._aborted: set[int] = set()
        """Calls that were aborted before they began, or just as they ended."""

    def _build(self) -> Any:
        import torch

        from .self_check import check_exactness

        config = self._spec.config
        device = "cuda" if torch.cuda.is_available() and config.resources.gpus else "cpu"
        dtype = "bfloat16" if self._spec.dtype == "bfloat16" else "float32"
        build = ENGINES[config.engine]
        threads, exact = max(1, int(config.resources.cpus)), config.is_exact
        engine: Any = build(
            self._spec.base, config.slots, self._spec.max_length, dtype, device, threads=threads, exact=exact
        )
        if config.is_exact:
            check_exactness(engine)
        return engine

    def set_weights(self, weights: WeightVersion, pieces: Sequence[Piece]) -> str:
        """Load a version and return the digest of what was loaded. Raises `RunFailed` when it is another.

        What still runs is aborted: a new version comes between steps, so nobody waits for that copy any more.
        """
        tensors = tensors_of(pieces)
        proof = self._hashing.submit(version_digest, pieces, weights.config, weights.base)  # beside the loading
        with self._lock:
            for call in self._running:
                self._stop(call)
            self._aborted.clear()
            self._engine.call(lambda engine: self._take(engine, weights, tensors, proof)).result()
        return weights.digest

    def _take(self, engine: Engine, weights: WeightVersion, tensors: Tensors, proof: "Future[str]") -> None:
        """On the engine's thread: load weights, and use them once they are proved.

        A base is loaded in place, so one that fails leaves no weights; an adapter that fails leaves those before it.
        """
        adapter = weights.digest if weights.config else None
        before = engine.adapters()
        try:
            if adapter is None:
                self._weights = None
                engine.load_base(tensors)
            elif adapter not in before:
                engine.load_adapter(adapter, tensors, weights.config)
        finally:  # wrong bytes may also be why they did not load
            if (digest := proof.result()) != weights.digest:
                for name in set(engine.adapters()) - set(before):
                    engine.drop_adapter(name)
                raise RunFailed(
                    f"{self.name} got weights {digest[:12]} for version {weights.version}, not {weights.digest[:12]}"
                )
        if self._adapter not in (None, adapter):
            engine.drop_adapter(self._adapter)
        self._adapter, self._weights = adapter, (weights.version, digest)

    def generate(self, group: Group, call: int) -> Group | None:
        """Draw the group's completions, or go on with those it has, each at most to the group's budget.

        Blocks until that is done; None when the call was aborted. The group names the version it must come from; `call`
        is a number that no other call has.
        """
        start = time.time()
        episodes = Episodes(group, self._environment) if self._environment else None
        while True:
            samples = self._draw(group, call)
            if samples is None:
                return None
            if episodes:
                samples = episodes.answer(samples)
            group = replace(group, samples=samples)
            if not episodes or group.finished:
                return replace(group, worker=self.name, start=start, seconds=time.time() - start)

    def _draw(self, group: Group, call: int) -> tuple[Sample, ...] | None:
        """The group's completions as far as the engine goes on with them; none when the call was aborted."""
        with self._lock:
            self._require(group)
            if call in self._aborted:
                return None
            requests = self._requests(group, call)
            completions = collect(self._engine, requests)
            self._running[call] = [request.request_id for request in requests], completions
        try:
            return self._continued(group, completions.result())
        except CancelledError:
            return None
        finally:
            with self._lock:
                self._running.pop(call, None)

    def abort(self, call: int) -> None:
        """End a call for which nobody waits any more; one that has not begun will not."""
        with self._lock:
            if call in self._running:
                self._stop(call)
            else:
                self._aborted.add(call)

    def _stop(self, call: int) -> None:
        request_ids, completions = self._running[call]
        for request_id in request_ids:
            self._engine.abort(request_id)
        self._engine.call(lambda _: completions.cancel())  # on the engine's thread, so not while it sets the result

    def _require(self, group: Group) -> None:
        if self._weights != (group.version, group.digest):
            raise RunFailed(
                f"{self.name} has weights {self._weights}, step {group.step} group {group.index} needs version "
                f"{group.version} ({group.digest[:12]})"
            )

    def _requests(self, group: Group, call: int) -> list[GenerationRequest]:
        """One for all completions that are to begin, one for each that goes on: its tokens are its prompt's end."""
        step, index = (group.origin or (group.step, group.index))[:2]
        whole = GenerationRequest(
            request_id=f"{group.step}/{group.index}/{call}",
            prompt=group.prompt,
            sampling=self._sampling(group, 0),
            seed=SeedKey(self._spec.seed, step, index),
            n=group.draw.samples if group.draw else self._spec.config.group_size,
            adapter=self._adapter,
        )
        if not group.samples:
            return [whole]
        return [
            replace(
                whole,
                request_id=f"{whole.request_id}/{i}",
                prompt=np.concatenate([group.prompt, sample.tokens]),
                sampling=self._sampling(group, len(sample.tokens)),
                seed=whole.seed._replace(sample=i),
                n=1,
                drawn=len(sample.tokens),
            )
            for i, sample in enumerate(group.samples)
            if not sample.finish_reason
        ]

    def _sampling(self, group: Group, drawn: int) -> Sampling:
        sampling = self._spec.sampling()
        if group.draw:
            sampling = replace(sampling, temperature=group.draw.temperature)
        left = sampling.max_tokens - drawn
        return replace(sampling, max_tokens=min(left, group.budget or left))

    def _continued(self, group: Group, completions: Sequence[Completion]) -> tuple[Sample, ...]:
        """The group's completions, those that are not finished with what was drawn for them now."""
        nothing = Sample(tokens=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32), finish_reason=None)
        drawn = iter(completions)
        return tuple(
            sample if sample.finish_reason else self._sample(sample, next(drawn), group)
            for sample in group.samples or (nothing,) * len(completions)
        )

    def _sample(self, before: Sample, completion: Completion, group: Group) -> Sample:
        tokens = np.concatenate([before.tokens, completion.tokens])
        fresh = tokens if before.written is None else completion.tokens
        written = None
        if before.written is not None:
            written = np.concatenate([before.written, np.ones(len(completion.tokens), bool)])
        cut = completion.finish_reason == "length" and len(tokens) < self._spec.config.sampling.max_tokens
        return Sample(
            tokens=tokens,
            logprobs=np.concatenate([before.logprobs, completion.logprobs]),
            finish_reason=None if cut else completion.finish_reason,
            spans=(*before.spans, Span(len(completion.tokens), group.version, group.digest)),
            text=self._tokenizer.decode(self._without_stop(fresh.tolist()), skip_special_tokens=True),
            written=written,
            turns=before.turns,
            environment=before.environment,
        )

    def _without_stop(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if tokens and tokens[-1] in self._spec.stop_token_ids else tokens


class RolloutActor:
    """The Ray shell of a `RolloutWorker`; made remote by the pool, which calls `build` first.

    Not the constructor: Ray reports what that raises as a dead actor, without its type.
    """

    def __init__(self, name: str, spec: WorkerSpec) -> None:
        self._name, self._spec = name, spec
        self._transport = open_transport(spec.config.weights, timeout=spec.config.timeout_seconds)

    def build(self) -> None:
        """Load the model. Raises what `RolloutWorker` raises."""
        self._worker = RolloutWorker(self._name, self._spec)

    def set_weights(self, weights: WeightVersion) -> str:
        """Receive a version, load it, report its digest."""
        pieces = self._transport.receive(weights.parcel, self._name, timeout=self._spec.config.timeout_seconds)
        return self._worker.set_weights(weights, pieces)

    def generate(self, group: Group, call: int) -> Group | None:
        """Draw a group's completions."""
        return self._worker.generate(group, call)

    def abort(self, call: int) -> None:
        """End a call of `generate` early."""
        self._worker.abort(call)

    def stay(self, seconds: float) -> None:
        """Answer after so long: while the call is open Ray reports this actor's death at once, and an answer that does
        not come shows that the process hangs."""
        threading.Event().wait(seconds)
