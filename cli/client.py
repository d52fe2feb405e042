"""The official client of a service, for the verbs that ask: what goes wrong with it becomes one of this package's
errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import write

UrlOption = Annotated[str | None, typer.Option(help="The service; the one that `raylign serve` started by default.")]
KeyOption = Annotated[
    str, typer.Option(envvar="RAYLIGN_API_KEY", show_envvar=True, help="The API key, if the service has keys.")
]


@contextmanager
def opened(url: str | None, storage: Path | None, key: str) -> Iterator[Any]:
    """A client of the service at `url`, or of the one that is announced in the storage."""
    import openai

    from ..serve.foreground import service_url

    url = url or service_url((storage or Path("runs")).resolve() / "registry")
    http = openai.DefaultHttpxClient(trust_env=False)
    base_url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
    with openai.OpenAI(base_url=base_url, api_key=key or "none", http_client=http) as client, ours(url):
        yield client


@contextmanager
def ours(url: str) -> Iterator[None]:
    """Turns what the client raises into one of this package's errors."""
    import openai

    from ..cluster.errors import ClusterUnreachable, InputError, NotFound, RunFailed

    try:
        yield
    except openai.NotFoundError as error:
        raise NotFound(_said(error)) from None
    except openai.AuthenticationError as error:
        raise InputError(f"{_said(error)}: give --key or set RAYLIGN_API_KEY") from None
    except openai.BadRequestError as error:
        raise InputError(_said(error)) from None
    except openai.APIConnectionError:
        raise ClusterUnreachable(f"no service answers at {url}: is `raylign serve RUN` running?") from None
    except openai.APIStatusError as error:
        raise RunFailed(f"the service at {url} answers {error.status_code}: {_said(error)}") from None
    except openai.OpenAIError as error:
        raise RunFailed(f"the service at {url} failed: {error}") from None


def print_stream(chunks: Any) -> str:
    """Print an answer as it comes; gives the whole of it."""
    said = []
    for chunk in chunks:
        for choice in chunk.choices:
            said.append(choice.delta.content or "")
            write(said[-1])
    write("\n")
    return "".join(said)


def _said(error: Any) -> str:
    body = error.body
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
