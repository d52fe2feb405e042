"""The benchmarks are no part of the wheel: tests find them at the top of the repository, behind what is installed."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)
