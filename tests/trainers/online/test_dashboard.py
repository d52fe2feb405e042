"""The Grafana dashboard against the metrics of a run."""

import json
import re
from pathlib import Path

from raylign.trainers.tracking.prometheus import series

from .conftest import Train


def test_the_dashboard_draws_gauges_that_a_run_has(train_here: Train) -> None:
    """Every `ray_raylign_…` of the file is a metric of a step, and every kind that operators watch is drawn."""
    dashboard = json.loads((Path(__file__).parents[3] / "docs" / "grafana.json").read_text())
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    run = train_here("drawn", "grpo", steps=2, kl="{coefficient: 0.01}", held_out="{path: held_out.jsonl, every: 1}")
    metrics = {key for line in run.all_metrics() for key in line if key not in ("time", "stage")}
    there = {f"ray_{series(metric)[0]}" for metric in metrics}
    asked = {name for expr in drawn for name in re.findall(r"ray_raylign_\w+", expr)}
    patterns = {name for name in asked if f"{name}.*" in "".join(drawn)}
    assert asked - patterns <= there
    assert all(any(t.startswith(p) for t in there) for p in patterns)
    for kind in ("tokens_per_second", "queue", "staleness", "scoring_seconds", "restarts", "weights_bytes", "memory"):
        assert any(kind in expr for expr in drawn), kind
    assert {"ray_node_mem_used", "ray_node_gpus_utilization", "ray_node_gram_used"} <= set(drawn)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
