"""What every request passes before anything of it is read as JSON: the key, the size, the depth.

Deny is the default: a path that nobody thought of needs a key too. Imports neither ray nor torch.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_errors import ApiError, bad_request, unauthorized
from .config import Limits
from .keys import Key, KeyRing
from .metrics import Metrics

PUBLIC = frozenset({"/health", "/ready"})
"""Paths that need no key: they say yes or no, for probes."""


def respond(error: ApiError) -> JSONResponse:
    """The answer that an error is."""
    return JSONResponse(error.body, error.status, headers=error.headers)


class Gate:
    """ASGI middleware; `scope["state"]["key"]` is the caller's key, or none where the service has no keys."""

    def __init__(self, app: ASGIApp, keys: KeyRing, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._pass(scope, receive, self._counted(scope, send))
        else:
            await self._app(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            key = self._key(_path(scope), headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await respond(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
        await self._app(scope, _replay(body, receive), send)

    def _key(self, path: str, headers: Headers) -> Key | None:
        if path in PUBLIC or not self._keys.required:
            return None
        given = headers.getlist("authorization")
        if len(given) != 1:
            raise unauthorized("this service needs one API key, as `Authorization: Bearer …`")
        scheme, _, secret = given[0].partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise unauthorized("this API key is not known here")
        return key

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body, within size and time. Raises a 413, a 408, or a 400 for what is no JSON or too deep."""
        most = self._limits.body_bytes
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or int(declared[:20]) > most:
            raise _too_large(most)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise bad_request("the client went away before its request was whole")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        raise _too_large(most)
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive", headers={"connection": "close"}) from None
        body = b"".join(chunks)
        if body:
            _check_json(body)
        return body

    def _counted(self, scope: Scope, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        return counted


def _path(scope: Scope) -> str:
    """The path below the prefix that the application is mounted at."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _check_json(body: bytes) -> None:
    """pydantic's parser stops at 200 levels; those of Python and of templates would go on to the end of the stack."""
    try:
        from_json(body, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {most} bytes", code="request_too_large", headers={"connection": "close"}
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body, which has been read, and then what else comes: that the client has left."""
    first: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed
