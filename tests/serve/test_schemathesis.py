"""Requests that schemathesis makes up from the OpenAPI document: none is answered 5xx, all as the document says."""

from typing import Any

import pytest

from .live import Live

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in the extra dev, not beside vLLM")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

OPERATIONS = {
    ("POST", "/v1/chat/completions"): 150,
    ("POST", "/v1/completions"): 150,
    ("GET", "/v1/models"): 5,
    ("GET", "/v1/models/{name}"): 50,
    ("GET", "/health"): 5,
    ("GET", "/ready"): 5,
    ("GET", "/metrics"): 5,
}
"""How many requests of each kind are made up, for all that the application has."""


@pytest.fixture(scope="module")
def document(served: Live) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_what_generates_may_stream(document: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        raw = document.raw_schema["paths"][path]["post"]["responses"]["200"]
        assert raw["content"].keys() == {"application/json", "text/event-stream"}


def test_every_operation_of_the_document_is_here(document: Any) -> None:
    found = {(result.ok().method.upper(), result.ok().path) for result in document.get_all_operations()}
    assert found == OPERATIONS.keys()


CASES = [
    (*operation, mode)
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation[0] == "POST"
]
"""What the document allows of each; of those with a body, what it does not allow too."""


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_no_request_is_answered_5xx(document: Any, served: Live, method: str, path: str, mode: GenerationMode) -> None:
    operation = document[path][method]
    seen: set[int] = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=OPERATIONS[method, path],
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        if operation.body and mode is GenerationMode.POSITIVE:
            case.body["model"] = "first"  # of all names there could be, one that is there
            if case.body.get("max_tokens") is None and case.body.get("max_completion_tokens") is None:
                case.body["max_tokens"] = 3
        answer = case.call_and_validate(excluded_checks=[positive_data_acceptance])  # what does not fit is a 400 too
        seen.add(answer.status_code)

    ask()
    assert seen
    assert 200 in seen or mode is GenerationMode.NEGATIVE or "{name}" in path
    assert served.until_idle()
