"""What workers print, on whatever node, in this process's log: a line each, with who it is from."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("raylign.workers")

_RAYS_OWN = "ray_print_logs"


@contextmanager
def into_the_log() -> Iterator[None]:
    """Have what workers print logged instead of printed, after `ray.init(log_to_driver=True)`."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.remove_handler(_RAYS_OWN)
    dispatcher.add_handler(__name__, _log)
    try:
        yield
    finally:
        dispatcher.remove_handler(__name__)


def _log(printed: Mapping[str, Any]) -> None:
    if not str(printed.get("pid")).isdigit():
        return  # Ray's own, such as the autoscaler's, which come with every look at the cluster
    who = printed.get("actor_name") or printed.get("task_name") or "worker"
    level = logging.WARNING if printed.get("is_err") else logging.INFO
    for line in printed["lines"]:
        if line.strip():
            logger.log(level, "%s (pid %s on %s): %s", who, printed.get("pid"), printed.get("ip"), line)
