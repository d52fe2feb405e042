"""`raylign down`: end a cluster that `raylign up` started."""

from .output import answer, notes, print_json
from .run import JsonOption
from .up import NameOption


def down(name: NameOption = "local", json: JsonOption = False) -> None:
    """End every process of a cluster on this machine. Jobs that still run on it end at once: `raylign stop` them first.

    Example: raylign down
    """
    from ..cluster.local import down as end

    with notes.status("ending the cluster"):
        ended = end(name)
    if json:
        print_json({"name": name, "processes": ended})
    else:
        answer.print(f"{name} is down: {ended} processes ended", highlight=False)
