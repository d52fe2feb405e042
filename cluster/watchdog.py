"""Ends a local Ray whose driver was killed: `python -m raylign.cluster.watchdog MARK`.

Ray's own reaping misses its agents when the driver dies by SIGKILL. The driver holds the other end of this process's
standard input and writes the session folder to it; when it closes, for whatever reason, what is left is ended.
"""

import subprocess
import sys
from pathlib import Path

from .processes import end, members


def start(mark: str) -> subprocess.Popen[str]:
    """Start the watchdog of this process, in a session of its own so that Ctrl-C does not reach it."""
    command = [sys.executable, "-m", __spec__.name, mark]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def tell(watchdog: subprocess.Popen[str], folder: Path) -> None:
    """Say where the session's files are."""
    if watchdog.stdin:
        watchdog.stdin.write(f"{folder}\n")
        watchdog.stdin.flush()


def dismiss(watchdog: subprocess.Popen[str]) -> None:
    """Let it look once more and go."""
    if watchdog.stdin:
        watchdog.stdin.close()
    watchdog.wait(timeout=60)


def main(mark: str) -> None:
    """Wait for the driver's end, then end its Ray. The last line that came names the session folder."""
    lines = sys.stdin.read().splitlines()
    folder = Path(lines[-1] if lines else "/dev/null")
    end(lambda: members(mark, folder))


if __name__ == "__main__":
    main(sys.argv[1])
