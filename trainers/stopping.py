"""How a run is asked to end early: a flag in its directory, set by Ctrl-C, `raylign stop` or a job's SIGTERM."""

from ..cluster.rundir import RunDir


class StopRequested(Exception):
    """The run was asked to stop; work under way that is not checkpointed is made again, the same, on resume."""


def stop_if_asked(run: RunDir) -> None:
    """Raise `StopRequested` when the flag is set."""
    if run.desired().get("stop"):
        raise StopRequested
