"""How much memory a run and everything below it takes, watched from a thread."""

import threading

import psutil

_EVERY_SECONDS = 2.0


class PeakMemory:
    """The most memory this process and its descendants (a local Ray and its workers) held at once.

    Proportional set size where the system tells it, so that shared pages count once; else resident size.
    """

    def __init__(self) -> None:
        self.gigabytes = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look a last time and end."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            total = sum(_held(p) for p in [process, *process.children(recursive=True)])
            self.gigabytes = max(self.gigabytes, round(total / 1e9, 3))
            if self._done.wait(_EVERY_SECONDS):
                return


def _held(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return getattr(info, "pss", info.rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
