"""Trackers: what each writes or shows, and that nothing of it stays."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.config import TrackingConfig
from raylign.trainers.tracking import open_tracker
from raylign.trainers.tracking.prometheus import gauge_name, series
from raylign.trainers.tracking.wandb import WandbTracker

OFFLINE = TrackingConfig(wandb="offline", prometheus=False, project="tests")


def services() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]


def history(run_dir: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")))


def test_off_keeps_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(prometheus=False), tmp_path, "run", {})
    assert tracker.all == ()
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
    tracker = WandbTracker(OFFLINE, tmp_path / "wandb", "run", {})
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


KEEP = """
import sys
from pathlib import Path
from raylign.trainers.config import TrackingConfig
from raylign.trainers.tracking import open_tracker
tracker = open_tracker(TrackingConfig(trackio=True, prometheus=False, project="tests"), Path.cwd(), "run", {"seed": 7})
for step in range(int(sys.argv[1]), int(sys.argv[1]) + 2):
    tracker.log(step, {"reward/mean": step / 10}, "grpo")
tracker.finish()
"""


def test_trackio_keeps_both_parts_of_a_run_in_its_folder_and_says_nothing_on_stdout(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="the extra raylign[trackio] is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO_")} | {"HOME": str(tmp_path)}
    for start in ("0", "2"):
        command = [sys.executable, "-c", KEEP, start]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    (path,) = tmp_path.glob("trackio/*.db")
    with sqlite3.connect(path) as database:
        lines = [json.loads(line) for (line,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    assert [(line["grpo/step"], line["grpo/reward/mean"]) for line in lines] == [(0, 0), (1, 0.1), (2, 0.2), (3, 0.3)]


def test_prometheus_shows_the_last_step_where_a_node_is_scraped(ray_session: str, tmp_path: Path) -> None:
    import ray

    assert gauge_name("reward/exact match\n{x}") == "raylign_reward_exact_match_x_"
    tracker = open_tracker(TrackingConfig(), tmp_path, "prom", {})
    tracker.log(1, {"reward/mean": 0.25}, "grpo")
    tracker.log(2, {"reward/mean": 0.5, "workers/rollout": 3.0}, "grpo")
    node = ray.nodes()[0]
    url, deadline = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", time.monotonic() + 60
    while True:
        body = httpx.get(url, trust_env=False).text
        mine = [line for line in body.splitlines() if 'run="prom"' in line and "raylign_reward_mean{" in line]
        roles = [line for line in body.splitlines() if 'role="rollout"' in line and "raylign_workers{" in line]
        if mine and mine[0].endswith(" 0.5") and roles:
            break
        assert time.monotonic() < deadline, mine
        time.sleep(0.2)
    assert 'stage="grpo"' in mine[0]
    assert roles[0].endswith(" 3.0")


def test_what_every_role_has_is_one_gauge() -> None:
    assert series("tokens_per_second/rollout") == ("raylign_tokens_per_second", "rollout")
    assert series("tokens_per_second") == ("raylign_tokens_per_second", "")
    assert series("scoring/seconds/exact") == ("raylign_scoring_seconds_exact", "")
    assert series('reward/x"} evil{') == ("raylign_reward_x_evil_", "")
