"""Rows with different adapters in one batch: against none at all, PEFT's mixed batches, and one adapter at a time."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from .arena import Arena
from .contestants import Generate, Native, warm_up
from .measured import Case, Contest, Measured, measure
from .models import SHAPES, Dtype, load_model
from .workloads import Workload

ROWS = 32
_COUNTS = (1, 4, 16, 64)
_RANK = 16
_PROMPT = 32
_COMPLETION = 32

PEERS = ("base", "peft", "switching")


def cases() -> list[Case]:
    """Named like `25M-fp32-A16-vs-peft`."""
    return [_case("25M", "fp32", (ROWS, _PROMPT, _COMPLETION), count, peer) for count in _COUNTS for peer in PEERS]


def quick_cases() -> list[Case]:
    """Four adapters on the smallest model."""
    return [_case("1M", "fp32", (8, 8, 4), 4, peer) for peer in PEERS]


def names_for(rows: int, count: int, pair: int) -> list[str]:
    """The adapter of each row: all in turn, going on where the pair before stopped."""
    return [f"a{(pair * rows + row) % count}" for row in range(rows)]


def rows_by_adapter(names: list[str]) -> dict[str, list[int]]:
    """The rows of each adapter."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        rows[name].append(row)
    return dict(rows)


class PeftPeer:
    """PEFT with all adapters loaded on transformers' own model."""

    def __init__(self, folder: Any, dtype: Dtype, count: int, device: str = "cpu") -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        # init_lora_weights=False makes B random instead of zero.
        self.config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", init_lora_weights=False)
        self.model: Any = get_peft_model(load_model(folder, dtype, device), self.config, adapter_name="a0")
        for i in range(1, count):
            self.model.add_adapter(f"a{i}", self.config)
        self.model.eval()
        self._generate = Generate(self.model)

    def tensors(self, name: str) -> dict[str, Any]:
        """One adapter's weights as numpy arrays, under PEFT's names."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, adapter_name=name)
        return {key: value.float().cpu().numpy() for key, value in state.items()}

    def mixed(self, work: Workload, count: int, pair: int) -> Measured:
        """One batch with `adapter_names`."""
        return self._generate.run(work, pair, adapter_names=names_for(len(work.lengths), count, pair))

    def switching(self, work: Workload, count: int, pair: int) -> Measured:
        """A batch for each adapter: `set_adapter`, then `generate` with its rows."""
        prompts, groups = work.prompts(pair), rows_by_adapter(names_for(len(work.lengths), count, pair))

        def all_in_turn() -> None:
            for name, rows in groups.items():
                self.model.set_adapter(name)
                self._generate.batch([prompts[row] for row in rows], max(work.lengths))

        return measure(work.useful, all_in_turn)


def adapted(
    arena: Arena, size: str, dtype: Dtype, slots: int, max_length: int, count: int, device: str = "cpu"
) -> Native:
    """Our engine with the PEFT peer's adapters."""
    peft: PeftPeer = arena.get(PeftPeer, arena.folder(size, dtype), dtype, count, device)
    native = Native(arena.folder(size, dtype), dtype, slots=slots, max_length=max_length, device=device)
    config = {**peft.config.to_dict(), "peft_type": "LORA"}
    for i in range(count):
        native.engine.load_adapter(f"a{i}", peft.tensors(f"a{i}"), config)
    return native


def _case(size: str, dtype: Dtype, sizes: tuple[int, int, int], count: int, peer: str) -> Case:
    rows, prompt, completion = sizes
    work = Workload(
        case=f"{size}-{dtype}-A{count}-vs-{peer}",
        vocabulary=SHAPES[size].vocabulary,
        prompt=prompt,
        lengths=(completion,) * rows,
    )
    return Case(
        name=work.case,
        peer=peer,
        unit="completion tokens/s",
        group=f"{size}-{dtype}",
        make=partial(_contest, size, dtype, work, count, peer),
    )


def _contest(size: str, dtype: Dtype, work: Workload, count: int, peer: str, arena: Arena) -> Contest:
    rows, loaded = len(work.lengths), max(count, max(_COUNTS))
    ours: Native = arena.get(adapted, arena, size, dtype, rows, work.longest, loaded)

    def our_side(work: Workload, pair: int) -> Measured:
        return ours.run(work, pair, names_for(rows, count, pair))

    their_side = _peer(arena, size, dtype, count, peer, work, loaded)
    return Contest(
        ours=partial(our_side, work),
        theirs=partial(their_side, work),
        warm_up=partial(warm_up, work, our_side, their_side),
        settings={**work.describe(), "adapters": count, "loaded": loaded, "rank": _RANK},
    )


def _peer(
    arena: Arena, size: str, dtype: Dtype, count: int, peer: str, work: Workload, loaded: int
) -> Callable[[Workload, int], Measured]:
    if peer == "base":
        return arena.native(size, dtype, slots=len(work.lengths), max_length=work.longest).run
    peft: PeftPeer = arena.get(PeftPeer, arena.folder(size, dtype), dtype, loaded, "cpu")
    side = peft.mixed if peer == "peft" else peft.switching
    return lambda work, pair: side(work, count, pair)
