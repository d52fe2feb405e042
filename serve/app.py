"""The HTTP side: OpenAI's routes over a `Service`, and every error in OpenAI's shape."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..cluster.errors import InputError, RaylignError
from .answers import ChatShape, CompletionShape, Head, Shape, join, usage
from .protocol import ApiError, ChatRequest, CompletionRequest, GenerationFields, bad_request
from .registry import Entry
from .service import Piece, Service

DIGEST_HEADER = "x-raylign-digest"


def build_app(service: Service) -> FastAPI:
    """The OpenAI-compatible application of a service."""
    app = FastAPI(title="raylign", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_generation(app, service)
    _add_models(app, service)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        busy = await service.busy()
        return {"status": "ok", "busy": busy, "base": service.base.digest, "max_length": service.max_length}

    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> Response:
        entry = await service.select(request.model)
        prompt = service.chat_prompt(request.messages)
        shape = ChatShape(service.token_text, request.logprobs)
        return await _answer(service, entry, [prompt], request, request.limit, shape)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest) -> Response:
        entry = await service.select(request.model)
        prompts = [service.text_prompt(prompt) for prompt in request.prompts]
        shape = CompletionShape(service.token_text, request.logprobs is not None)
        return await _answer(service, entry, prompts, request, request.max_tokens or 16, shape)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, entry) for name, entry in service.models().items()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return _model(name, service.entry(name))


def _model(name: str, entry: Entry) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(entry.created),
        "owned_by": "raylign",
        "root": entry.digest,
        "parent": entry.base if entry.kind == "adapter" else None,
    }


async def _answer(
    service: Service,
    entry: Entry,
    prompts: list[list[int]],
    request: GenerationFields,
    limit: int | None,
    shape: Shape,
) -> Response:
    head = shape.head(request.model, entry.digest, stream=request.stream)
    headers = {DIGEST_HEADER: entry.digest}
    steps = service.generate(entry, prompts, request, limit)
    spent = sum(len(prompt) for prompt in prompts)
    if not request.stream:
        async with aclosing(steps):
            pieces = join([piece async for step in steps for piece in step])
        choices = [shape.choice(piece, stream=False) for piece in pieces]
        counts = usage(spent, sum(piece.sampled for piece in pieces))
        return JSONResponse(head.body(choices, usage=counts), headers=headers)
    try:
        first = await anext(steps)  # what is wrong with a request is found here, while the status can still say so
    except BaseException:
        await steps.aclose()
        raise
    events = _events(shape, head, _from_first(first, steps), spent, len(prompts) * request.n, request.include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _from_first(
    first: list[Piece], steps: AsyncGenerator[list[Piece], None]
) -> AsyncGenerator[list[Piece], None]:
    async with aclosing(steps):
        yield first
        async for step in steps:
            yield step


async def _events(
    shape: Shape, head: Head, steps: AsyncGenerator[list[Piece], None], spent: int, choices: int, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events: an opening for each choice, its pieces, the token counts if asked for, the end."""
    more = {"usage": None} if include_usage else {}
    sampled = 0
    async with aclosing(steps):
        for choice in range(choices):
            if opening := shape.opening(choice):
                yield _event(head.body([opening], **more))
        try:
            async for step in steps:
                sampled += sum(piece.sampled for piece in step)
                for piece in step:
                    if piece.text or piece.tokens or piece.finish_reason:
                        yield _event(head.body([shape.choice(piece, stream=True)], **more))
        except RaylignError as error:
            yield _event(_failure(error).body)
            return
    if include_usage:
        yield _event(head.body([], usage=usage(spent, sampled)))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _failure(error: RaylignError) -> ApiError:
    if isinstance(error, InputError):
        return bad_request(str(error))
    return ApiError(503, str(error), type="server_error", code="engine_failed")


def _add_errors(app: FastAPI) -> None:
    def refuse(kind: type[Exception], convert: Callable[[Any, Request], ApiError]) -> None:
        @app.exception_handler(kind)
        async def handler(request: Request, error: Exception) -> JSONResponse:
            answer = convert(error, request)
            return JSONResponse(answer.body, answer.status)

    refuse(ApiError, lambda error, _: error)
    refuse(RaylignError, lambda error, _: _failure(error))
    refuse(RequestValidationError, lambda error, _: _first_mistake(error))
    refuse(HTTPException, _http_error)
    refuse(TimeoutError, lambda _, __: ApiError(503, "the engine does not answer", type="server_error"))
    refuse(Exception, lambda error, _: ApiError(500, f"internal error: {type(error).__name__}", type="server_error"))


def _http_error(error: HTTPException, request: Request) -> ApiError:
    message = {404: "there is no route", 405: "this method is not for"}.get(error.status_code, error.detail)
    return ApiError(error.status_code, f"{message} {request.method} {request.url.path}", type="invalid_request_error")


def _first_mistake(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return bad_request("the body is not JSON")
    if not place:
        return bad_request(first["msg"].removeprefix("Value error, "))
    if first["type"] == "extra_forbidden":
        return bad_request(f"{'.'.join(place)} is not supported", param=place[0], code="unsupported_parameter")
    return bad_request(f"{'.'.join(place)}: {first['msg']}", param=place[0], code="invalid_value")
