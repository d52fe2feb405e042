"""W&B offline: what it writes, and that nothing of it stays."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.config import TrackingConfig
from raylign.trainers.tracking import NoTracker, WandbTracker, open_tracker

OFFLINE = TrackingConfig(wandb="offline", project="tests")


def services() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]


def history(run_dir: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")))


def test_off_keeps_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(), tmp_path, "run", {})
    assert isinstance(tracker, NoTracker)
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert not list(tmp_path.iterdir())


def test_offline_writes_its_file_and_leaves_no_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    environment = dict(os.environ)
    tracker = open_tracker(OFFLINE, tmp_path, "run", {"seed": 7, "stages": [{"type": "sft"}]})
    assert len(services()) == 1
    for step in range(1, 4):
        tracker.log(step, {"loss": 1 / step}, "sft")
    tracker.log(1, {"reward/mean": 0.5}, "grpo")
    tracker.finish()
    tracker.finish()
    assert services() == []
    assert dict(os.environ) == environment
    for key in (b"sft/loss", b"sft/step", b"grpo/reward/mean"):
        assert key in history(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_resumed_run_keeps_its_id_and_works_off_the_main_thread(tmp_path: Path) -> None:
    def track() -> None:
        tracker = open_tracker(OFFLINE, tmp_path, "run", {})
        tracker.log(1, {"loss": 1.0})
        tracker.finish()

    for _ in range(2):
        thread = threading.Thread(target=track)
        thread.start()
        thread.join()
    files = [p.name for p in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(files) == 2
    assert len(set(files)) == 1
    assert services() == []


def test_death_of_the_service_ends_tracking_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_tracker(OFFLINE, tmp_path, "run", {})
    assert isinstance(tracker, WandbTracker)
    service = services()[0]
    service.kill()
    psutil.wait_procs([service], timeout=10)
    for step in range(200):
        tracker.log(step, {"loss": 1.0})
    tracker.finish()
    assert services() == []
    assert [r.message for r in caplog.records if "metrics.jsonl goes on" in r.message]


ONLINE = """
from pathlib import Path
from raylign.trainers.config import TrackingConfig
from raylign.trainers.tracking import open_tracker
open_tracker(TrackingConfig(wandb="online"), Path.cwd(), "run", {})
"""


def test_online_without_a_key_is_an_input_error(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ONLINE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{InputError.__module__}.InputError: tracking.wandb online: W&B does not start"), (
        done.stderr
    )
