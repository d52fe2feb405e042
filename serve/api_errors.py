"""Errors as OpenAI's API has them: a status, and a body that its clients read. Imports neither ray nor torch."""

from typing import Any

from ..cluster.errors import InputError, RaylignError


class ApiError(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong and stays wrong: 400."""
    return ApiError(400, message, param=param, code=code)


def no_model(name: str) -> ApiError:
    """The same words for a model that is not there and for one that this caller may not use: 404."""
    return ApiError(
        404, f"there is no model {name[:128]!r}: GET /v1/models lists them", param="model", code="model_not_found"
    )


def too_many(message: str, *, retry_after: float, code: str) -> ApiError:
    """The same request may succeed after so many seconds: 429."""
    seconds = str(max(1, round(retry_after + 0.5)))
    return ApiError(429, message, type="rate_limit_error", code=code, headers={"retry-after": seconds})


def unauthorized(message: str) -> ApiError:
    """No key, or one that is not known: 401."""
    return ApiError(
        401,
        message,
        type="authentication_error",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def adapter_failed(digest: str) -> ApiError:
    """A registered adapter cannot be loaded; the log has the reason, which may name folders: 503."""
    message = f"adapter {digest[:12]} cannot be loaded: the log of the service says why"
    return ApiError(503, message, type="server_error", code="adapter_failed")


def from_engine(error: RaylignError | TimeoutError) -> ApiError:
    """What an engine answers: 400 for a request it refuses, 504 for one that took too long, 503 where it failed."""
    if isinstance(error, InputError):
        return bad_request(str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than this service allows", type="timeout_error", code="timeout")
    return ApiError(503, str(error), type="server_error", code="engine_failed")
