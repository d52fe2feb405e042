"""Start a run in this process: prove its inputs, connect to Ray, run the pipeline, end cleanly whatever happens.

The pipeline works in a thread of its own; the main thread takes signals. The first SIGINT or SIGTERM asks the run to
stop (checkpoint, drain, end); a second one ends it at once.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..cluster.errors import InputError, RaylignError, RunFailed
from ..cluster.placement import Offer, amount, offers
from ..cluster.rundir import RunDir, running_already, write_atomically
from ..cluster.session import connect, probe
from .changes import refuse_changes
from .config import RunConfig, stage_name
from .inputs import Inputs, read_inputs
from .pipeline import check_placement, conclude, demands, run_recipe
from .prepare import prepare
from .recipe import dump_recipe, load_recipe

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


def open_run(config: RunConfig, storage: Path, *, named: bool, resume: bool) -> RunDir:
    """The run's directory, with its recipe in it.

    A name that is taken is an `InputError`, unless it is only the recipe's own: then the run takes the next free one
    (`quickstart-2`), so that nothing is overwritten. With `resume` a run of that name goes on; a recipe that asks for
    another result than it began with is an `InputError`.
    """
    storage = storage.resolve()
    run = RunDir(storage / config.name)
    if resume and (run / "recipe.yaml").exists():
        _refuse_another(config, run)
    elif not _claim(run) and not resume:
        if named:
            status = run.status().get("status", "not begun")
            raise InputError(
                f"run {run.name!r} exists in {storage} ({status}): `raylign resume {run.name}` goes on with it, "
                "or take another --name"
            )
        run = next(r for n in range(2, 10_000) if _claim(r := RunDir(storage / f"{config.name}-{n}")))
    write_atomically(run / "recipe.yaml", dump_recipe(config.model_copy(update={"name": run.name})))
    return run


def _claim(run: RunDir) -> bool:
    """Make the directory of a run; false where it is there already, so that two commands never get the same."""
    try:
        run.path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(f"cannot write runs to {run.path.parent}: {error.strerror}: give another --storage") from None
    return True


def _refuse_another(config: RunConfig, run: RunDir) -> None:
    """Raise `InputError` where a run is at work now, or began with a recipe that gives another result."""
    if run.held():
        raise running_already(run.name)
    if run.status():
        refuse_changes(load_recipe(run / "recipe.yaml"), config)


def launch(config: RunConfig, run: RunDir, say: Say) -> dict[str, Any]:
    """Do what is left of a run and return its summary. Raises `RaylignError`; the summary then says `failed`.

    A run that cannot begin (its inputs are wrong, it does not fit, no cluster answers) leaves no directory behind, and
    one that cannot go on keeps the status it had.
    """
    config = config.model_copy(update={"name": run.name})
    with run.hold(), _stop_on_signals(run, say), _log_to(run):
        before = run.status()
        run.desire(stop=False, rollout=None)
        try:
            inputs = _prove(config, run, say)
        except BaseException:
            _withdraw(run, before)
            raise
        run.event("run_began", resumed=bool(before), seed=config.seed)
        run.update_status(run=run.name, status="starting", reason="", pid=os.getpid(), host=socket.gethostname())
        return _conclude_failures(config, run, before, lambda: _run_on_ray(config, run, inputs, say))


def _prove(config: RunConfig, run: RunDir, say: Say) -> Inputs:
    """Everything that can be known before Ray is there, the quickest first."""
    if config.cluster.address:
        probe(config.cluster.address)
    elif not os.environ.get("RAY_ADDRESS"):
        check_placement(config, [this_machine(config)])
    if config.prepare:
        say("preparing data")
    prepare(config, run.path)
    say("proving data")
    inputs = read_inputs(config, run.path)
    for given in inputs.stages:
        given.proof.require()
    return inputs


def _withdraw(run: RunDir, before: dict[str, Any]) -> None:
    """Leave things as they were before a run that was refused."""
    if before:
        run.update_status(**before)
    else:
        shutil.rmtree(run.path, ignore_errors=True)


def _run_on_ray(config: RunConfig, run: RunDir, inputs: Inputs, say: Say) -> dict[str, Any]:
    say("connecting to Ray")
    with connect(config.cluster) as session:
        check_placement(config, offers())
        run.update_status(status="running", address=session.address, dashboard=session.dashboard_url)
        return _in_thread(lambda: run_recipe(config, run, inputs, say))


def _in_thread(work: Callable[[], Any]) -> Any:
    """Run off the main thread, which stays free to take signals; raises what `work` raises."""
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["result"] = work()
        except BaseException as error:  # noqa: BLE001  raised again below
            box["error"] = error

    thread = threading.Thread(target=run, name="pipeline", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if "error" in box:
        raise box["error"]
    return box["result"]


def _conclude_failures(
    config: RunConfig, run: RunDir, before: dict[str, Any], work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Write down why a run failed before the error goes on to the user; `before` is its status ahead of this start."""
    try:
        return work()
    except RaylignError as error:
        if run.status().get("status") == "starting":
            _withdraw(run, before)
        else:
            logger.exception("the run failed")
            conclude(config, run, "failed", f"{type(error).__name__}: {error}")
        raise
    except KeyboardInterrupt:
        conclude(config, run, "stopped", "ended at once by a second interrupt; the last checkpoint holds")
        raise
    except Exception as error:
        logger.exception("the run failed")
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        conclude(config, run, "failed", reason)
        raise RunFailed(f"{reason} (the traceback is in {run / 'run.log'})") from error


def placement(config: RunConfig) -> dict[str, Any]:
    """Whether every stage fits, on the recipe's cluster or else on this machine; what was asked and what there is.

    Raises `DoesNotFit`, and `ClusterUnreachable` where the recipe names a cluster that does not answer.
    """
    nodes = [this_machine(config)]
    if config.cluster.address:
        with connect(config.cluster):
            nodes = offers()
    check_placement(config, nodes)
    asked = [
        {"stage": stage_name(stage), "role": d.role, "count": d.count, "each": amount(d.cpus, d.gpus)}
        for stage in config.stages
        for d in demands(stage)
    ]
    return {"nodes": "; ".join(f"{n.node} ({amount(n.cpus, n.gpus)})" for n in nodes), "asked": asked}


def this_machine(config: RunConfig) -> Offer:
    """What a local Ray of this recipe offers."""
    import torch

    return Offer("this machine", config.cluster.cpus or os.cpu_count() or 1, torch.cuda.device_count())


@contextlib.contextmanager
def _stop_on_signals(run: RunDir, say: Say) -> Iterator[None]:
    seen: list[int] = []

    def handle(number: int, _: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        say("stopping: checkpoint, drain, end (again to end at once)")
        run.desire(stop=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _log_to(run: RunDir) -> Iterator[None]:
    """Python's logging of this process, into `run.log` instead of the terminal."""
    handler = logging.FileHandler(run / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
