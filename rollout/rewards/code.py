"""Code that passes its tests as a reward: each completion in a sandbox of its own, some at once."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ..config import CodeReward
from ..records import Group
from ..sandbox.run import BrokenTests, Limits, Program, require, run
from .functions import RewardError, Row
from .remote import pause

_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)


class SandboxedCode:
    """Runs completions against their row's tests, `concurrency` at a time. Thread-safe."""

    def __init__(self, config: CodeReward) -> None:
        self._config, self._counts = config, Counter[str]()
        self._threads = ThreadPoolExecutor(config.concurrency)

    @property
    def overruns(self) -> int:
        """Completions that were out of time."""
        return self._counts["late"]

    def wait_ready(self) -> None:
        """Prove that the sandbox works here. Raises `InputError` with what the kernel lacks."""
        require()

    def outcomes(self, group: Group) -> Iterator[float | RewardError]:
        """1.0 or 0.0 for each sample, or what was wrong with its row."""
        asked = [self._threads.submit(self._outcome, sample.text, group.row) for sample in group.samples]
        return (future.result() for future in asked)

    def counters(self) -> dict[str, float]:
        """How many failed, printed too much, and were tried again since the machine had no process."""
        return {name: float(count) for name, count in sorted(self._counts.items()) if name not in ("late", "passed")}

    def close(self) -> None:
        """Start no more; what runs ends within its time."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _outcome(self, completion: str, row: Row) -> float | RewardError:
        config = self._config
        limits = Limits(seconds=config.timeout_seconds, memory=config.memory_mb << 20, output=config.output_kb << 10)
        try:
            program = program_of(config, completion, row)
            for number in range(config.retries + 1):
                try:
                    verdict = run(program, limits)
                    break
                except OSError as error:
                    if number == config.retries:
                        return RewardError(f"had no process: {error}")
                    self._counts["retries"] += 1
                    time.sleep(pause(number, None))
        except BrokenTests as error:
            return RewardError(f"found tests that do not compile: {error}")
        except RewardError as error:
            return error
        self._counts[verdict.outcome] += 1
        return 1.0 if verdict.outcome == "passed" else 0.0


def program_of(config: CodeReward, completion: str, row: Row) -> Program:
    """The completion's code and the row's tests. Raises `RewardError` for a row that lacks a column."""
    columns = [name for name in (config.tests, config.entry_point, config.prefix) if name is not None]
    if missing := [name for name in columns if name not in row]:
        raise RewardError(f"found no column {missing[0]!r} in the row, which has {', '.join(row) or 'none'}")
    tests, prefix = row[config.tests], str(row[config.prefix]) if config.prefix else ""
    return Program(
        code=prefix + ("\n" if prefix and _FENCED.search(completion) else "") + code_in(completion),
        tests=tests if isinstance(tests, str) else "\n".join(map(str, tests)),
        context=prefix,
        entry_point=str(row[config.entry_point]) if config.entry_point else "",
    )


def code_in(completion: str) -> str:
    """The last fenced block of a completion, else all of it."""
    blocks = _FENCED.findall(completion)
    return blocks[-1] if blocks else completion
