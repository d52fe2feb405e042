"""Prometheus: the last step's metrics as gauges of the Ray this process is connected to.

Ray's agent on each node answers scrapes; it names them `ray_raylign_reward_mean{run=…,stage=…}`.
"""

import re
from collections.abc import Mapping
from typing import Any


class PrometheusTracker:
    """Keeps a gauge a metric, with the run's and the stage's names as labels."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: Mapping[str, float], stage: str = "") -> None:
        """Set the gauges, and `raylign_step` to the step."""
        for name, value in {"step": step, **metrics}.items():
            self._gauge(gauge_name(name)).set(value, tags={"run": self._run, "stage": stage})

    def finish(self) -> None:
        """Nothing to do: Ray forgets the gauges of a process that ended."""

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description="of the last step", tag_keys=("run", "stage"))
        return self._gauges[name]


def gauge_name(metric: str) -> str:
    """A metric's name with what Prometheus takes: letters, digits and `_`."""
    return "raylign_" + re.sub(r"\W+", "_", metric, flags=re.ASCII)
