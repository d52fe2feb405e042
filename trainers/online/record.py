"""What a stage has measured so far: written down as it comes, and read for alarms and an early end."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ...cluster.errors import RunFailed
from ...cluster.rundir import RunDir
from ..stages import OnlineStage
from .alarms import Alarm, alarms
from .early_stop import is_over

_HEADLINES = ("reward/mean", "held_out/reward", "kl", "entropy", "loss")
"""The metrics that `raylign status` shows."""


class Record:
    """The metrics of a stage's steps and of its held-out prompts, up to the step that the policy holds.

    `on_metrics` is told of each step. What is read for alarms and an early end are the finished steps alone, so both
    come at the same step however often the run was resumed.
    """

    def __init__(
        self, run: RunDir, name: str, stage: OnlineStage, on_metrics: Callable[[int, dict[str, float]], None]
    ) -> None:
        self._run, self._name, self._stage, self._on_metrics = run, name, stage, on_metrics
        self._history: list[dict[str, float]] = []
        self._held_out: dict[int, Mapping[str, float]] = {}
        """By the number of steps before it, what was measured on held-out prompts."""
        self._alarms: dict[str, Alarm] = {}
        self.last: dict[str, float] = {}
        """The metrics of the last step, with the last measurement on held-out prompts."""

    def begin_at(self, step: int) -> None:
        """Go on after so many steps: what was written of later ones will be written again."""
        mine = [m for m in self._run.all_metrics() if m["stage"] == self._name and m["step"] < step]
        self._history = sorted(mine, key=lambda m: m["step"])
        asked = [e for e in self._run.events("held_out") if e["stage"] == self._name and e["step"] <= step]
        self._held_out = {e["step"]: e["metrics"] for e in asked}
        self._alarms = {}

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Note a finished step. Raises `RunFailed` for an alarm that the recipe has end the run."""
        self._history.append(metrics)
        self.last = {k: v for k, v in self.last.items() if k.startswith("held_out/")} | metrics
        self._run.metrics(self._name, step, metrics)
        self._on_metrics(step, metrics)
        self._sound(step)

    def held_out(self, step: int, metrics: dict[str, float]) -> None:
        """Note what was measured on held-out prompts after so many steps; the last of them has it among its metrics."""
        self._held_out[step] = metrics
        self._run.event("held_out", stage=self._name, step=step, metrics=metrics)
        if not self._history:
            return
        self.last = self._history[-1] = self._history[-1] | metrics
        self._run.metrics(self._name, step - 1, self.last)
        self._on_metrics(step - 1, metrics)
        self._sound(step - 1)

    def measured(self, step: int) -> bool:
        """Whether the held-out prompts were answered after so many steps."""
        return step in self._held_out

    def is_over(self) -> bool:
        """Whether the stage is to end before its last step. Raises `RunFailed` for a metric that is not measured."""
        rule = self._stage.held_out.early_stop if self._stage.held_out else None
        if rule is None or not self._held_out:
            return False
        missing = [m for m in self._held_out.values() if rule.metric not in m]
        if missing:
            known = ", ".join(sorted(missing[0]))
            raise RunFailed(f"held_out.early_stop.metric {rule.metric!r} is not measured: there are {known}")
        return is_over([self._held_out[step][rule.metric] for step in sorted(self._held_out)], rule)

    def told(self) -> dict[str, Any]:
        """What the run's status says of it."""
        return {
            "metrics": {k: v for k, v in self.last.items() if k in _HEADLINES},
            "alarms": [asdict(alarm) for alarm in self._alarms.values()],
        }

    def _sound(self, step: int) -> None:
        """Say which alarms began and which ended."""
        now = {alarm.name: alarm for alarm in alarms(self._history, self._stage.alarms)}
        for name in now.keys() - self._alarms.keys():
            self._run.event("alarm", stage=self._name, step=step, **_words(now[name]))
        for name in self._alarms.keys() - now.keys():
            self._run.event("alarm_over", stage=self._name, step=step, alarm=name)
        self._alarms = now
        if ends := [now[name] for name in self._stage.alarms.stop if name in now]:
            raise RunFailed(f"alarm {ends[0].name} at step {step}: {ends[0].saw}. Try: {ends[0].attempt}")


def _words(alarm: Alarm) -> dict[str, str]:
    return {"alarm": alarm.name, "saw": alarm.saw, "try": alarm.attempt}
