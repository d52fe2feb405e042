"""Isolation under churn: two replicas answer many clients while adapters are registered, promoted, evicted and retired.

    python -m benchmarks.churn --adapters 200 --cap 16 --clients 32 --seconds 120

Every answer is compared with the same request alone on the digest it names; at the end registry and replicas agree.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from raylign.cluster.weights import save_adapter
from raylign.rollout.engine_thread import EngineThread
from raylign.serve.api_errors import ApiError
from raylign.serve.config import Guard, Limits
from raylign.serve.protocol import CompletionRequest
from raylign.serve.reconcile import Reconciler
from raylign.serve.registry import Entry, Registry
from raylign.serve.replica import ReplicaSpec, native_engine
from raylign.serve.service import Service, Work

from .models import tiny_model

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
_PROMPTS = ("one", "two words", "and three words")
_ALIASES = 8

Asked = tuple[str, str]
"""Digest and prompt: what alone decides an answer."""


@dataclass
class Churn:
    """What happened."""

    answers: dict[Asked, list[list[int]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Answers there were."""
        return sum(len(found) for found in self.answers.values())


@dataclass(frozen=True)
class Node:
    """A replica without Ray and HTTP."""

    service: Service
    reconciler: Reconciler


@contextmanager
def node(registry: Registry, base: Entry, cap: int, name: str) -> Iterator[Node]:
    """A replica on the native engine until the block ends."""
    from transformers import AutoTokenizer

    spec = ReplicaSpec(base=base.digest, registry=registry.root, slots=32, max_length=128)

    def build() -> Any:
        torch.set_num_threads(1)
        return native_engine(spec, Path(base.path))

    thread = EngineThread(build)
    service = Service(
        engine=thread,
        tokenizer=AutoTokenizer.from_pretrained(base.path),
        registry=registry,
        base=base,
        limits=Limits(adapters=cap),
    )
    yield Node(
        service,
        Reconciler(
            registry=registry,
            base=base,
            adapters=service.adapters,
            outcomes=service.outcomes,
            guard=Guard(),
            replica=name,
        ),
    )
    thread.close()


def adapter(registry: Registry, base: Entry, seed: int) -> Entry:
    """Save and publish a random adapter of the tiny model."""
    rng = np.random.default_rng(seed)
    layer = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    tensors = {
        layer.format(module, factor): rng.normal(size=shape).astype(np.float32)
        for module in ("q_proj", "o_proj")
        for factor, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    _, folder = save_adapter(registry.root.parent / "adapters", tensors, CONFIG, {"base_digest": base.digest})
    return registry.publish(folder, base)


async def ask(service: Service, model: str, prompt: str) -> tuple[str, list[int]]:
    """The digest that answers, and its tokens."""
    fields = CompletionRequest(model=model, prompt=prompt, max_tokens=8, seed=11, temperature=1.0)
    entry = service.entry(model)
    tokens: list[int] = []
    work = Work(entry=entry, prompts=[service.prompts.text(prompt)], fields=fields)
    async for pieces in service.generate(work):
        tokens += [token for piece in pieces for token in piece.tokens]
    return entry.digest, tokens


async def _client(churn: Churn, nodes: list[Node], registry: Registry, number: int, until: float) -> None:
    chance = random.Random(number)
    while time.monotonic() < until:
        live = [entry.digest for entry in nodes[0].service.models().values()]
        model = chance.choice([*(f"alias-{i}" for i in range(_ALIASES)), *live])
        prompt = chance.choice(_PROMPTS)
        try:
            digest, tokens = await ask(chance.choice(nodes).service, model, prompt)
        except ApiError as error:
            if error.status == 404 and registry.is_retired(model):
                churn.counts["asked for when retired already"] += 1
            else:
                churn.errors.append(f"{model}: {error}")
        except Exception as error:  # noqa: BLE001  whatever it is, it is what this looks for
            churn.errors.append(f"{model}: {type(error).__name__}: {error}")
        else:
            churn.answers.setdefault((digest, prompt), []).append(tokens)


async def _administrator(churn: Churn, registry: Registry, base: Entry, seed: int, until: float) -> None:
    """Register, promote and retire, one of each a turn."""
    chance = random.Random(seed)
    while time.monotonic() < until:
        seed += 1
        new = await asyncio.to_thread(adapter, registry, base, seed)
        await asyncio.to_thread(registry.promote, f"alias-{chance.randrange(_ALIASES)}", new.digest)
        pointed = set(registry.aliases().values())
        free = [e.digest for e in registry.entries() if e.kind == "adapter" and e.digest not in pointed]
        free = [digest for digest in free if not registry.is_retired(digest)]
        await asyncio.to_thread(registry.retire, chance.choice(free))
        churn.counts["registered, promoted and retired"] += 1


async def _follow(nodes: list[Node], until: float) -> None:
    while time.monotonic() < until:
        for each in nodes:
            await each.reconciler.round()
        await asyncio.sleep(0.05)


async def _run(
    registry: Registry, base: Entry, nodes: list[Node], *, clients: int, seconds: float, adapters: int
) -> Churn:
    churn, until = Churn(), time.monotonic() + seconds
    await asyncio.gather(
        *(_client(churn, nodes, registry, number, until) for number in range(clients)),
        _administrator(churn, registry, base, adapters, until),
        _follow(nodes, until),
    )
    for each in nodes:
        await each.reconciler.round()
    wanted = {entry.digest for entry in nodes[0].service.models().values()}
    for each in nodes:
        report = await each.reconciler.round()
        if set(report.ready) | {base.digest} != wanted | {base.digest}:
            churn.errors.append(f"{report.replica} has {len(report.ready)} models ready, {len(wanted)} are registered")
    return churn


async def _differing(churn: Churn, alone: Node) -> list[Asked]:
    """Requests of which an answer is not what it is alone."""
    wrong = []
    for (digest, prompt), found in churn.answers.items():
        entry = alone.service._registry.find(digest)  # pyright: ignore[reportPrivateUsage]  retired ones too
        fields = CompletionRequest(model=digest, prompt=prompt, max_tokens=8, seed=11, temperature=1.0)
        tokens: list[int] = []
        work = Work(entry=entry, prompts=[alone.service.prompts.text(prompt)], fields=fields)
        async for pieces in alone.service.generate(work):
            tokens += [token for piece in pieces for token in piece.tokens]
        wrong += [(digest, prompt) for one in found if one != tokens]
    return wrong


def churn(folder: Path, *, adapters: int, cap: int, clients: int, seconds: float) -> dict[str, Any]:
    """Run it below `folder`; gives what was asked, what went wrong, and how many different models answered."""
    registry = Registry(folder / "registry")
    base = registry.register_base(tiny_model(folder / "model"))
    made = [adapter(registry, base, seed) for seed in range(adapters)]
    for number in range(_ALIASES):
        registry.promote(f"alias-{number}", made[number].digest)
    with node(registry, base, cap, "one") as one, node(registry, base, cap, "two") as two:
        happened = asyncio.run(_run(registry, base, [one, two], clients=clients, seconds=seconds, adapters=adapters))
    with node(registry, base, cap, "alone") as alone:
        wrong = asyncio.run(_differing(happened, alone))
    return {
        "answers": happened.total,
        "models": len({digest for digest, _ in happened.answers}),
        "different": len({tuple(found[0]) for found in happened.answers.values()}),
        "wrong": len(wrong),
        "errors": happened.errors,
        **happened.counts,
    }


def main() -> int:
    """Print what happened; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("adapters", 200), ("cap", 16), ("clients", 32), ("seconds", 120)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        result = churn(Path(folder), **options)
    print(json.dumps(options | result, indent=1))
    return 1 if result["wrong"] or result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
