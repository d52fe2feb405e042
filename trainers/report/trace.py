"""The lanes of a run as a Chrome trace, for Perfetto or chrome://tracing (the Trace Event Format's complete events)."""

from collections.abc import Iterable, Mapping
from typing import Any


def chrome_trace(run: str, spans: Iterable[Mapping[str, Any]], step: int | None = None) -> dict[str, Any]:
    """What each actor did and when, of one step or all: a thread a lane, microseconds from the first span on."""
    kept = [s for s in spans if step is None or s.get("step") == step]
    first = min((s["start"] for s in kept), default=0.0)
    lanes = {lane: number for number, lane in enumerate(sorted({s["lane"] for s in kept}), 1)}
    names = [_named("process_name", run)] + [_named("thread_name", lane, n) for lane, n in lanes.items()]
    events = [
        {
            "name": s["what"],
            "ph": "X",
            "ts": round((s["start"] - first) * 1e6),
            "dur": round((s["end"] - s["start"]) * 1e6),
            "pid": 1,
            "tid": lanes[s["lane"]],
            "args": {"step": s["step"]} if "step" in s else {},
        }
        for s in sorted(kept, key=lambda s: s["start"])
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def _named(kind: str, name: str, thread: int = 0) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
