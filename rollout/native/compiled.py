"""How the engine's inner loops are compiled, and where the compiled code is kept.

numba recompiles a cached function when its own file changes, but not when one does whose functions were inlined into
it. Here the stamp is that of all files of this folder.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config
from numba.core.caching import InTreeCacheLocator, UserWideCacheLocator

FAST: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}}
"""For loops over one token's own numbers: reordered sums are what makes vectors; NaN and infinity keep their meaning,
since diverged weights must show."""


@cache
def _stamp() -> bytes:
    """A digest of the sources that compiled code may come from."""
    stamp = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        stamp.update(path.read_bytes())
    return stamp.digest()


class BesideSources(InTreeCacheLocator):
    """Keeps compiled code in this folder's `__pycache__`."""

    def get_source_stamp(self) -> bytes:
        """What compiled code must have been made from to be used."""
        return _stamp()


class OfUser(UserWideCacheLocator):
    """Keeps compiled code in the user's cache folder, where the sources' one cannot be written to."""

    def get_source_stamp(self) -> bytes:
        """What compiled code must have been made from to be used."""
        return _stamp()


_CONFIG: Any = config
_LOCATORS = f"{__name__}.{BesideSources.__name__}, {__name__}.{OfUser.__name__}"


def compiled(**options: Any) -> Callable[[Any], Any]:
    """A decorator: `numba.njit` without the GIL and without checks of bounds, with its code kept."""

    def compile_later(function: Any) -> Any:
        before, _CONFIG.CACHE_LOCATOR_CLASSES = _CONFIG.CACHE_LOCATOR_CLASSES, _LOCATORS
        try:
            return njit(nogil=True, boundscheck=False, error_model="numpy", cache=True, **options)(function)
        finally:
            _CONFIG.CACHE_LOCATOR_CLASSES = before

    return compile_later
