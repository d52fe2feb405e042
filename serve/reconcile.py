"""A replica follows the registry: it proves what is new, drops what is retired, and rolls back what fails."""

import asyncio
import logging
import time

from ..cluster.errors import InputError, NotFound
from .adapter_cache import AdapterCache
from .config import Guard
from .outcomes import Outcomes
from .registry import Entry, Registry
from .reports import Report, remove_report, write_report

logger = logging.getLogger(__name__)

_ROUND_SECONDS = 2.0
_LOAD_SECONDS = 5.0
"""How long a round waits for a place for one adapter; all may be in use."""


class Reconciler:
    """One replica's; all methods on the event loop of its cache."""

    def __init__(
        self, *, registry: Registry, base: Entry, adapters: AdapterCache, outcomes: Outcomes, guard: Guard, replica: str
    ) -> None:
        self._registry, self._base, self._adapters = registry, base, adapters
        self._outcomes, self._guard, self._replica = outcomes, guard, replica
        self._ready = {base.digest}
        self._refused: dict[str, str] = {}

    async def run(self) -> None:
        """Go on until cancelled; a round that fails is logged, and the next one tries again."""
        try:
            while True:
                try:
                    await self.round()
                except Exception:
                    logger.exception("replica %s could not follow the registry", self._replica)
                await asyncio.sleep(_ROUND_SECONDS)
        finally:
            remove_report(self._registry.root, self._replica)

    async def round(self) -> Report:
        """Follow the registry once, and say what came of it. What a name points at is loaded last, so it stays."""
        pointed = await asyncio.to_thread(self._roll_back_and_list)
        entries, retired = await asyncio.to_thread(self._wanted)
        for digest in retired:
            self._adapters.discard(digest)
            self._ready.discard(digest)
        for entry in sorted(entries, key=lambda entry: entry.digest in pointed):
            if entry.digest not in self._ready and entry.digest not in self._refused:
                await self._prove(entry)
        report = Report(
            replica=self._replica, base=self._base.digest, ready=tuple(sorted(self._ready)), refused=dict(self._refused)
        )
        await asyncio.to_thread(write_report, self._registry.root, report)
        return report

    async def _prove(self, entry: Entry) -> None:
        """Have the adapter in the engine once: nothing less shows that this replica can serve it."""
        try:
            async with asyncio.timeout(_LOAD_SECONDS):
                async with self._adapters.use(entry.digest, lambda: self._registry.read_adapter(entry)):
                    self._ready.add(entry.digest)
        except InputError as error:
            self._refused[entry.digest] = str(error)
            logger.error("adapter %s cannot be served: %s", entry.digest, error)
        except (TimeoutError, OSError) as error:
            logger.warning("adapter %s is not loaded yet: %s", entry.digest, error or type(error).__name__)

    def _wanted(self) -> tuple[list[Entry], list[str]]:
        entries = [e for e in self._registry.entries() if e.base == self._base.digest and e.kind == "adapter"]
        retired = [entry.digest for entry in entries if self._registry.is_retired(entry.digest)]
        return [entry for entry in entries if entry.digest not in retired], retired

    def _roll_back_and_list(self) -> set[str]:
        """Point names back from models that fail; gives what names point at then."""
        pointed: set[str] = set()
        for name in self._registry.aliases():
            now = self._registry.alias(name).now
            for digest in now.weights if now.restores is None and self._is_new(now.since) else ():
                if why := self._outcomes.objection(digest, now.since, self._guard):
                    self._roll_back(name, digest, why)
            pointed |= set(self._registry.alias(name).now.weights)
        return pointed

    def _roll_back(self, name: str, digest: str, why: str) -> None:
        try:
            self._registry.rollback(name, why=why, only_from=digest)
        except (InputError, NotFound) as error:
            logger.warning("%s stays at %s although %s: %s", name, digest[:12], why, error)
        else:
            logger.warning("%s is rolled back from %s: %s", name, digest[:12], why)

    def _is_new(self, since: float) -> bool:
        return time.time() - since < self._guard.seconds
