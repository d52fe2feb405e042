"""The stages on Ray Train, for real: two gloo workers on one Ray session and a tiny random model."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from raylign.cluster.config import Resources
from raylign.cluster.errors import DoesNotFit, RunFailed
from raylign.cluster.rundir import RunDir
from raylign.cluster.weights import base_digest, load_adapter
from raylign.trainers.adapters import open_base, open_model
from raylign.trainers.data.proof import prove_stage
from raylign.trainers.data.template import load_tokenizer
from raylign.trainers.model_state import ModelState, StageOutcome, starting_model
from raylign.trainers.offline.stage import (
    OfflineStage,
    row_order,
    run_offline_stage,
)
from raylign.trainers.stages import CptStage, DataConfig, DpoStage, LoraConfig, SftStage, TrainWorkers
from raylign.trainers.stages.adapters import DoraConfig

DATA = DataConfig(path="rows.jsonl")
RECIPES = Path(__file__).parents[3] / "recipes"


def turn(n: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": str(n + 1)}]}


def pair(n: int) -> dict[str, Any]:
    user, good = turn(n)["messages"]
    return {"prompt": [user], "chosen": [good], "rejected": [{"role": "assistant", "content": "no"}]}


def run(stage: OfflineStage, rows: list[Any], model: ModelState, root: Path, **options: Any) -> StageOutcome:
    """One stage as the pipeline runs it: proven rows, off the main thread."""
    root.mkdir(parents=True, exist_ok=True)
    encoded = prove_stage(stage, rows, load_tokenizer(model.base)).require()
    with ThreadPoolExecutor(1) as thread:
        given = {"index": 0, "model": model, "encoded": encoded, "seed": 5, "run_dir": RunDir(root)} | options
        return thread.submit(run_offline_stage, stage, **given).result()


def losses(root: Path, stage: str) -> list[float]:
    return [m["loss"] for m in RunDir(root).all_metrics() if m["stage"] == stage]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in open_base(folder).state_dict().items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---- all parameters, from random weights

CPT = CptStage(data=DATA, steps=40, batch_size=8, learning_rate=3e-3, workers=2, checkpoint_every=4)
TEXTS = [{"text": f"{n} and {n + 1}"} for n in range(50)]


@pytest.fixture(scope="module")
def undisturbed(ray_session: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("undisturbed")
    return root, run(CPT, TEXTS, ModelState(tiny_model), root, init_random=True)


def test_cpt_learns_and_leaves_an_ordinary_model_folder(undisturbed: tuple[Path, StageOutcome]) -> None:
    root, outcome = undisturbed
    curve = losses(root, "cpt")
    assert len(curve) == 40
    assert curve[-1] < 0.7 * curve[0]
    assert (outcome.model.base, outcome.model.adapter, outcome.steps) == (root / "models" / "0-cpt", None, 40)
    assert not outcome.stopped
    assert outcome.metrics["tokens"] == sum(m["tokens"] for m in RunDir(root).all_metrics())
    assert load_tokenizer(outcome.model.base).decode([2]) == "<|im_end|>"
    status = RunDir(root).status()
    assert (status["stage"], status["step"], status["steps"], status["workers"]) == ("cpt", 40, 40, {"train": 2})


@pytest.mark.slow
def test_a_stop_a_resume_and_a_killed_worker_change_nothing(
    undisturbed: tuple[Path, StageOutcome], tiny_model: Path, tmp_path: Path
) -> None:
    def go_on() -> StageOutcome:
        return run(CPT, TEXTS, ModelState(tiny_model), tmp_path, init_random=True)

    run_dir = RunDir(tmp_path)
    with once(lambda: at_step(run_dir, 5), lambda: run_dir.desire(stop=True)):
        first = go_on()
    assert first.stopped
    assert 5 <= first.steps < 40
    assert first.model.base == tiny_model
    folder = tmp_path / "checkpoints/0-cpt"
    kept = sorted(path.name for path in folder.glob("step-*"))
    assert kept[-1] == f"step-{first.steps:06d}"
    truncate(folder / kept[-1] / "model.safetensors")

    run_dir.desire(stop=False)
    with once(lambda: at_step(run_dir, first.steps + 5), lambda: kill_worker(run_dir)):
        last = go_on()
    assert last.restarts == 1
    assert {e["checkpoint"] for e in run_dir.events("checkpoint_refused")} == {kept[-1]}
    assert (last.steps, last.stopped) == (40, False)
    assert losses(tmp_path, "cpt") == losses(undisturbed[0], "cpt")
    assert same(weights(last.model.base), weights(undisturbed[1].model.base))


def truncate(file: Path) -> None:
    """As a full disk leaves it, or a machine that lost power."""
    os.truncate(file, file.stat().st_size // 2)


def kill_worker(run_dir: RunDir) -> None:
    """Kill training worker 1, as a machine that fails does."""
    os.kill([e["pid"] for e in run_dir.events("worker") if e["rank"] == 1][-1], signal.SIGKILL)


def at_step(run_dir: RunDir, step: int) -> bool:
    return any(m["step"] >= step for m in run_dir.all_metrics())


@contextmanager
def once(holds: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """Do something beside the run, as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    with ThreadPoolExecutor(1) as thread:
        acted = thread.submit(wait)
        yield
        acted.result()


# ---- adapters

SFT = SftStage(data=DATA, steps=16, batch_size=8, learning_rate=2e-2, workers=2, adapter=LoraConfig(r=4))
TURNS = [turn(n) for n in range(50)]


@pytest.fixture(scope="module")
def tuned(ray_session: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageOutcome]:
    root = tmp_path_factory.mktemp("tuned")
    return root, run(SFT, TURNS, ModelState(tiny_model), root)


def test_sft_trains_an_adapter_and_not_its_base(tuned: tuple[Path, StageOutcome], tiny_model: Path) -> None:
    root, outcome = tuned
    curve = losses(root, "sft")
    assert curve[-1] < 0.7 * curve[0]
    assert outcome.model.base == tiny_model
    assert outcome.model.adapter
    assert outcome.model.adapter.parent == root / "adapters"
    tensors, config = load_adapter(outcome.model.adapter)
    assert config["r"] == 4
    assert any(np.abs(t).max() > 0 for name, t in tensors.items() if "lora_B" in name)


def test_the_number_of_workers_does_not_matter(
    tuned: tuple[Path, StageOutcome], tiny_model: Path, tmp_path: Path
) -> None:
    alone = SFT.model_copy(update={"workers": TrainWorkers(), "micro_batch_size": 2})
    run(alone, TURNS, ModelState(tiny_model), tmp_path)
    assert losses(tmp_path, "sft") == pytest.approx(losses(tuned[0], "sft"), rel=1e-4)


def test_dpo_goes_on_training_the_adapter_it_gets(
    tuned: tuple[Path, StageOutcome], tiny_model: Path, tmp_path: Path
) -> None:
    stage = DpoStage(data=DATA, steps=8, batch_size=8, learning_rate=1e-2, workers=1)
    before = tuned[1].model
    outcome = run(stage, [pair(n) for n in range(50)], before, tmp_path, index=1)
    curve = losses(tmp_path, "dpo")
    assert curve[0] == pytest.approx(np.log(2), abs=1e-4), "the reference is not the policy as the stage began"
    assert curve[-1] < 0.7 * curve[0]
    assert outcome.model.base == tiny_model
    assert outcome.model.adapter
    assert outcome.model.adapter != before.adapter
    names = load_adapter(outcome.model.adapter)[0].keys()
    assert names == load_adapter(before.adapter or Path())[0].keys()


def test_an_adapter_block_puts_the_former_adapter_into_a_new_base(
    tuned: tuple[Path, StageOutcome], ray_session: str, tmp_path: Path
) -> None:
    import torch

    before = tuned[1].model
    start = starting_model(SFT, 1, before, RunDir(tmp_path))
    assert start == ModelState(tmp_path / "models" / "1-sft-base")
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        merged = open_base(start.base)(ids).logits
        stacked = open_model(before.base, before.adapter, None, seed=0)(ids).logits
    assert torch.allclose(merged, stacked, atol=1e-5)
    assert base_digest(start.base) != base_digest(before.base)


def test_what_engines_cannot_add_is_merged_when_the_stage_ends(
    ray_session: str, tiny_model: Path, tmp_path: Path
) -> None:
    stage = SFT.model_copy(update={"steps": 4, "adapter": DoraConfig(r=4)})
    outcome = run(stage, TURNS, ModelState(tiny_model), tmp_path)
    assert outcome.model == ModelState(tmp_path / "models" / "0-sft")
    (folder,) = (tmp_path / "adapters").iterdir()
    assert any("lora_magnitude_vector" in name for name in load_adapter(folder)[0])
    assert not same(weights(outcome.model.base), weights(tiny_model))
    assert losses(tmp_path, "sft")[-1] < losses(tmp_path, "sft")[0]


# ---- refusals


def test_more_than_the_cluster_has_is_refused_at_once(ray_session: str, tiny_model: Path, tmp_path: Path) -> None:
    stage = SFT.model_copy(update={"resources": Resources(cpus=500)})
    with pytest.raises(DoesNotFit, match=r"asks for 1000 CPUs \(2 workers of 500\), the cluster has 8"):
        run(stage, TURNS, ModelState(tiny_model), tmp_path)


@pytest.fixture
def busy(ray_session: str) -> Iterator[None]:
    """A cluster of 8 CPUs with one left."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    others = placement_group([{"CPU": 7}])
    ray.get(others.ready())
    yield
    remove_placement_group(others)


def test_a_busy_cluster_is_waited_for_only_so_long(busy: None, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"worker 2 of 2 of stage sft asked for 1 CPU .* within .* has 0 CPU free"):
        run(SFT, TURNS, ModelState(tiny_model), tmp_path, wait_seconds=2.0)


def test_a_stop_ends_the_wait_for_a_place(busy: None, tiny_model: Path, tmp_path: Path) -> None:
    RunDir(tmp_path).desire(stop=True)
    outcome = run(SFT, TURNS, ModelState(tiny_model), tmp_path, wait_seconds=200.0)
    assert (outcome.stopped, outcome.steps, outcome.model) == (True, 0, ModelState(tiny_model))
    assert RunDir(tmp_path).events("worker") == []


def test_a_stop_is_followed_before_the_first_step(ray_session: str, tiny_model: Path, tmp_path: Path) -> None:
    """Asked for when the workers are there already, with libraries to import and a model to load."""
    run_dir = RunDir(tmp_path)
    with once(lambda: bool(run_dir.events("worker")), lambda: run_dir.desire(stop=True)):
        outcome = run(SFT, TURNS, ModelState(tiny_model), tmp_path)
    assert (outcome.stopped, outcome.steps) == (True, 0)
    assert run_dir.all_metrics() == []
    pids = [e["pid"] for e in run_dir.events("worker")]
    assert len(pids) == 2
    deadline = time.monotonic() + 20  # the last of them may be ending still
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, f"workers {pids} are still there"
        time.sleep(0.1)


def test_a_loss_that_is_no_number_ends_the_run_without_retries(
    ray_session: str, tiny_model: Path, tmp_path: Path
) -> None:
    stage = CPT.model_copy(update={"learning_rate": 1e30, "workers": TrainWorkers(), "max_grad_norm": 1e30})
    with pytest.raises(
        RunFailed, match=r"stage cpt: step \d+ gave a loss of .* on data rows (\d+, )+\d+: lower learning_rate"
    ):
        run(stage, TEXTS, ModelState(tiny_model), tmp_path)
    assert len(RunDir(tmp_path).events("worker")) == 1


def test_row_order_uses_every_row_before_any_twice() -> None:
    order = row_order(seed=3, rows=10, batch_size=4, steps=5)
    assert len(order) == 20
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order == row_order(3, 10, 4, 5)
    assert order != row_order(4, 10, 4, 5)
