"""Those who generate: the native engine, and the peers as their own users call them. Each has `run(work, pair)`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .measured import Measured, measure
from .models import TORCH_NAMES, Dtype, load_model
from .workloads import Workload


class Native:
    """The native engine; one request a group, so that a shared prompt is prefilled once."""

    def __init__(
        self, folder: Path, dtype: Dtype, *, slots: int, max_length: int, threads: int = 1, device: str = "cpu"
    ) -> None:
        from raylign.rollout.native.engine import NativeEngine  # pyright: ignore[reportMissingImports]

        self.engine = NativeEngine(
            folder, slots=slots, max_length=max_length, dtype=TORCH_NAMES[dtype], threads=threads, device=device
        )

    def run(self, work: Workload, pair: int, adapters: Sequence[str | None] = ()) -> Measured:
        """Generate all requests; `adapters` is one digest or none a request."""
        from raylign.rollout.engine import generate  # pyright: ignore[reportMissingImports]
        from raylign.rollout.records import GenerationRequest, Sampling, SeedKey  # pyright: ignore[reportMissingImports]

        requests = [
            GenerationRequest(
                request_id=str(first),
                prompt=np.array(prompt, np.int32),
                sampling=Sampling(max_tokens=work.lengths[first]),
                seed=SeedKey(0, pair, first),
                n=work.group,
                adapter=adapters[first] if adapters else None,
            )
            for first, prompt in list(enumerate(work.prompts(pair)))[:: work.group]
        ]
        done: dict[str, Any] = {}
        took = measure(work.useful, lambda: done.update(generate(self.engine, requests)))
        _check(work, [len(c.tokens) for request in requests for c in done[request.request_id]])
        return took


class Generate:
    """TRL's GRPO path: one left-padded batch through `transformers.generate`, sampled, to the longest completion."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, work: Workload, pair: int, **more: Any) -> Measured:
        """Generate all requests in one batch; `more` goes to `generate`."""
        prompts = work.prompts(pair)
        return measure(work.useful, lambda: self.batch(prompts, max(work.lengths), **more))

    def batch(self, prompts: list[list[int]], length: int, **more: Any) -> None:
        """What `GRPOTrainer._generate_single_turn` does with token ids, with its default settings and EOS off."""
        import torch
        from trl.trainer.utils import pad

        rows = [torch.tensor(ids, device=self.model.device) for ids in prompts]
        ids = pad(rows, padding_value=0, padding_side="left")
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left")
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=trl_settings(length), **more
            )
        completions = [row.tolist() for row in out[:, ids.shape[1] :].cpu()]
        if {len(completion) for completion in completions} != {length}:
            raise RuntimeError(f"generate stopped before {length} tokens")


class ContinuousBatching:
    """`transformers` continuous batching, each request with its own length, which `generate_batch` cannot take."""

    def __init__(self, folder: Path, dtype: Dtype, *, slots: int, max_length: int, device: str = "cpu") -> None:
        from transformers import ContinuousBatchingConfig

        self.model = load_model(folder, dtype, device)
        page = 32
        self.config = ContinuousBatchingConfig(
            page_size=page, num_blocks=slots * (-(-max_length // page) + 1), max_batch_tokens=1024
        )

    def run(self, work: Workload, pair: int) -> Measured:
        """Generate all requests; the manager is made anew, as `generate_batch` does, and that is not measured."""
        prompts, lengths = work.prompts(pair), work.lengths
        counts: dict[str, int] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=trl_settings(max(lengths), eos=-1), continuous_batching_config=self.config, timeout=30
        ) as manager:

            def collect() -> None:
                ids = [
                    manager.add_request(prompt, max_new_tokens=length)
                    for prompt, length in zip(prompts, lengths, strict=True)
                ]
                while len(counts) < len(ids):
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        counts[result.request_id] = len(result.generated_tokens)
                    elif result is None and not manager.is_running():
                        raise RuntimeError("transformers' continuous batching stopped")

            took = measure(work.useful, collect)
        _check(work, list(counts.values()))
        return took


def trl_settings(length: int, eos: int | None = None) -> Any:
    """TRL 1.16's GRPO defaults, with a fixed length; no token ends a row (continuous batching calls that -1)."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=length,
        do_sample=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=eos,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        disable_compile=True,
    )


def _check(work: Workload, lengths: list[int]) -> None:
    if sorted(lengths) != sorted(work.lengths):
        raise RuntimeError(f"{sum(lengths)} tokens were generated where {work.useful} were wanted")


def warm_up(work: Workload, *sides: Callable[[Workload, int], Measured]) -> None:
    """A few tokens of each request on every side, before anything is measured."""
    for side in sides:
        side(work.warm_up(), 0)
