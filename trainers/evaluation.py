"""Ask a served model held-out questions through the official `openai` client, and grade what it says."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..cluster.errors import RunFailed

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Grade = Callable[[str, dict[str, Any]], float]
"""What an answer to a row is worth; 1.0 is right."""

_EXAMPLES = 5
_TIMEOUT_SECONDS = 300.0
_TICK_SECONDS = 0.5


def evaluate(
    url: str,
    model: str,
    rows: Sequence[dict[str, Any]],
    *,
    grade: Grade,
    temperature: float = 0.0,
    max_tokens: int = 256,
    concurrency: int = 64,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Ask every row's `prompt` (a list of messages) of `model` at `url`, at most `concurrency` at once.

    Row `i` is asked with seed `seed + i`, so the answers are the same again. Gives

    - `n`, the rows asked; `accuracy`, the part of them whose grade is 1.0; `mean_grade`
    - `errors`: how many could not be asked or graded; they count as wrong, the rest is not lost
    - `examples`: the first rows, and the first that failed, with `prompt`, `answer`, `grade` and, if it failed, `error`

    Raises `RunFailed` when no row at all could be graded, `ValueError` without rows. Call it where no event loop runs.
    `tick` is called at least once a second; what it raises ends the asking at once.
    """
    if not rows:
        raise ValueError("there are no rows to ask")
    asked = _Asked(model, temperature, max_tokens, seed)
    results = asyncio.run(_ask_all(url, asked, rows, grade, concurrency, tick))
    failed = [result for result in results if "error" in result]
    if len(failed) == len(rows):
        raise RunFailed(f"none of {len(rows)} questions to {model} at {url} could be graded: {failed[0]['error']}")
    return {
        "n": len(rows),
        "accuracy": sum(result["grade"] >= 1.0 for result in results) / len(rows),
        "mean_grade": sum(result["grade"] for result in results) / len(rows),
        "errors": len(failed),
        "examples": results[:_EXAMPLES] + [result for result in results[_EXAMPLES:] if "error" in result][:_EXAMPLES],
    }


class _Asked:
    """How every question is put."""

    def __init__(self, model: str, temperature: float, max_tokens: int, seed: int) -> None:
        self.options: dict[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.seed = seed


async def _ask_all(
    url: str,
    asked: _Asked,
    rows: Sequence[dict[str, Any]],
    grade: Grade,
    concurrency: int,
    tick: Callable[[], None],
) -> list[dict[str, Any]]:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    # The service is on this machine or on its cluster: a proxy from the environment has no part in it.
    http = DefaultAsyncHttpxClient(trust_env=False)
    turn = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, timeout=_TIMEOUT_SECONDS) as client:

        async def one(i: int) -> dict[str, Any]:
            async with turn:
                return await _ask(client, asked, rows[i], i, grade)

        tasks = [asyncio.ensure_future(one(i)) for i in range(len(rows))]
        try:
            waiting = set(tasks)
            while waiting:
                tick()
                _, waiting = await asyncio.wait(waiting, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


async def _ask(client: "AsyncOpenAI", asked: _Asked, row: dict[str, Any], i: int, grade: Grade) -> dict[str, Any]:
    from openai import OpenAIError

    try:
        answer = await client.chat.completions.create(messages=row["prompt"], seed=asked.seed + i, **asked.options)
    except OpenAIError as error:
        return {"prompt": row["prompt"], "answer": "", "grade": 0.0, "error": f"{type(error).__name__}: {error}"}
    text = answer.choices[0].message.content or ""
    try:
        worth = float(await asyncio.to_thread(grade, text, row))
    except Exception as error:  # noqa: BLE001  (the recipe's own code; named in the result, and the row counts as wrong)
        return {"prompt": row["prompt"], "answer": text, "grade": 0.0, "error": f"{type(error).__name__}: {error}"}
    return {"prompt": row["prompt"], "answer": text, "grade": worth}
