"""A replica follows the registry: it proves what is new, keeps what names point at, drops what is retired."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from raylign.cluster.weights import save_adapter
from raylign.rollout.engine_thread import EngineThread
from raylign.serve.adapter_cache import AdapterCache
from raylign.serve.config import Guard
from raylign.serve.outcomes import End, Outcomes
from raylign.serve.reconcile import Reconciler
from raylign.serve.registry import Registry
from raylign.serve.replica import ReplicaSpec
from raylign.serve.reports import LIVE_SECONDS, Report, live_reports, write_report

from .conftest import CONFIG, tensors
from .live import on_one_thread


@pytest.fixture
def registry(tmp_path: Path, tiny_model: Path) -> Registry:
    """A base and three adapters, all without a name."""
    registry = Registry(tmp_path / "registry")
    base = registry.register_base(tiny_model)
    for seed in (1, 2, 3):
        registry.publish(
            save_adapter(tmp_path / "adapters", tensors(seed), CONFIG, {"base_digest": base.digest})[1], base
        )
    return registry


@pytest.fixture(scope="module")
def thread(tiny_model: Path) -> Iterator[EngineThread]:
    spec = ReplicaSpec(base="", registry=Path(), slots=8, max_length=64)
    thread = EngineThread(lambda: on_one_thread(spec, tiny_model))
    yield thread
    thread.close()


def _follower(
    registry: Registry, cache: AdapterCache, outcomes: Outcomes | None = None, guard: Guard | None = None
) -> Reconciler:
    return Reconciler(
        registry=registry,
        base=registry.entries()[0],
        adapters=cache,
        outcomes=outcomes or Outcomes(),
        guard=guard or Guard(),
        replica="r1",
    )


def test_a_model_is_ready_once_every_live_replica_has_proven_it(registry: Registry, thread: EngineThread) -> None:
    digests = [entry.digest for entry in registry.entries()]
    assert {registry.state(digest) for digest in digests} == {"verified"}
    asyncio.run(_follower(registry, AdapterCache(thread, 2)).round())
    assert {registry.state(digest) for digest in digests} == {"ready"}
    write_report(registry.root, Report(replica="r2", base=digests[0], ready=(digests[0],)))
    assert [registry.state(digest) for digest in digests] == ["ready", "verified", "verified", "verified"]
    late = time.time() - LIVE_SECONDS - 1
    write_report(registry.root, Report(replica="r2", base=digests[0], heard=late))
    assert {registry.state(digest) for digest in digests} == {"ready"}, "who was not heard of for long is no replica"


def test_what_names_point_at_is_in_the_engine_after_a_start(registry: Registry, thread: EngineThread) -> None:
    named = registry.entries()[1].digest
    registry.promote("best", named)

    async def main() -> None:
        cache = AdapterCache(thread, 1)
        follower = _follower(registry, cache)
        await follower.round()
        assert cache.held() == (named,)

    asyncio.run(main())


def test_a_retired_model_leaves_once_nothing_uses_it(registry: Registry, thread: EngineThread) -> None:
    entry = registry.entries()[1]

    async def main() -> None:
        cache = AdapterCache(thread, 3)
        follower = _follower(registry, cache)
        async with cache.use(entry.digest, lambda: registry.read_adapter(entry)):
            registry.retire(entry.digest)
            assert entry.digest not in (await follower.round()).ready
            assert entry.digest in cache.held(), "a request in flight keeps its adapter"
        await follower.round()
        assert entry.digest not in cache.held()

    asyncio.run(main())


def test_an_adapter_that_the_engine_cannot_hold_is_never_ready(
    registry: Registry, thread: EngineThread, tmp_path: Path
) -> None:
    base = registry.entries()[0]
    foreign = {name.replace("layers.0", "layers.9"): array for name, array in tensors(7).items()}
    _, folder = save_adapter(tmp_path / "adapters", foreign, CONFIG, {"base_digest": base.digest})
    entry = registry.publish(folder, base)
    report = asyncio.run(_follower(registry, AdapterCache(thread, 2)).round())
    assert "has no layer in this model" in report.refused[entry.digest]
    assert registry.state(entry.digest) == "verified"
    assert live_reports(registry.root) == [report]


def _moved(registry: Registry) -> tuple[str, str]:
    old, new = (entry.digest for entry in registry.entries()[1:3])
    registry.promote("best", old)
    registry.promote("best", new)
    return old, new


def _ends(digest: str, failed: int, fine: int, first_token: float = 0.1) -> list[End]:
    return [End(time.time() + 1, digest, i < failed, first_token) for i in range(failed + fine)]


@pytest.mark.parametrize(
    ("own", "others", "why"),
    [
        ((3, 2, 0.1), (0, 9, 0.1), "60% of 5 requests failed"),
        ((0, 5, 3.0), (0, 9, 0.1), "waited 3 s or more"),
        ((0, 5, 0.1), (0, 9, 0.1), ""),
        ((1, 0, 0.1), (0, 9, 0.1), ""),
        ((5, 0, 0.1), (9, 0, 0.1), ""),
    ],
    ids=["errors", "slow", "fine", "too few", "everything fails"],
)
def test_a_name_goes_back_from_a_model_that_fails(
    registry: Registry,
    thread: EngineThread,
    own: tuple[int, int, float],
    others: tuple[int, int, float],
    why: str,
) -> None:
    old, new = _moved(registry)
    outcomes = Outcomes()
    for end in _ends(new, *own) + _ends(old, *others):
        outcomes.note(end)
    guard = Guard(errors=0.5, first_token_seconds=1.0, requests=3)
    follower = _follower(registry, AdapterCache(thread, 3), outcomes, guard)
    asyncio.run(follower.round())
    alias = registry.alias("best")
    assert alias.digest == (old if why else new)
    assert why in alias.now.why
    asyncio.run(follower.round())
    assert registry.alias("best") == alias, "it goes back once"
