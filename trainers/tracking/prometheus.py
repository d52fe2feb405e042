"""Prometheus: the last step's metrics as gauges of the Ray this process is connected to.

Ray's agent on each node answers scrapes; it names them `ray_raylign_reward_mean{run=…,stage=…,role=…}`. What every role
has is one gauge with a series a role: `ray_raylign_tokens_per_second{role="rollout"}`. `docs/grafana.json` draws them.
"""

import re
from collections.abc import Mapping
from typing import Any

_BY_ROLE = ("tokens_per_second", "workers", "restarts")
"""Metrics whose last part is a role; without one, `tokens_per_second` is the run's."""


class PrometheusTracker:
    """Keeps a gauge a metric, with the names of run, stage and role as labels."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: Mapping[str, float], stage: str = "") -> None:
        """Set the gauges, and `raylign_step` to the step."""
        for name, value in {"step": step, **metrics}.items():
            gauge, role = series(name)
            self._gauge(gauge).set(value, tags={"run": self._run, "stage": stage, "role": role})

    def finish(self) -> None:
        """Nothing to do: Ray forgets the gauges of a process that ended."""

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description="of the last step", tag_keys=("run", "stage", "role"))
        return self._gauges[name]


def series(metric: str) -> tuple[str, str]:
    """The gauge and the role of a metric; most have no role."""
    name, _, role = metric.partition("/")
    return (gauge_name(name), role) if name in _BY_ROLE else (gauge_name(metric), "")


def gauge_name(metric: str) -> str:
    """A metric's name with what Prometheus takes: letters, digits and `_`."""
    return "raylign_" + re.sub(r"\W+", "_", metric, flags=re.ASCII)
