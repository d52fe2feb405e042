"""What the faults of the kill matrix do: to processes, to an actor's own code, to the disk."""

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_METHODS = {
    ("rollout", "generate"): ("_worker", "generate"),
    ("rollout", "publish"): ("_worker", "set_weights"),
    ("reward", "score"): ("", "_scored"),
    ("reference", "score"): ("_reference", "logprobs"),
    ("critic", "score"): ("_critic", "values"),
    ("critic", "update"): ("_critic", "update"),
    ("critic", "checkpoint"): ("_critic", "save"),
    ("policy", "update"): ("_policy", "update"),
    ("policy", "publish"): ("_policy", "export"),
    ("policy", "checkpoint"): ("_policy", "save"),
}
"""Where an actor's own code can be made to fail: the attribute that has it, and the method."""
_HEADROOM = 256 * 2**20


def signal_all(pids: Sequence[int], name: str) -> None:
    """Send a signal to processes; a raylet's workers may end with it before their turn comes."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[name])


def strike(fault: str, storage: Path) -> None:
    """Have the caller suffer what a signal does not do: raise, or find the disk full from now on."""
    if fault == "disk full":
        fill(storage)
    elif fault == "exception":
        raise RuntimeError("an exception that nobody foresaw")
    else:
        _run_out_of_memory()


def _run_out_of_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _HEADROOM, hard))
    try:
        bytearray(2 * _HEADROOM)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fill(storage: Path) -> None:
    """Leave no byte on a storage's file system."""
    with (storage / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


def spoil(actor: Any, role: str, phase: str, fault: str, storage: Path, note: Path, number: int) -> None:
    """In an actor: have what it does in a phase suffer a fault the next time, and note when that was."""
    owner, method = _METHODS[role, phase]
    target = getattr(actor, owner) if owner else actor
    whole = getattr(target, method)

    def once(*given: Any, **named: Any) -> Any:
        setattr(target, method, whole)
        jot(note, number=number, struck=time.time())
        strike(fault, storage)
        return whole(*given, **named)

    setattr(target, method, once)


def jot(file: Path, **facts: Any) -> None:
    """Add a line of JSON to a file, on the disk before anything else happens."""
    with file.open("a") as out:
        out.write(json.dumps(facts) + "\n")
        out.flush()
        os.fsync(out.fileno())


def living(prefix: str) -> list[dict[str, Any]]:
    """What Ray knows of the living actors whose names begin so, by name."""
    from ray._private.state import actors

    alive = actors(actor_state_name="ALIVE").values()
    return sorted((a for a in alive if a["Name"].startswith(prefix)), key=lambda a: a["Name"])


def victim(prefix: str, role: str) -> tuple[Any, list[int]]:
    """The last of a role's living actors, and its process; of a node, that of a rollout worker away from the head, its
    raylet with all that descends from it."""
    import ray

    if role == "node":
        head = ray.util.get_node_ip_address()
        away = [a["Address"]["IPAddress"] for a in living(f"{prefix}/rollout")]
        return None, processes_of_node(next(address for address in away if address != head))
    last = living(f"{prefix}/{role}")[-1]
    return ray.get_actor(last["Name"]), [last["Pid"]]


def suspended(pid: int) -> bool:
    """Whether a process was stopped by a signal and is there still."""
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def processes_of_node(address: str) -> list[int]:
    """The raylet of the node with that address on this machine, before all that descends from it."""
    import psutil

    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and f"--node_ip_address={address}" in (process.info["cmdline"] or ()):
            return [process.pid, *(child.pid for child in process.children(recursive=True))]
    raise RuntimeError(f"no raylet has the address {address}")
