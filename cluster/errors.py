"""Every error a user can meet, and the exit code it ends a command with.

    RaylignError
    ├── RunFailed            1   the run stopped; the reason and the last checkpoint are named
    │   ├── WorkerLost       1   an actor or its node died, or did not answer in time
    │   └── WorkerFailed     1   an actor raised what it should not
    ├── InputError           2   a recipe, flag or file is wrong
    ├── DoesNotFit           3   more resources than the cluster has
    ├── NotFound             4   no run, model or alias of that name
    └── ClusterUnreachable   5   no Ray cluster answers at that address

Each is also the standard type it resembles, and pickles, since it may be raised in an actor.
A message says what is wrong, with its value and place, and what to do next.
"""


class RaylignError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line exits with."""

    exit_code = 1


class RunFailed(RaylignError, RuntimeError):
    """The run cannot go on."""


class WorkerLost(RunFailed):
    """An actor died or did not answer in time: infrastructure, so the work can be done again elsewhere."""


class WorkerFailed(RunFailed):
    """An actor raised what is no error of this package: what it did may work the next time, and its state may not."""


class InputError(RaylignError, ValueError):
    """What the user gave is wrong: the message names the place, the value and the mend."""

    exit_code = 2


class DoesNotFit(RaylignError, RuntimeError):
    """The cluster has less than the recipe asks for."""

    exit_code = 3


class NotFound(RaylignError, LookupError):
    """No run, model or alias has that name."""

    exit_code = 4


class ClusterUnreachable(RaylignError, ConnectionError):
    """No cluster answers at the address, or it refuses the token."""

    exit_code = 5
