"""The vLLM engine: vLLM's `AsyncLLM` behind the engine protocol.

Seeds come from the same seed keys as in the native engine, but a row's arithmetic depends on its company here, so
results are reproduced closely, not bit for bit. An adapter is known to vLLM by its digest and a number that is never
used twice, so that no cache outlives the weights it was made with.
"""

# pyright: reportMissingImports=false

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from ...cluster.errors import InputError, RunFailed, WorkerLost
from ..engine import RequestsFailed, TokenEvent, check_request
from ..native.stop_strings import StopStrings
from ..records import GenerationRequest
from .core import Core, gone
from .folders import BaseShapes, write_adapter
from .rows import Diverged, Row, sampling_params
from .settings import MAX_RANK, engine_args

STEP_SECONDS = 0.02
"""How long a step waits for the first token; commands to the engine wait as long."""


class VllmEngine:
    """Implements the `Engine` protocol on a Hugging Face folder. One thread may call the methods.

    `slots` is the number of rows that decode at once. `max_length` counts prompt and completion together and is cut to
    the model's own limit. Raises `InputError` for a folder, architecture or device that vLLM cannot run, and
    `WorkerLost` once vLLM's processes have ended.
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
        args, model = engine_args(folder, slots, max_length, dtype, device)
        self._folder, self._device = folder, device
        self._max_length: int = args.max_model_len
        self._takes_adapters: bool = args.enable_lora
        self._vocabulary: int = model.get_vocab_size()
        self._shapes = BaseShapes(folder, tied=bool(model.hf_config.tie_word_embeddings))
        self._scratch = tempfile.TemporaryDirectory(prefix="raylign-vllm-")
        self._numbers = itertools.count(1)
        self._rows: dict[str, Row] = {}
        self._running: dict[str, list[str]] = {}
        self._kept: list[TokenEvent] = []
        self._adapters: dict[str, LoRARequest] = {}
        self._tokenizer: Any = None
        self._core = Core(args)
        self._base_adapter = self._neutral() if args.enable_lora and device == "cpu" else None

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running, or has tokens that a failed step kept back."""
        return bool(self._rows or self._kept)

    @property
    def max_length(self) -> int:
        """The most tokens a row can hold, prompt and completion together."""
        return self._max_length

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._vocabulary

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `InputError` for one that can never be served."""
        check_request(
            request,
            running=self._running,
            vocabulary=self._vocabulary,
            max_length=self._max_length,
            adapters=self._adapters,
        )
        params = [sampling_params(request, index) for index in range(request.n)]
        names = [f"{next(self._numbers)}" for _ in params]
        adapter = self._adapters[request.adapter] if request.adapter else self._base_adapter
        self._running[request.request_id] = names
        for index, (name, each) in enumerate(zip(names, params, strict=True)):
            self._rows[name] = Row(request, index, self._strings(request))
            self._core.begin(name, request.prompt.tolist(), each, adapter)

    def step(self) -> list[TokenEvent]:
        """The tokens that have arrived, in order within a row; waits a moment where there are none.

        Raises `RequestsFailed` when weights give logits that are not finite or vLLM cannot go on with a request (the
        others go on), and `WorkerLost` when its processes have ended.
        """
        try:
            arrived = self._core.arrivals(0 if self._kept else STEP_SECONDS)
        except WorkerLost:
            self._forget()
            raise
        broken: dict[str, str] = {}
        for name, output in arrived:
            row = self._rows.get(name)
            if row is None or row.request_id in broken:
                continue
            if reason := self._take(name, row, output):
                broken[row.request_id] = reason
        if broken:
            self._refuse(broken)
        events, self._kept = self._kept, []
        return events

    def _take(self, name: str, row: Row, output: Any) -> str | None:
        """Keep what an output says of its row; why the row cannot go on, where it cannot."""
        if isinstance(output, EngineDeadError):
            self._forget()
            raise gone()
        if isinstance(output, Exception):
            return f"vLLM failed: {type(output.__cause__ or output).__name__}: {output.__cause__ or output}"
        completion = output.outputs[0]
        try:
            events = list(row.take(completion))
        except Diverged:
            weights = f"adapter {row.adapter[:12]}" if row.adapter else "the base model"
            return f"{weights} gives logits that are not finite numbers: the weights have diverged"
        self._kept += events
        if events and events[-1].finish_reason:
            self._finish(name, row, ended=output.finished)
        elif output.finished:
            return f"vLLM ended it: {completion.finish_reason}"
        return None

    def _forget(self) -> None:
        self._rows, self._running, self._kept = {}, {}, []

    def _finish(self, name: str, row: Row, *, ended: bool) -> None:
        """Take a row from the list; vLLM does not know of stop strings and goes on with the row until it is told."""
        del self._rows[name]
        names = self._running[row.request_id]
        names.remove(name)
        if not names:
            del self._running[row.request_id]
        if not ended:
            self._core.abort([name])

    def _refuse(self, broken: dict[str, str]) -> None:
        for request_id in broken:
            self.abort(request_id)
        reasons = "; ".join(sorted(set(broken.values())))
        raise RequestsFailed(f"{reasons} (requests {', '.join(sorted(broken))})", frozenset(broken))

    def abort(self, request_id: str) -> None:
        """Forget a request, known or not; no event of it follows."""
        self._kept = [event for event in self._kept if event.request_id != request_id]
        names = self._running.pop(request_id, [])
        for name in names:
            del self._rows[name]
        if names:
            self._core.abort(names)

    def load_adapter(self, digest: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        """Make an adapter available; one that is loaded already stays. Raises `InputError` for what is not plain LoRA
        on this base."""
        if digest in self._adapters:
            return
        if not self._takes_adapters:
            raise InputError(f"vLLM has no LoRA for the architecture of {self._folder.name}: use the native engine")
        self._adapters[digest] = self._add(digest, tensors, config)

    def _neutral(self) -> LoRARequest:
        """What rows of the base model run with on a CPU.

        Rows without an adapter have the index -1 there, and vLLM's products on a CPU take that for the last adapter.
        """
        return self._add("neutral", *self._shapes.neutral_adapter())

    def _add(self, name: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> LoRARequest:
        number = next(self._numbers)
        folder = Path(self._scratch.name) / f"adapter-{number}"
        write_adapter(folder, tensors, config, max_rank=MAX_RANK[self._device])
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))
        try:
            self._core.ask(self._core.llm.add_lora(request))
        except WorkerLost:
            raise
        except Exception as error:  # noqa: BLE001  vLLM raises whatever it meets in the folder
            shutil.rmtree(folder)
            raise InputError(f"vLLM cannot load adapter {name[:12]}: {error}") from None
        return request

    def drop_adapter(self, digest: str) -> None:
        """Forget an adapter. Raises `InputError` while a request uses it, or when it is not loaded."""
        users = {row.request_id for row in self._rows.values() if row.adapter == digest}
        if users:
            raise InputError(f"adapter {digest[:12]} is in use by {len(users)} requests, {min(users)!r} among them")
        if digest not in self._adapters:
            raise InputError(f"adapter {digest[:12]} is not loaded")
        request = self._adapters.pop(digest)
        self._core.ask(self._core.llm.remove_lora(request.lora_int_id))
        shutil.rmtree(request.lora_path)

    def adapters(self) -> tuple[str, ...]:
        """Digests of the loaded adapters."""
        return tuple(self._adapters)

    def load_base(self, tensors: dict[str, np.ndarray]) -> None:
        """Replace the base model's weights. Raises `InputError` while requests run, and changes nothing when a name or
        shape is unknown or a weight is missing."""
        if self.busy:
            raise InputError("the base weights cannot be replaced while requests run: wait for them or abort them")
        folder = Path(self._scratch.name) / f"base-{next(self._numbers)}"
        self._shapes.write(folder, tensors)
        llm = self._core.llm
        try:
            self._core.ask(llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)}))
        finally:
            shutil.rmtree(folder)
        if not self._core.ask(llm.reset_prefix_cache()):
            raise RunFailed("vLLM kept a cache of the weights before these: it still had requests")

    def sleep(self) -> None:
        """Give the GPU's memory to others until `wake`; the weights wait in the host's memory, caches are lost.

        Raises `InputError` on a CPU, and while requests run.
        """
        self._need_gpu()
        if self.busy:
            raise InputError("the engine cannot sleep while requests run: wait for them or abort them")
        self._core.ask(self._core.llm.sleep(level=1))

    def wake(self) -> None:
        """Take the GPU's memory back. Raises `InputError` on a CPU."""
        self._need_gpu()
        self._core.ask(self._core.llm.wake_up())

    def _need_gpu(self) -> None:
        if self._device != "cuda":
            raise InputError(f"sleep and wake move a GPU's memory: this engine runs on {self._device}")

    def close(self) -> None:
        """End vLLM's processes and remove what was written for them."""
        self._core.close()
        self._scratch.cleanup()

    def _strings(self, request: GenerationRequest) -> StopStrings | None:
        if not request.sampling.stop:
            return None
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        return StopStrings(self._tokenizer, request.sampling.stop)
