"""What rewards cost: scored samples per second, against calling the function in the loop, as trainers without a reward
role do; and what is left of a generator's pace while a slow judge is waited for.

Groups go to a `Scorer` from as many threads as its actor would have. The judge is an HTTP server in a process of its
own that answers a second after it is asked, whoever asks. In the loop, code runs in a plain subprocess: without walls.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from .arena import Arena
from .measured import Case, Contest, Measured, measure

GROUP = 8
_CODE = "def twice(x):\n    return 2 * x\n"
_TESTS = "assert twice(2) == 4\nassert twice('a') == 'aa'\n"
_ROW = {"answer": "\\frac{1}{2}", "test": _TESTS, "prompt": "How much is 1/2?"}
_TEXTS = {"trivial": "0.5", "math": "So it is $\\boxed{0.5}$.", "code": _CODE, "judge": "Half."}
_FUNCTION = "def brevity(completion, row):\n    return 1 / (1 + len(completion))\n"
_SERVER = """
import asyncio, json
ANSWER = json.dumps({"score": 1, "choices": [{"message": {"content": "Score: 10"}}]}).encode()
async def serve(reader, writer):
    try:
        while head := await reader.readuntil(b"\\r\\n\\r\\n"):
            size = int(head.lower().split(b"content-length:")[1].split(b"\\r")[0])
            await reader.readexactly(size)
            await asyncio.sleep(1)
            writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(ANSWER) + ANSWER)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def cases() -> list[Case]:
    """Named like `judge-1s-64-at-once-vs-loop`."""
    return _cases({"trivial": 128, "math": 32, "code": 8, "judge": 32}, in_loop=4)


def quick_cases() -> list[Case]:
    """A few groups each."""
    return _cases({"trivial": 4, "math": 2, "code": 1, "judge": 4}, in_loop=1)


def _cases(groups: dict[str, int], in_loop: int) -> list[Case]:
    names = {"trivial": "function", "math": "math-verify", "code": "sandboxed-code", "judge": "judge-1s-64-at-once"}
    made = [
        _case(f"{names[kind]}-vs-loop", "the function in the loop", "samples per second", kind, count, in_loop)
        for kind, count in groups.items()
    ]
    beside = partial(_beside, groups["judge"])
    unit = "generated groups per second"
    return [*made, Case(name="judge-1s-beside-vs-alone", peer="no rewards", unit=unit, group="rewards", make=beside)]


def _case(name: str, peer: str, unit: str, kind: str, groups: int, in_loop: int) -> Case:
    return Case(name=name, peer=peer, unit=unit, group="rewards", make=partial(_against_loop, kind, groups, in_loop))


def _against_loop(kind: str, groups: int, in_loop: int, arena: Arena) -> Contest:
    scorer = arena.entered(_Scored, kind, arena.entered(_judge) if kind == "judge" else "", arena.root)
    once = partial(_in_loop(kind, scorer.url), _TEXTS[kind], _ROW)
    calls = in_loop if kind == "judge" else groups * GROUP
    return Contest(
        ours=lambda _: measure(groups * GROUP, lambda: scorer.score(groups)),
        theirs=lambda _: measure(calls, lambda: [once() for _ in range(calls)]),
        warm_up=lambda: (scorer.score(1), once()),
        settings={"groups": groups, "group_size": GROUP, "calls_in_the_loop": calls, "groups_at_once": scorer.at_once},
    )


def _beside(groups: int, arena: Arena) -> Contest:
    """The pace of a generator, which computes on this same core, while every group it made is with the judge."""
    scorer = arena.entered(_Scored, "judge", arena.entered(_judge), arena.root)
    tail: list[float] = []

    def ours(_: int) -> Measured:
        waits: list[Any] = []
        made = measure(groups, lambda: _generate(groups, lambda: waits.append(scorer.begin())))
        start = time.perf_counter()
        for wait in waits:
            wait.result()
        tail.append(time.perf_counter() - start)
        return made

    return Contest(
        ours=ours,
        theirs=lambda _: measure(groups, lambda: _generate(groups, lambda: None)),
        warm_up=lambda: (ours(0), _generate(1, lambda: None)),
        settings={"groups": groups, "group_size": GROUP, "seconds_after_generation": tail},
    )


def _generate(groups: int, done: Callable[[], None]) -> None:
    """Some work for each group, a tenth of a second or so."""
    matrix = np.ones((512, 512), np.float32)
    for _ in range(groups):
        for _ in range(20):
            matrix @ matrix
        done()


class _Scored:
    """A scorer of one reward, and the threads of its actor."""

    def __init__(self, kind: str, url: str, root: Any) -> None:
        from raylign.rollout.config import CodeReward, FunctionReward, JudgeReward, MathReward
        from raylign.rollout.rewards.scorer import Scorer, groups_at_once

        (root / "brevity.py").write_text(_FUNCTION)
        judge = {"url": url or "http://127.0.0.1", "model": "m", "principles": ["Be right."], "allow_private": True}
        rewards: dict[str, Any] = {
            "trivial": lambda: FunctionReward(path="brevity.py:brevity"),
            "math": MathReward,
            "code": CodeReward,
            "judge": lambda: JudgeReward.model_validate(judge),
        }
        config = rewards[kind]()
        self.url, self._text, self.at_once = url, _TEXTS[kind], groups_at_once([config], GROUP)
        self._scorer = Scorer([config], root)
        self._threads = ThreadPoolExecutor(self.at_once)

    def __enter__(self) -> "_Scored":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        self._scorer.close()

    def begin(self) -> Any:
        """Have one group scored; gives the wait for it."""
        from raylign.rollout.records import Group, Sample

        none = np.zeros(0, np.int32)
        sample = Sample(tokens=none, logprobs=none, finish_reason="stop", text=self._text)
        return self._threads.submit(
            self._scorer.score, Group(step=0, index=0, prompt=none, row=_ROW, samples=(sample,) * GROUP)
        )

    def score(self, groups: int) -> None:
        for wait in [self.begin() for _ in range(groups)]:
            if any(sample.reward is None or sample.reward <= 0 for sample in wait.result().samples):
                raise RuntimeError("a sample was not scored as it should be")


def _in_loop(kind: str, url: str) -> Callable[[str, dict[str, str]], Any]:
    if kind == "trivial":
        return lambda completion, row: 1 / (1 + len(completion))
    return {"math": _math, "code": _code, "judge": partial(_ask, url)}[kind]


def _math(completion: str, row: dict[str, str]) -> bool:
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{row['answer']}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None)  # pyright: ignore[reportArgumentType]


def _code(completion: str, row: dict[str, str]) -> bool:
    done = subprocess.run([sys.executable, "-I", "-c", completion + row["test"]], capture_output=True, timeout=10)
    return done.returncode == 0


def _ask(url: str, completion: str, row: dict[str, str]) -> Any:
    import httpx

    return httpx.post(url, content=json.dumps({"completion": completion, "row": row}), timeout=30).json()["score"]


@contextmanager
def _judge() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
