"""What the OpenAPI document says of errors: the same shape for all of them. Imports neither ray nor torch."""

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with `stream` its pieces as server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}
"""Of the routes that generate."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request is wrong",
        401: "No key, or one that is not known",
        404: "No such model, or not for this key",
        405: "Not this method",
        408: "The request took too long to arrive",
        413: "The request is too large",
        422: "Not used: what is wrong with a request is answered 400",
        429: "Too much at once: try again after `retry-after` seconds",
        500: "A defect of the service",
        503: "The engine failed, or has no place",
        504: "The answer took too long",
    }.items()
}
