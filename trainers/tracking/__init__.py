"""Where metrics go besides the run directory: Weights & Biases, trackio, Prometheus, or nowhere."""

from .open import open_tracker
from .tracker import Tracker

__all__ = ["Tracker", "open_tracker"]
