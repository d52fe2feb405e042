"""The HTTP side: OpenAI's routes over a `Service`, and every error in OpenAI's shape."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..cluster.errors import RaylignError
from .answers import ChatShape, CompletionShape, Head, Shape, usage
from .api_errors import ApiError, bad_request, from_engine
from .gate import Gate, respond
from .keys import KeyRing
from .openapi import RESPONSES, STREAMED
from .pieces import Piece, join
from .protocol import ChatRequest, CompletionRequest
from .registry import Entry
from .sending import ClientGone, EventStream, while_connected
from .service import Service, Work

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
DIGEST_HEADER = "x-raylign-digest"
_GRACE_SECONDS = 5.0
"""How much longer than an answer may take its stream may be read."""


def build_app(service: Service, keys: KeyRing) -> FastAPI:
    """The OpenAI-compatible application of a service; whoever asks needs one of the keys, if there are any."""
    app = FastAPI(title="raylign", docs_url=None, redoc_url=None, redirect_slashes=False, responses=RESPONSES)
    app.add_middleware(Gate, keys=keys, limits=service.limits, metrics=service.metrics)
    _add_errors(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_probes(app, service, keys)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(request: ChatRequest, http: Request) -> Response:
        entry = service.entry(request.model, http.state.key, request.user)
        prompt = service.prompts.chat(request.messages, request.offered)
        work = Work(entry=entry, prompts=[prompt], fields=request, key=http.state.key)
        return await _answer(service, work, ChatShape(service.prompts, request.logprobs), http)

    @app.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        entry = service.entry(request.model, http.state.key, request.user)
        prompts = [service.prompts.text(prompt) for prompt in request.prompts]
        work = Work(entry=entry, prompts=prompts, fields=request, key=http.state.key)
        return await _answer(service, work, CompletionShape(service.prompts, request.logprobs), http)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(http: Request) -> dict[str, Any]:
        known = service.models(http.state.key)
        return {"object": "list", "data": [_model(name, entry) for name, entry in known.items()]}

    @app.get("/v1/models/{name}")
    async def model(name: str, http: Request) -> dict[str, Any]:
        return _model(name, service.entry(name, http.state.key))


def _add_probes(app: FastAPI, service: Service, keys: KeyRing) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the engine's thread answers. Without keys it also says what is served."""
        busy = await service.busy()
        if keys.required:
            return {"status": "ok"}
        return {"status": "ok", "busy": busy, "base": service.base.digest, "max_length": service.max_length}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether another request would be let in; 503 where it would not."""
        if service.full:
            raise ApiError(503, "all places are taken", type="server_error", code="overloaded")
        await service.busy()
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(name: str, entry: Entry) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(entry.created),
        "owned_by": "raylign",
        "root": entry.digest,
        "parent": entry.base if entry.kind == "adapter" else None,
    }


async def _answer(service: Service, work: Work, shape: Shape, http: Request) -> Response:
    request = work.fields
    head = shape.head(request.model, work.entry.digest, stream=request.stream)
    headers = {DIGEST_HEADER: work.entry.digest}
    steps = service.generate(work)
    if not request.stream:
        pieces = join(await while_connected(http, _all(steps)))
        choices = [shape.choice(piece, stream=False) for piece in pieces]
        counts = usage(work.prompt_tokens, sum(piece.sampled for piece in pieces))
        return JSONResponse(head.body(choices, usage=counts), headers=headers)
    try:
        first = await while_connected(http, anext(steps))  # what is wrong is found here, while the status can say so
    except BaseException:
        await steps.aclose()
        raise
    events = _events(shape, head, _from_first(first, steps), work)
    return EventStream(events, steps, service.limits.request_seconds + _GRACE_SECONDS, headers)


async def _all(steps: AsyncGenerator[list[Piece], None]) -> list[Piece]:
    async with aclosing(steps):
        return [piece async for step in steps for piece in step]


async def _from_first(
    first: list[Piece], steps: AsyncGenerator[list[Piece], None]
) -> AsyncGenerator[list[Piece], None]:
    async with aclosing(steps):
        yield first
        async for step in steps:
            yield step


async def _events(
    shape: Shape, head: Head, steps: AsyncGenerator[list[Piece], None], work: Work
) -> AsyncGenerator[str, None]:
    """Server-sent events: an opening for each choice, its pieces, the token counts if asked for, the end."""
    more = {"usage": None} if work.fields.include_usage else {}
    sampled = 0
    async with aclosing(steps):
        for choice in range(work.rows):
            if opening := shape.opening(choice):
                yield _event(head.body([opening], **more))
        try:
            async for step in steps:
                sampled += sum(piece.sampled for piece in step)
                for piece in step:
                    if piece.text or piece.tokens or piece.calls or piece.finish_reason:
                        yield _event(head.body([shape.choice(piece, stream=True)], **more))
        except (RaylignError, TimeoutError) as error:
            yield _event(from_engine(error).body)
            return
    if work.fields.include_usage:
        yield _event(head.body([], usage=usage(work.prompt_tokens, sampled)))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {_JSON.encode(body)}\n\n"


def _add_errors(app: FastAPI) -> None:
    def refuse(kind: type[Exception], convert: Callable[[Any, Request], ApiError]) -> None:
        @app.exception_handler(kind)
        async def handler(request: Request, error: Exception) -> JSONResponse:
            return respond(convert(error, request))

    refuse(ApiError, lambda error, _: error)
    refuse(RaylignError, lambda error, _: from_engine(error))
    refuse(TimeoutError, lambda error, _: from_engine(error))
    refuse(ClientGone, lambda _, __: ApiError(499, "the client went away"))
    refuse(RequestValidationError, lambda error, _: _first_mistake(error))
    refuse(HTTPException, _http_error)
    refuse(Exception, lambda error, _: ApiError(500, f"internal error: {type(error).__name__}", type="server_error"))


def _http_error(error: HTTPException, request: Request) -> ApiError:
    message = {404: "there is no route", 405: "this method is not for"}.get(error.status_code, error.detail)
    text = f"{message} {request.method} {request.url.path[:200]}"
    return ApiError(error.status_code, text, headers=dict(error.headers or {}))


def _first_mistake(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part)[:64] for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return bad_request("the body is not JSON", code="invalid_json")
    if not place and first["type"] in ("model_attributes_type", "missing"):
        return bad_request("the body must be a JSON object, sent as content-type: application/json")
    if not place:
        return bad_request(first["msg"].removeprefix("Value error, "))
    if first["type"] == "extra_forbidden":
        return bad_request(f"{'.'.join(place)} is not supported", param=place[0], code="unsupported_parameter")
    return bad_request(f"{'.'.join(place)}: {first['msg']}", param=place[0], code="invalid_value")
