"""A replica's application and engine in a process of their own, which also does the same work without HTTP.

Reads a job a line from stdin, answers a line a job. Started by `serve.py`.
"""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np


class Bare:
    """Closed-loop clients of an engine's thread: each asks its next request when its last one has ended."""

    def __init__(self, thread: Any, stop_tokens: tuple[int, ...]) -> None:
        self._thread = thread
        self._stop_tokens = stop_tokens

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job's requests; gives seconds of each to its first and last token, and its tokens."""
        self._job, self._next, self._lock = job, iter(range(len(job["prompts"]))), threading.Lock()
        self._done: list[dict[str, Any]] = [{} for _ in job["prompts"]]
        self._left = threading.Semaphore(0)
        for _ in range(job["clients"]):
            self._ask()
        for _ in job["prompts"]:
            self._left.acquire()
        return {"requests": self._done}

    def _ask(self) -> None:
        from raylign.rollout.records import GenerationRequest, Sampling, SeedKey  # pyright: ignore[reportMissingImports]

        with self._lock:
            number = next(self._next, None)
        if number is None:
            return
        job, tokens, began = self._job, [], time.perf_counter()
        first = 0.0

        def listen(event: Any) -> None:
            nonlocal first
            if isinstance(event, Exception):
                raise event
            first = first or time.perf_counter() - began
            tokens.append(event.token)
            if event.finish_reason:
                last = time.perf_counter() - began
                self._done[number] = {"first": first, "last": last, "tokens": len(tokens)}
                self._left.release()
                self._ask()

        request = GenerationRequest(
            request_id=str(number),
            prompt=np.array(job["prompts"][number], np.int32),
            sampling=Sampling(max_tokens=job["length"], stop_token_ids=self._stop_tokens),
            seed=SeedKey(number, 0, 0),
        )
        self._thread.submit(request, listen)


def main() -> None:
    """`service_server.py FOLDER SLOTS MAX_LENGTH CORE`: the first answer has the service's URL."""
    import uvicorn
    from raylign.rollout.engine_thread import EngineThread  # pyright: ignore[reportMissingImports]
    from raylign.rollout.engines import build_native  # pyright: ignore[reportMissingImports]
    from raylign.serve.app import build_app  # pyright: ignore[reportMissingImports]
    from raylign.serve.keys import KeyRing, keys_path  # pyright: ignore[reportMissingImports]
    from raylign.serve.registry import Registry  # pyright: ignore[reportMissingImports]
    from raylign.serve.service import Service  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    folder, slots, max_length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.sched_setaffinity(0, {int(sys.argv[4])})
    registry = Registry(folder.parent / "registry")
    base = registry.register_base(folder)
    registry.promote("base", base.digest)
    thread = EngineThread(lambda: build_native(folder, slots, max_length, "float32", "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    service = Service(engine=thread, tokenizer=tokenizer, registry=registry, base=base)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(build_app(service, KeyRing(keys_path(registry.root))), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    bare = Bare(thread, service.prompts.stop_tokens)
    _answer({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"})
    for line in sys.stdin:
        job, cpu = json.loads(line), time.process_time()
        _answer((bare.run(job) if job else {}) | {"cpu": cpu, "cpu_seconds": time.process_time() - cpu})


def _answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
