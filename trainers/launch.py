"""Start a run in this process: prove its inputs, connect to Ray, run the pipeline, end cleanly whatever happens.

The pipeline works in a thread of its own; the main thread takes signals. The first SIGINT or SIGTERM asks the run to
stop (checkpoint, drain, end); a second one ends it at once.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..cluster.auth import ask_for_token
from ..cluster.errors import InputError, RaylignError, RunFailed
from ..cluster.placement import free_offers, offers
from ..cluster.planning import Offer, amount
from ..cluster.rundir import RunDir
from ..cluster.session import connect, probe
from ..cluster.supervisor import Attempt
from ..cluster.versions import require_equal
from ..serve.registry import Registry
from .config import RunConfig, stage_name
from .data.inputs import Inputs, read_inputs
from .data.prepare import prepare
from .interrupt import StopRequested, StopSignals, asked, stop_if_asked
from .notices import Notices, deadline_of
from .pipeline import check_placement, conclude, demands, run_recipe
from .plan import room
from .plan.refusal import require_memory
from .plan.room import Room
from .publish import registry_root
from .queue import wait_for_runs, wait_for_turn

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

_ALONE = Attempt()


def launch(config: RunConfig, run: RunDir, say: Say, *, attempt: Attempt = _ALONE) -> dict[str, Any]:
    """Do what is left of a run and return its summary. Raises `RaylignError`; the summary then says `failed`.

    What users ask of the run (stop, workers) is forgotten first, unless its controller died and this is another
    `attempt`.

    A run that cannot begin (its inputs are wrong, it does not fit, no cluster answers) leaves no directory behind that
    was not there, and one that cannot go on keeps the status it had. One that is stopped before it is on Ray ends like
    any that is stopped.
    """
    config = config.model_copy(update={"name": run.name})
    before = run.status()
    notices = Notices()
    with run.hold(), StopSignals(run, say, notices).taken() as signals, _log_to(run):
        try:
            if not attempt.again:
                ask_for_token(make=not cluster_address(config))  # a local Ray will: what is asked before it counts too
                run.listen()
            here = {"pid": os.getpid(), "host": socket.gethostname()}
            run.update_status(run=run.name, status="preparing", reason="", **here)
            inputs = _prove(config, run, signals, say)
        except StopRequested:
            return conclude(config, run, "stopped", asked(run))
        except BaseException:
            _withdraw(run, before)
            raise
        run.event("run_began", resumed=bool(before), seed=config.seed, again=attempt.again)
        run.update_status(status="starting", workers={}, waiting=[])

        def work() -> dict[str, Any]:
            try:
                return _work(config, run, inputs, signals, notices, say, again=attempt.again)
            except StopRequested:
                return conclude(config, run, "stopped", asked(run))

        return _conclude_failures(config, run, attempt, before, work)


def _prove(config: RunConfig, run: RunDir, signals: StopSignals, say: Say) -> Inputs:
    """Everything that can be known before Ray is there, the quickest first. Raises `StopRequested` between steps."""

    def step(text: str) -> None:
        signals.check()
        say(text)

    if address := cluster_address(config):
        probe(address)
    else:
        check_placement(config, [this_machine(config)])
    if config.serve:
        Registry(registry_root(run)).check_name(config.serve.alias)
    if config.prepare:
        step("preparing data")
    prepare(config, run.path, signals.check)
    step("proving data")
    # In a thread, since fetching a model from the hub takes long; between its own steps it looks at the flag too.
    inputs = _in_thread(lambda: read_inputs(config, run.path, lambda _: stop_if_asked(run)), signals.check)
    for given in inputs.stages:
        given.proof.require()
    if not address:
        require_memory(config, inputs, [room.this_machine()])
    return inputs


def cluster_address(config: RunConfig) -> str | None:
    """The cluster that a run will join: the recipe's, or the environment's; none where it starts a Ray of its own.

    Raises `InputError` for a jobs URL in `RAY_ADDRESS`, which Ray's own commands take and a run cannot join.
    """
    here = os.environ.get("RAY_ADDRESS")
    if not config.cluster.address and here and here.startswith(("http://", "https://")):
        raise InputError(
            f"the environment has RAY_ADDRESS={here}, which is a jobs URL: unset RAY_ADDRESS, or use "
            f"`raylign submit --address {here}`"
        )
    return config.cluster.address or here


def _withdraw(run: RunDir, before: dict[str, Any]) -> None:
    """After a refusal: put back the status a run had, or remove the directory that this process made for it."""
    if before or not run.discard():
        run.restore_status(before)


def _work(
    config: RunConfig, run: RunDir, inputs: Inputs, signals: StopSignals, notices: Notices, say: Say, *, again: bool
) -> dict[str, Any]:
    """Wait for the run's turn, connect, and do what is left of it. Raises `StopRequested` while it waits."""
    wait_for_runs(run, config.cluster.after, signals.check)
    say("connecting to Ray")
    with connect(config.cluster) as session:
        if not session.local:
            for said in require_equal():
                say(said)
        if not config.cluster.autoscaler:
            check_placement(config, offers())
        require_memory(config, inputs, room.rooms_of_cluster())
        if config.cluster.priority is not None:
            _queue(config, run, session.address, signals)
        notices.deadline = deadline_of(run, config.controller.max_hours, again=again)
        run.update_status(status="running", address=session.address, dashboard=session.dashboard_url)
        return _in_thread(lambda: run_recipe(config, run, inputs, say), signals.follow)


def _queue(config: RunConfig, run: RunDir, cluster: str, signals: StopSignals) -> None:
    """Wait until the run's turn has come and what it asks for is free, or may come."""

    def fits() -> None:
        if not config.cluster.autoscaler:
            check_placement(config, free_offers())

    priority, seconds = config.cluster.priority or 0, config.cluster.wait_seconds
    wait_for_turn(run, cluster, priority, seconds, fits, signals.check)


def _in_thread(work: Callable[[], Any], tick: Callable[[], None]) -> Any:
    """Run off the main thread, which stays free to take signals and calls `tick`; raises what either raises.

    Where `tick` raises, the work is left alone after a moment in which it may end by itself.
    """
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["result"] = work()
        except BaseException as error:  # noqa: BLE001  raised again below
            box["error"] = error

    thread = threading.Thread(target=run, name="pipeline", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(timeout=0.2)
            tick()
    except StopRequested:
        thread.join(timeout=5.0)
        raise
    if "error" in box:
        raise box["error"]
    return box["result"]


def _conclude_failures(
    config: RunConfig, run: RunDir, attempt: Attempt, before: dict[str, Any], work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Write down why a run failed before the error goes on to the user; `before` is its status ahead of this start.

    An exception that nobody foresaw is not the run's end where its supervisor begins it again. What the machine refuses
    (a full disk) would be refused again.
    """
    try:
        return work()
    except RaylignError as error:
        if run.status().get("status") == "starting":
            _withdraw(run, before)
        else:
            logger.exception("the run failed")
            _conclude_quietly(config, run, attempt, "failed", f"{type(error).__name__}: {error}")
        raise
    except KeyboardInterrupt:
        _conclude_quietly(
            config, run, attempt, "stopped", "ended at once by a second interrupt; the last checkpoint holds"
        )
        raise
    except Exception as error:
        logger.exception("the run failed")
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}; {_way_on(run)}"
        if isinstance(error, OSError) or not attempt.may_die():
            _conclude_quietly(config, run, attempt, "failed", reason)
        raise RunFailed(f"{reason} (the traceback is in {run / 'run.log'})") from error


def _conclude_quietly(config: RunConfig, run: RunDir, attempt: Attempt, status: str, reason: str) -> None:
    """Write down how a run ended, if the disk still lets us: what ended it is what the user must see."""
    try:
        conclude(config, run, status, reason)
    except (OSError, RaylignError):
        attempt.end()
        logger.exception("the end of the run could not be written down")


def _way_on(run: RunDir) -> str:
    """Where a resumed run would go on from."""
    kept = sorted((run / "checkpoints").glob("*/step-*"), key=lambda path: path.stat().st_mtime)
    if not kept:
        return f"no checkpoint had been written: `raylign resume {run.argument}` begins again"
    return f"the last checkpoint is {kept[-1].relative_to(run.path)}: `raylign resume {run.argument}` goes on from it"


def placement(config: RunConfig, nodes: Sequence[Offer] = ()) -> dict[str, Any]:
    """Whether every stage fits, on these nodes, or the cluster that a run would join, or else this machine; what was
    asked and is.

    Raises `DoesNotFit`, and `ClusterUnreachable` where that cluster does not answer.
    """
    given, nodes = bool(nodes), nodes or [this_machine(config)]
    if not given and cluster_address(config):
        with connect(config.cluster):
            nodes = offers()
    check_placement(config, nodes)
    asked = [
        {"stage": stage_name(stage), "role": d.role, "count": d.count, "each": d.each}
        for stage in config.stages
        for d in demands(stage)
    ]
    return {"nodes": "; ".join(f"{n.node} ({amount(n.cpus, n.gpus)})" for n in nodes), "asked": asked}


def rooms(config: RunConfig) -> list[Room]:
    """The memory of the nodes that a run would join, or else of this machine."""
    if not cluster_address(config):
        return [room.this_machine()]
    with connect(config.cluster):
        return room.rooms_of_cluster()


def this_machine(config: RunConfig) -> Offer:
    """What a local Ray of this recipe offers."""
    import torch

    return Offer("this machine", config.cluster.cpus or os.cpu_count() or 1, torch.cuda.device_count())


class _QuietFile(logging.FileHandler):
    """A full disk must not print the logging module's own traceback for every line that finds no room."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the record."""

    def close(self) -> None:
        """Drop what is not written yet, too, where it cannot be: a full disk is not to hide why the run ended."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _log_to(run: RunDir) -> Iterator[None]:
    """Python's logging of this process, into `run.log` instead of the terminal."""
    handler = _QuietFile(run / "run.log")
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
