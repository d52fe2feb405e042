"""What goes wrong while a checkpoint is written beside training, on real Ray: the one before it holds, and says so."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylign.cluster.errors import RunFailed
from raylign.cluster.rundir import RunDir
from raylign.trainers.comparison import CLOCKS
from raylign.trainers.data.inputs import read_inputs
from raylign.trainers.online.checkpoints import latest_checkpoint
from raylign.trainers.opening import open_run
from raylign.trainers.pipeline import run_recipe
from raylign.trainers.recipe import load_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.models import save_tokenizer

from .runs import start
from .test_failures import pid_of, until

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_a_changed_byte_costs_the_step_since_the_one_before(
    tiny_grpo: Callable[..., Path], ray_session: str, tmp_path: Path, small_disk: Path
) -> None:
    config = load_recipe(tiny_grpo("full", stages__0__kl="null"))
    run = open_run(config, tmp_path, named=True, resume=True)
    (run / "checkpoints").symlink_to(small_disk)
    note = run.event

    def fill_the_disk(kind: str, **facts: Any) -> None:
        note(kind, **facts)
        if (kind, facts.get("step")) == ("checkpoint", 2):
            free = os.statvfs(small_disk)
            (small_disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize))

    run.event = fill_the_disk
    full = r"checkpoint .*000003.*: No space left on device; the last checkpoint is step 2: `raylign resume"
    with pytest.raises(RunFailed, match=full):
        run_recipe(config, run, read_inputs(config, run.path), lambda _: None)
    kept = small_disk / "0-grpo"
    assert sorted(p.name for p in kept.iterdir()) == ["step-000001", "step-000002"]
    (small_disk / "ballast").unlink()

    shard = kept / "step-000002/policy/shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run, resumed = start(config, tmp_path)
    assert resumed["status"] == "succeeded"
    assert [e["checkpoint"] for e in run.events("checkpoint_refused")] == ["step-000002"]
    assert [e["step"] for e in run.events("resumed")] == [1]
    assert {1, 2} <= made_twice_the_same(run)  # and the fourth, where it was done before the third could not be saved

    checkpoints = run.events("checkpoint")
    assert [e["step"] for e in checkpoints] == [1, 2, 2, 3, 4]
    assert all(e["bytes"] == len(content) and e["seconds"] > 0 for e in checkpoints)
    assert ["seconds/checkpoint" in m for m in run.all_metrics()] == [False, False, True, True]  # since the resume


@pytest.fixture
def larger_model(tmp_path: Path) -> Path:
    """A model whose training state, 50 MB, takes a while to write."""
    folder = tmp_path / "larger"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=save_tokenizer(folder),
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_kills_of_policy_and_controller_in_the_middle_of_a_file_cost_one_step_each(
    tiny_grpo: Callable[..., Path], larger_model: Path, ray_session: str, tmp_path: Path
) -> None:
    recipe = tiny_grpo(
        "killed",
        model=f"{{path: {larger_model}}}",
        stages__0__adapter="null",
        stages__0__kl="null",
        stages__0__steps=1000,
        stages__0__learning_rate="1e-4",
        stages__0__checkpoint_every=1,
        cluster=f"{{cpus: 8, address: '{ray_session}'}}",
        controller="{pause_seconds: 0.1}",
    )
    (tmp_path / "plan").write_text("[]")
    command = [sys.executable, "-m", "benchmarks.saboteur", str(recipe), str(tmp_path), str(tmp_path / "plan")]
    run = RunDir(tmp_path / "killed")
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log, cwd=ROOT) as supervisor:
        try:
            first, policy = caught_in_the_middle_of_a_file(run)
            policy.kill()
            until("the policy goes on", lambda: len(run.events("resumed")) == 1)
            second, policy = caught_in_the_middle_of_a_file(run)
            os.kill(run.status()["pid"], signal.SIGKILL)
            policy.resume()  # it may write on, for nobody
            until("the controller goes on", lambda: len(run.events("resumed")) == 2)
            until("that step is saved", lambda: any(e["step"] == second for e in run.events("checkpoint")))
            run.desire(stop=True)
            assert supervisor.wait(120) == 0, (tmp_path / "log").read_text()
        finally:
            supervisor.kill()
    assert [e["roles"] for e in run.events("role_lost")] == [["policy-0"]]
    assert len(run.events("controller_lost")) == 1
    assert [e["step"] for e in run.events("resumed")] == [first - 1, second - 1]
    saved = [e["step"] for e in run.events("checkpoint")]
    assert saved == list(range(1, saved[-1] + 1))  # each once: those that were caught do not count
    found, broken = latest_checkpoint(run / "checkpoints/0-grpo")
    assert found
    assert (found.step, broken) == (run.status()["step"], [])
    assert not list((run / "checkpoints/0-grpo").glob(".step-*"))
    assert {first - 1, second - 1} <= made_twice_the_same(run)


def caught_in_the_middle_of_a_file(run: RunDir) -> tuple[int, psutil.Process]:
    """The policy, suspended while it writes a checkpoint's shard, and the checkpoint's step."""
    root, shards = run / "checkpoints/0-grpo", "policy/*.safetensors"
    done = len(run.events("resumed"))
    until("one is whole", lambda: bool(list(root.glob(f"step-*/{shards}"))))
    size = next(root.glob(f"step-*/{shards}")).stat().st_size
    policy = psutil.Process(pid_of("killed/grpo/policy-0"))
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for shard in root.glob(f".step-*/{shards}"):
            policy.suspend()
            if part_of(shard, size):
                assert len(run.events("resumed")) == done
                return int(shard.parents[1].name.rpartition("-")[2]), policy
            policy.resume()
        time.sleep(0.001)
    raise AssertionError("no shard was caught while it was written")


def part_of(shard: Path, size: int) -> bool:
    try:
        return shard.stat().st_size < size
    except FileNotFoundError:  # it is in its place by now
        return False


def made_twice_the_same(run: RunDir) -> set[int]:
    """The steps that were made more than once, which must have come out alike but for the clock."""
    seen: dict[int, dict[str, Any]] = {}
    twice = set()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        told = json.loads(line)
        told = {k: v for k, v in told.items() if not k.startswith(CLOCKS)}
        if told["step"] in seen:
            twice.add(told["step"])
            assert seen[told["step"]] == told
        seen[told["step"]] = told
    return twice
