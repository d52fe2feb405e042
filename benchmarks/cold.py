"""From an adapter on disk, which no replica has read, to its first token; against one that the engine holds.

python -m benchmarks.cold
"""

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from raylign.serve.protocol import CompletionRequest
from raylign.serve.registry import Entry, Registry
from raylign.serve.service import Service, Work

from .churn import adapter, node
from .models import tiny_model

_ADAPTERS = 30


async def first_token(service: Service, entry: Entry) -> float:
    """Seconds to the first token of a short answer."""
    fields = CompletionRequest(model=entry.digest, prompt="Hi", max_tokens=1, temperature=0.0)
    work = Work(entry=entry, prompts=[service.prompts.text("Hi")], fields=fields)
    began = time.perf_counter()
    async for _ in service.generate(work):
        return time.perf_counter() - began
    raise RuntimeError("an answer without a token")


async def measure(service: Service, entries: list[Entry]) -> dict[str, float]:
    """Median milliseconds, and the slowest, of the first and the second request to each adapter."""
    await first_token(service, entries[0])  # kernels are compiled
    cold, warm = [], []
    for entry in entries[1:]:
        cold.append(1000 * await first_token(service, entry))
        warm.append(1000 * await first_token(service, entry))
    return {
        "cold_ms": statistics.median(cold),
        "cold_max_ms": max(cold),
        "loaded_ms": statistics.median(warm),
        "loaded_max_ms": max(warm),
    }


def main() -> None:
    """Print the figures as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder) / "registry")
        base = registry.register_base(tiny_model(Path(folder) / "model"))
        entries = [adapter(registry, base, seed) for seed in range(_ADAPTERS)]
        with node(registry, base, _ADAPTERS, "one") as one:
            print(json.dumps(asyncio.run(measure(one.service, entries)), indent=1))


if __name__ == "__main__":
    main()
