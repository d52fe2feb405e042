"""`raylign query`: one question to a served model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_json
from .run import JsonOption, StorageOption


def query(
    model: Annotated[str, typer.Argument(help="An alias, or a digest or the start of one.")],
    text: Annotated[str, typer.Argument(help="What to ask.")],
    url: Annotated[
        str | None, typer.Option(help="The service; the one that `raylign serve` started by default.")
    ] = None,
    storage: StorageOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens to answer with.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stream: Annotated[bool, typer.Option(help="Print the answer as it comes.")] = True,
    json: JsonOption = False,
) -> None:
    """Ask a model that is being served, and print its answer.

    Example: raylign query quickstart "What is 123 + 456?"
    """
    from ..serve.foreground import service_url

    url = url or service_url((storage or Path("runs")).resolve() / "registry")
    messages = [{"role": "system", "content": system}] if system else []
    asked: dict[str, Any] = {
        "model": model,
        "messages": [*messages, {"role": "user", "content": text}],
        "temperature": temperature,
    }
    asked |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    asked |= {"seed": seed} if seed is not None else {}
    with _client(url) as client:
        if stream and not json:
            _print_stream(client.chat.completions.create(**asked, stream=True))
            return
        said = client.chat.completions.create(**asked)
    print_json(_facts(said)) if json else print(said.choices[0].message.content)


def _print_stream(chunks: Any) -> None:
    for chunk in chunks:
        for choice in chunk.choices:
            sys.stdout.write(choice.delta.content or "")
            sys.stdout.flush()
    sys.stdout.write("\n")


def _facts(said: Any) -> dict[str, Any]:
    return {
        "model": said.model,
        "digest": said.system_fingerprint,
        "text": said.choices[0].message.content,
        "finish_reason": said.choices[0].finish_reason,
        "usage": said.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
    }


@contextmanager
def _client(url: str) -> Iterator[Any]:
    """The official client; what goes wrong with it becomes one of this package's errors."""
    import openai

    from ..cluster.errors import ClusterUnreachable, InputError, NotFound, RunFailed

    http = openai.DefaultHttpxClient(trust_env=False)
    base_url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
    try:
        with openai.OpenAI(base_url=base_url, api_key="none", http_client=http) as client:
            yield client
    except openai.NotFoundError as error:
        raise NotFound(_said(error)) from None
    except openai.BadRequestError as error:
        raise InputError(_said(error)) from None
    except openai.APIConnectionError:
        raise ClusterUnreachable(f"no service answers at {url}: is `raylign serve RUN` running?") from None
    except openai.OpenAIError as error:
        raise RunFailed(f"the service at {url} failed: {error}") from None


def _said(error: Any) -> str:
    body = error.body
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
