"""trackio: metrics in a database of the run's directory, for `trackio show`.

Nothing leaves this machine: no Space, no bucket, no dashboard is started. trackio itself survives what it cannot write.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ...cluster.errors import InputError


class TrackioTracker:
    """One trackio run; what it would print goes to stderr.

    trackio reads where it writes when it is imported: a process has one folder, that of its first run.
    """

    def __init__(self, project: str, folder: Path, name: str, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder))
        try:
            import trackio
        except ImportError:
            raise InputError("tracking.trackio: trackio is not installed: pip install 'raylign[trackio]'") from None
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project,
                name,
                config=dict(recipe),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, step: int, metrics: Mapping[str, float], stage: str = "") -> None:
        """Note a step's metrics."""
        prefix = f"{stage}/" if stage else ""
        self._run.log({f"{prefix}step": step, **{f"{prefix}{key}": value for key, value in metrics.items()}})

    def finish(self) -> None:
        """Write everything out."""
        from trackio import context_vars

        if self._run is context_vars.current_run.get():  # else trackio would finish it again as this process ends
            context_vars.current_run.set(None)
        with redirect_stdout(sys.stderr):
            self._run.finish()
