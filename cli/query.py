"""`raylign query`: one question to a served model."""

from typing import Annotated, Any

import typer

from .client import KeyOption, UrlOption, opened, print_stream
from .output import print_json
from .run import JsonOption, StorageOption


def query(
    model: Annotated[str, typer.Argument(help="An alias, or a digest or the start of one.")],
    text: Annotated[str, typer.Argument(help="What to ask.")],
    url: UrlOption = None,
    storage: StorageOption = None,
    key: KeyOption = "",
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
    messages = [{"role": "system", "content": system}] if system else []
    asked: dict[str, Any] = {
        "model": model,
        "messages": [*messages, {"role": "user", "content": text}],
        "temperature": temperature,
    }
    asked |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    asked |= {"seed": seed} if seed is not None else {}
    with opened(url, storage, key) as client:
        if stream and not json:
            print_stream(client.chat.completions.create(**asked, stream=True))
            return
        said = client.chat.completions.create(**asked)
    print_json(_facts(said)) if json else print(said.choices[0].message.content)


def _facts(said: Any) -> dict[str, Any]:
    return {
        "model": said.model,
        "digest": said.system_fingerprint,
        "text": said.choices[0].message.content,
        "finish_reason": said.choices[0].finish_reason,
        "usage": said.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
    }
