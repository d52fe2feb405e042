"""Rewards that somebody answers over HTTP: many questions at once on one thread, each bounded in time and bytes.

asyncio, since only there a time-out ends whatever the other side does: a body or headers that never end, too.
"""

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

import httpx

from ...cluster.errors import InputError
from ..config import HttpReward, JudgeReward
from ..records import Group, Sample
from .addresses import Refused, resolve
from .functions import RewardError, Row, finite, reward_name

MAX_PAUSE_SECONDS = 60.0
"""Between two tries, also where a service asks for longer."""
_FIRST_PAUSE_SECONDS = 0.5
_REDIRECTS = 3
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}

Post = Callable[[Any], Awaitable[Any]]
"""Posts JSON to the reward's address and gives the JSON of the answer."""


class TryAgain(RewardError):
    """What may go well the next time; `after` seconds, where the service said so."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class RemoteReward:
    """A group's completions, asked for at once, up to `concurrency` of them at a time over all groups.

    `outcomes` asks before it returns, and its iterator waits. Thread-safe.
    """

    def __init__(self, config: HttpReward | JudgeReward) -> None:
        self._config, self._counts = config, Counter[str]()
        self._key = _key(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=reward_name(config), daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(
            timeout=None,  # a try is bounded as a whole
            trust_env=False,
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        )
        self._room = asyncio.Semaphore(config.concurrency)

    @property
    def overruns(self) -> int:
        """Tries that were out of time."""
        return self._counts["overruns"]

    def wait_ready(self) -> None:
        """Look at the address. Raises `InputError` for one that the recipe does not allow; one that is unknown now may
        be known later."""
        looked = self._submit(resolve(self._config.url, allow_private=self._config.allow_private))
        try:
            looked.result(timeout=self._config.timeout_seconds)
        except Refused as error:
            self.close()
            raise InputError(f"reward {reward_name(self._config)!r} {error}") from error
        except (OSError, TimeoutError):
            return

    def outcomes(self, group: Group) -> Iterator[float | RewardError]:
        """The score of each sample, or what was wrong with it, in order."""
        asked = [self._submit(self._tried(sample, group.row)) for sample in group.samples]
        return (future.result() for future in asked)

    def counters(self) -> dict[str, float]:
        """`retries`, and by kind why: `nonsense`, `status_429`, …"""
        return {name: float(count) for name, count in sorted(self._counts.items()) if name != "overruns"}

    def close(self) -> None:
        """End what is under way."""
        if self._loop.is_closed():
            return
        with suppress(TimeoutError):
            self._submit(self._end()).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    def _submit(self, work: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _tried(self, sample: Sample, row: Row) -> float | RewardError:
        """One completion's score after as many tries as it may take."""
        for number in range(self._config.retries + 1):
            try:
                async with self._room:
                    return await self._try(sample.text, row)
            except TryAgain as error:
                if number == self._config.retries:
                    return RewardError(f"{error}, {number + 1} times")
                self._counts["retries"] += 1
                await asyncio.sleep(pause(number, error.after))
            except RewardError as error:
                return error
        raise AssertionError("the last try returns")

    async def _try(self, completion: str, row: Row) -> float:
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                return await self._ask(completion, row)
        except TimeoutError:
            self._counts["overruns"] += 1
            raise TryAgain(f"took longer than {self._config.timeout_seconds:g} s") from None
        except (httpx.TransportError, OSError) as error:
            self._counts["unreachable"] += 1
            raise TryAgain(f"could not be asked: {type(error).__name__}: {error}".rstrip(": ")) from None

    async def _ask(self, completion: str, row: Row) -> float:
        if isinstance(self._config, JudgeReward):
            from .judge import Nonsense, question, score_in

            answer = await self._post(_endpoint(self._config.url), question(self._config, completion, row))
            try:
                return score_in(answer)
            except Nonsense as error:
                self._counts["nonsense"] += 1
                raise TryAgain(str(error)) from None
        answer = await self._post(self._config.url, {"completion": completion, "row": row})
        if not isinstance(answer, dict) or "score" not in answer:
            raise RewardError(f'answered {answer!r:.80}, and should {{"score": number}}')
        return finite(answer["score"])

    async def _post(self, url: str, content: Any) -> Any:
        """JSON for JSON. Raises `TryAgain`, and `RewardError` for what will not change."""
        try:
            body = json.dumps(content, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"cannot send the row as JSON: {error}") from None
        for _ in range(_REDIRECTS + 1):
            request = await self._request(url, body)
            response = await self._client.send(request, stream=True)
            try:
                if response.is_redirect:
                    url = urljoin(url, response.headers["location"])
                    continue
                return await self._answer(response)
            finally:
                await response.aclose()
        raise RewardError(f"was redirected more than {_REDIRECTS} times")

    async def _request(self, url: str, body: bytes) -> httpx.Request:
        """To the address that was looked at; the name goes into the header and into TLS. The key goes only where the
        recipe sends it."""
        address = await resolve(url, allow_private=self._config.allow_private)
        parts = urlsplit(url)
        host = f"[{address}]" if ":" in address else address
        port = f":{parts.port}" if parts.port else ""
        headers = {"host": parts.netloc.rpartition("@")[2], "content-type": "application/json"}
        if self._key and _origin(url) == _origin(self._config.url):
            headers["authorization"] = f"Bearer {self._key}"
        target = urlunsplit((parts.scheme, host + port, parts.path or "/", parts.query, ""))
        extensions = {"sni_hostname": parts.hostname} if parts.scheme == "https" else {}
        return self._client.build_request("POST", target, content=body, headers=headers, extensions=extensions)

    async def _answer(self, response: httpx.Response) -> Any:
        if response.status_code in _TRY_AGAIN:
            self._counts[f"status_{response.status_code}"] += 1
            raise TryAgain(f"was answered {response.status_code}", retry_after(response.headers.get("retry-after")))
        held = bytearray()
        async for part in response.aiter_bytes(1 << 14):
            held += part
            if len(held) > self._config.max_bytes:
                raise RewardError(f"was answered with more than {self._config.max_bytes} bytes")
        if response.status_code != 200:
            raise RewardError(f"was answered {response.status_code}: {bytes(held).decode(errors='replace')!r:.80}")
        try:
            return json.loads(held)
        except (ValueError, RecursionError):
            raise RewardError(f"answered {bytes(held).decode(errors='replace')!r:.80}, which is no JSON") from None


def pause(number: int, after: float | None) -> float:
    """Seconds before try `number + 1`: as the service says, else twice as long each time, and up to half of it less so
    that not all come back at once."""
    if after is not None:
        return min(max(after, 0.0), MAX_PAUSE_SECONDS)
    return min(_FIRST_PAUSE_SECONDS * 2**number, MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0)


def retry_after(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number or a date (RFC 9110, 10.2.3); none for neither."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _endpoint(url: str) -> str:
    return url.rstrip("/") + "/chat/completions"


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _key(config: HttpReward | JudgeReward) -> str:
    if config.key_env is None:
        return ""
    if key := os.environ.get(config.key_env):
        return key
    raise InputError(f"reward {reward_name(config)!r}: key_env {config.key_env!r} is not set where its scorer runs")
