"""The service against its own engine without HTTP: the same requests of the same closed-loop clients, streamed.

The engine has one core, the clients another. The sides share the engine, so each has prompts of its own, which
its cache does not know. EOS is on, as it always is for a service; of a random model it is rare.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arena import Arena
from .measured import Case, Contest, Measured
from .models import SHAPES, save_model
from .workloads import Workload

_CLIENTS = (1, 8, 64)
_SLOTS = 64
_PROMPT = 32
_LENGTH = 32


def cases() -> list[Case]:
    """Named like `25M-fp32-C8-vs-engine`."""
    return [_case("25M", count, 2 * count + 6) for count in _CLIENTS]


def quick_cases() -> list[Case]:
    """Two clients of the smallest model."""
    return [_case("1M", 2, 4)]


def save_words(folder: Path, count: int) -> None:
    """Write a tokenizer of `count` words of one to three letters, so that what a random model says is text."""
    from itertools import chain, product

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = chain(["<pad>", "<s>", "</s>"], letters, map("".join, product(letters[:64], repeat=3)))
    vocabulary = {word: i for i, word in zip(range(count), words, strict=False)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


class Server:
    """A replica's application in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url: str = self._read()["url"]

    def job(self, content: dict[str, Any]) -> dict[str, Any]:
        """Have it do a job without HTTP; an empty one gives the CPU seconds it has used."""
        print(json.dumps(content), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the service's process ended")
        return json.loads(line)


@contextmanager
def served(folder: Path, max_length: int) -> Iterator[Server]:
    """The service of a model, on the first core that there is."""
    root = Path(__file__).parents[1]
    module = [sys.executable, "-m", "benchmarks.service_server", str(folder), str(_SLOTS), str(max_length), "0"]
    process = subprocess.Popen(module, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


async def ask(session: Any, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """One streamed completion: seconds to its first token and to its end, and its tokens."""
    began, first, counts = time.perf_counter(), 0.0, {}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())
        async for line in answer.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                if b'"usage":{' in line:
                    counts = json.loads(line[6:])["usage"]
    return {"first": first, "last": time.perf_counter() - began, "tokens": counts["completion_tokens"]}


async def ask_all(url: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """All requests of a job, by so many clients at once."""
    import aiohttp

    numbers, done = iter(range(len(job["prompts"]))), [{} for _ in job["prompts"]]
    common = {"model": "base", "max_tokens": job["length"], "stream": True, "stream_options": {"include_usage": True}}

    async def client() -> None:
        for number in numbers:
            body = common | {"prompt": job["prompts"][number], "seed": number}
            done[number] = await ask(session, url, body)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client() for _ in range(job["clients"])))
    return done


def _case(size: str, clients: int, requests: int) -> Case:
    name = f"{size}-fp32-C{clients}-vs-engine"
    work = Workload(case=name, vocabulary=SHAPES[size].vocabulary, prompt=_PROMPT, lengths=(_LENGTH,) * requests)
    make = partial(_contest, size, work, clients)
    return Case(name=name, peer="engine", unit="completion tokens/s", group=f"{size}-fp32", make=make)


def _contest(size: str, work: Workload, clients: int, arena: Arena) -> Contest:
    server: Server = arena.entered(served, arena.get(_folder, arena.root, size), 2 * work.longest)
    seen: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    settings: dict[str, Any] = {**work.describe(), "clients": clients}

    def job(pair: int) -> dict[str, Any]:
        return {"prompts": work.prompts(pair), "length": work.lengths[0], "clients": clients}

    def note(side: str, done: list[dict[str, Any]], seconds: float, cpu: float) -> Measured:
        seen[side] += done
        settings["latency"] = {side: latencies(rows) for side, rows in seen.items() if rows}
        return Measured(amount=sum(row["tokens"] for row in done), seconds=seconds, cpu_seconds=cpu)

    def ours(pair: int) -> Measured:
        cpu, began = server.job({})["cpu"], time.perf_counter()
        done = asyncio.run(ask_all(server.url, job(pair)))
        seconds = time.perf_counter() - began
        return note("ours", done, seconds, server.job({})["cpu"] - cpu)

    def theirs(pair: int) -> Measured:
        began = time.perf_counter()
        answer = server.job(job(pair + 1_000_000))
        return note("theirs", answer["requests"], time.perf_counter() - began, answer["cpu_seconds"])

    def warm_up() -> None:
        for side in (ours, theirs):
            side(0)
        for rows in seen.values():
            rows.clear()

    return Contest(ours=ours, theirs=theirs, warm_up=warm_up, settings=settings)


def latencies(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds to the first token, for each further one, and of the whole: median and 99th percentile."""
    kinds = {
        "first_token": [row["first"] for row in rows],
        "per_token": [(row["last"] - row["first"]) / (row["tokens"] - 1) for row in rows if row["tokens"] > 1],
        "answer": [row["last"] for row in rows],
    }
    return {
        f"{kind}_{name}_ms": round(1000 * float(np.percentile(values, place)), 3)
        for kind, values in kinds.items()
        for name, place in (("p50", 50), ("p99", 99))
    }


def _folder(root: Path, size: str) -> Path:
    folder = save_model(size, "fp32", root / f"served-{size}")
    save_words(folder, SHAPES[size].vocabulary)
    return folder
