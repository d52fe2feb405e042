"""Evaluation through the official client, against an HTTP service that answers by rule."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from raylign.cluster.errors import RunFailed
from raylign.trainers.evaluation import evaluate


class Echo:
    """Answers with the question's last word; refuses `refuse`, and counts who is here at once."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> JSONResponse:
            body = await request.json()
            self.asked.append(body)
            word = body["messages"][-1]["content"].split()[-1]
            if word == "refuse":
                return JSONResponse({"error": {"message": "no", "type": "invalid_request_error"}}, 400)
            message = {"role": "assistant", "content": word}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse(
                {"id": "1", "object": "chat.completion", "created": 0, "model": "echo", "choices": [choice]}
            )

        return app


@pytest.fixture
def echo() -> Iterator[tuple[str, Echo]]:
    service = Echo()
    server = uvicorn.Server(uvicorn.Config(service.app(), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    ready = threading.Event()
    startup = server.startup

    async def started(sockets: Any = None) -> None:
        await startup(sockets)
        ready.set()

    server.startup = started  # type: ignore[method-assign]
    thread.start()
    assert ready.wait(20)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", service
    server.should_exit = True
    thread.join()


def _row(text: str, answer: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "answer": answer}


def _exact(text: str, row: dict[str, Any]) -> float:
    return 1.0 if text == row["answer"] else 0.25


def test_accuracy_counts_what_is_right(echo: tuple[str, Echo]) -> None:
    url, service = echo
    rows = [_row("say a", "a"), _row("say b", "b"), _row("say c", "x"), _row("say d", "d")]
    result = evaluate(url, "m", rows, grade=_exact, temperature=0.5, max_tokens=7, concurrency=2, seed=40)
    assert (result["n"], result["accuracy"], result["errors"]) == (4, 0.75, 0)
    assert result["mean_grade"] == pytest.approx(3.25 / 4)
    assert result["examples"][2] == {"prompt": rows[2]["prompt"], "answer": "c", "grade": 0.25}
    assert sorted(body["seed"] for body in service.asked) == [40, 41, 42, 43]
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in service.asked} == {("m", 0.5, 7)}


def test_one_bad_answer_does_not_lose_the_rest(echo: tuple[str, Echo]) -> None:
    def picky(text: str, row: dict[str, Any]) -> float:
        if text == "c":
            raise KeyError("gold")
        return _exact(text, row)

    rows = [_row("say a", "a"), _row("please refuse", ""), _row("say c", "c"), _row("say d", "d")]
    result = evaluate(echo[0], "m", rows, grade=picky)
    assert (result["n"], result["accuracy"], result["errors"]) == (4, 0.5, 2)
    errors = [example["error"] for example in result["examples"] if "error" in example]
    assert errors[0].startswith("BadRequestError")
    assert errors[1] == "KeyError: 'gold'"


def test_nothing_answered_is_a_failure_not_zero_percent(echo: tuple[str, Echo]) -> None:
    with pytest.raises(RunFailed, match=r"none of 1 questions to m .* could be graded: BadRequestError"):
        evaluate(echo[0], "m", [_row("refuse", "")], grade=_exact)


def test_a_stop_ends_the_asking_while_answers_are_awaited(echo: tuple[str, Echo]) -> None:
    class Stop(Exception):
        pass

    graded = threading.Event()
    asked = threading.Event()

    def slow(text: str, row: dict[str, Any]) -> float:
        asked.set()
        graded.wait(20)
        return 1.0

    def tick() -> None:
        if asked.is_set():
            graded.set()
            raise Stop

    with pytest.raises(Stop):
        evaluate(echo[0], "m", [_row("say a", "a")] * 50, grade=slow, concurrency=1, tick=tick)
    assert len(echo[1].asked) < 50
