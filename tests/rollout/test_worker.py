"""A rollout worker without Ray: which weights it takes, and which groups it generates."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from raylign.cluster.config import RoleResources
from raylign.cluster.errors import RunFailed
from raylign.cluster.weights import Parcel, WeightVersion, adapter_digest, joined, version_digest
from raylign.rollout.config import RolloutConfig, SamplingConfig
from raylign.rollout.records import Completion, GenerationRequest, Group, Origin, Sampling, SeedKey, Span
from raylign.rollout.worker import RolloutWorker, WorkerSpec
from raylign.trainers.adapters import export_weights, open_base

from .models import make_adapter
from .reference import Reference


@pytest.fixture
def worker(tiny_model: Path) -> Iterator[RolloutWorker]:
    threads = torch.get_num_threads()
    config = RolloutConfig(group_size=2, slots=8, sampling=SamplingConfig(max_tokens=5))
    spec = WorkerSpec(base=tiny_model, dtype="float32", config=config, seed=3, max_length=64, stop_token_ids=(2,))
    yield RolloutWorker("w", spec)
    torch.set_num_threads(threads)


def test_a_worker_generates_from_the_version_it_proved_and_refuses_any_other(
    worker: RolloutWorker, tiny_model: Path, tmp_path: Path
) -> None:
    tensors, config = make_adapter(tiny_model, tmp_path, seed=1)
    digest = adapter_digest(tensors, config, "base")
    group = Group(step=0, index=0, prompt=np.array([5, 6], np.int32), row={}, version=1, digest=digest)
    with pytest.raises(RunFailed, match=r"w has weights None, step 0 group 0 needs version 1"):
        worker.generate(group, 1)

    assert worker.set_weights(WeightVersion(1, digest, Parcel(()), config, "base"), joined(tensors)) == digest
    made = worker.generate(group, 1)
    assert made.worker == "w"
    assert [0 < len(s.tokens) <= 5 for s in made.samples] == [True, True]

    with pytest.raises(RunFailed, match=r"for version 2, not 0000"):
        worker.set_weights(WeightVersion(2, "0" * 64, Parcel(()), config, "base"), joined(tensors))
    assert worker.generate(group, 1).samples[0].tokens.tolist() == made.samples[0].tokens.tolist()

    tensors = {name: array + 1 for name, array in tensors.items()}
    worker.set_weights(
        WeightVersion(2, adapter_digest(tensors, config, "base"), Parcel(()), config, "base"), joined(tensors)
    )
    with pytest.raises(RunFailed, match=r"w has weights \(2, .*needs version 1"):
        worker.generate(group, 1)


def test_a_base_that_fails_its_proof_leaves_no_weights(worker: RolloutWorker, tiny_model: Path) -> None:
    pieces = joined(export_weights(open_base(tiny_model))[0])
    digest = version_digest(pieces, {}, "base")
    group = Group(step=0, index=0, prompt=np.array([5, 6], np.int32), row={}, version=1, digest=digest)
    assert worker.set_weights(WeightVersion(1, digest, Parcel(()), {}, "base"), pieces) == digest
    before = worker.generate(group, 1).samples[0].tokens.tolist()

    for wrong in (pieces, pieces[1:]):  # without its first tensors it does not load either
        with pytest.raises(RunFailed, match=r"w got weights .* for version 2, not 0000"):
            worker.set_weights(WeightVersion(2, "0" * 64, Parcel(()), {}, "base"), wrong)
        with pytest.raises(RunFailed, match="w has weights None"):
            worker.generate(group, 2)
    worker.set_weights(WeightVersion(1, digest, Parcel(()), {}, "base"), pieces)
    assert worker.generate(group, 3).samples[0].tokens.tolist() == before


def test_a_call_that_is_aborted_gives_nothing_and_new_weights_abort_what_still_runs(
    worker: RolloutWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """Groups of version 1 wait on an engine that is held between two steps, so that each is running for certain."""
    tensors, config = make_adapter(tiny_model, tmp_path, seed=1)
    newer = {name: array + 1 for name, array in tensors.items()}
    digests = [adapter_digest(t, config, "base") for t in (tensors, newer)]
    worker.set_weights(WeightVersion(1, digests[0], Parcel(()), config, "base"), joined(tensors))
    groups = [
        Group(step=0, index=i, prompt=np.array([5, 6], np.int32), row={}, version=1, digest=digests[0])
        for i in range(3)
    ]
    worker.abort(7)
    assert worker.generate(groups[0], 7) is None

    release = threading.Event()
    worker._engine.call(lambda _: release.wait(60))
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(worker.generate, group, call) for call, group in enumerate(groups)]
        while len(worker._running) < 3:
            time.sleep(0.001)
        worker.abort(1)
        release.set()
        assert running[1].result(timeout=60) is None
        assert [running[i].result(timeout=60) is None for i in (0, 2)] == [False, False]

        release.clear()
        worker._engine.call(lambda _: release.wait(60))
        late = threads.submit(worker.generate, groups[0], 8)
        while 8 not in worker._running:
            time.sleep(0.001)
        loading = threads.submit(
            worker.set_weights, WeightVersion(2, digests[1], Parcel(()), config, "base"), joined(newer)
        )
        while worker._engine._commands.qsize() < 4:  # the request, its abort, its end, the new adapter
            time.sleep(0.001)
        release.set()
        assert loading.result(timeout=60) == digests[1]
        assert late.result(timeout=60) is None
    assert worker.generate(replace(groups[0], version=2, digest=digests[1]), 9) is not None


def test_a_completion_goes_on_under_newer_weights_where_it_was_cut(
    worker: RolloutWorker, tiny_model: Path, tmp_path: Path
) -> None:
    """Cut twice under the same weights it is what it is uncut, bit for bit, and under newer ones every token has the
    log-prob of a plain forward of the weights that drew it."""
    folders = [tmp_path / "older", tmp_path / "newer"]
    adapters = [make_adapter(tiny_model, folder, seed=i) for i, folder in enumerate(folders)]
    digests = [adapter_digest(*adapter, "base") for adapter in adapters]

    def load(version: int) -> None:
        (tensors, config), digest = adapters[version], digests[version]
        worker.set_weights(WeightVersion(version, digest, Parcel(()), config, "base"), joined(tensors))

    def turn(group: Group, version: int, budget: int | None = 2) -> Group:
        made = worker.generate(replace(group, version=version, digest=digests[version], budget=budget), next(calls))
        assert made is not None
        return made

    calls = itertools.count()
    drawn = Group(step=4, index=1, prompt=np.array([5, 6], np.int32), row={})
    load(0)
    uncut, first = turn(drawn, 0, None), turn(drawn, 0)
    assert any(s.finish_reason == "length" for s in uncut.samples)
    assert not first.finished
    assert max(len(s.tokens) for s in first.samples) == 2
    on = replace(first, step=6, index=0, origin=Origin(4, 1, row=8))  # as a later step goes on with it
    whole = turn(turn(on, 0), 0)
    assert whole.finished
    for cut, sample in zip(whole.samples, uncut.samples, strict=True):
        assert (cut.tokens.tolist(), cut.logprobs.tolist()) == (sample.tokens.tolist(), sample.logprobs.tolist())
        assert (cut.text, cut.finish_reason) == (sample.text, sample.finish_reason)
        assert sample.spans == (Span(len(sample.tokens), 0, digests[0]),)

    load(1)
    mixed = turn(on, 1, None)
    reference = Reference(tiny_model, dict(zip(digests, folders, strict=True)))
    for before, sample in zip(first.samples, mixed.samples, strict=True):
        assert sample.tokens[: len(before.tokens)].tolist() == before.tokens.tolist()
        assert sum(span.tokens for span in sample.spans) == len(sample.tokens)
        begin = 0
        for span in sample.spans:
            seen = np.concatenate([drawn.prompt, sample.tokens[:begin]])
            part = slice(begin, begin + span.tokens)
            request = GenerationRequest(
                request_id="r", prompt=seen, sampling=Sampling(), seed=SeedKey(0, 0, 0), adapter=span.digest
            )
            piece = Completion(tokens=sample.tokens[part], logprobs=sample.logprobs[part], finish_reason="stop")
            assert piece.logprobs == pytest.approx(reference.logprobs(request, piece), abs=1e-4)
            begin += span.tokens
    assert [span.version for span in mixed.samples[0].spans] == [0, 1]
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(mixed.samples, uncut.samples, strict=True))


@pytest.mark.parametrize(("exact", "threads"), [(True, 1), (False, 2)])
def test_an_engine_that_need_not_be_exact_takes_all_cpus_of_its_worker(
    exact: bool, threads: int, tiny_model: Path
) -> None:
    before = torch.get_num_threads()
    config = RolloutConfig(slots=8, exact=exact, resources=RoleResources(cpus=2))
    assert config.is_exact == exact
    spec = WorkerSpec(base=tiny_model, dtype="float32", config=config, seed=3, max_length=64, stop_token_ids=(2,))
    assert RolloutWorker("w", spec)._engine.call(lambda _: torch.get_num_threads()).result() == threads
    torch.set_num_threads(before)
