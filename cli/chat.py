"""`raylign chat`: a conversation with served models."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from .client import KeyOption, UrlOption, opened, ours, print_stream
from .output import notes
from .run import StorageOption

_HELP = "/model NAME asks another model from here on, /models lists them, /clear forgets what was said, /quit ends"


def chat(
    model: Annotated[str, typer.Argument(help="An alias, or a digest or the start of one.")],
    url: UrlOption = None,
    storage: StorageOption = None,
    key: KeyOption = "",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens to answer with.")] = None,
) -> None:
    """Talk with a model that is being served; it is told all that was said before. Reads lines until their end.

    In the conversation: /model NAME, /models, /clear, /quit.

    Example: raylign chat quickstart
    """
    options = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens is not None else {})
    with opened(url, storage, key) as client:
        client.models.retrieve(model)
        talk = Conversation(client, model, options, [{"role": "system", "content": system}] if system else [])
        if sys.stdin.isatty():
            notes.print(_HELP, highlight=False)
        while (line := _read()) is not None and talk.hear(line):
            pass


@dataclass(slots=True)
class Conversation:
    """What was said so far, and to whom the next line goes."""

    client: Any
    model: str
    options: dict[str, Any]
    opening: list[dict[str, str]]
    """What every conversation begins with."""
    turns: list[dict[str, str]] = field(default_factory=list)

    def hear(self, line: str) -> bool:
        """Obey a command or answer; False when it is time to end."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/quit":
                return False
            case "/clear":
                self.turns.clear()
            case "/models":
                _note(", ".join(model.id for model in self.client.models.list()))
            case "/model":
                self._attempt(lambda: self._switch(rest.strip()))
            case _ if command.startswith("/"):
                _note(f"there is no {command}: {_HELP}")
            case _:
                self._attempt(lambda: self._answer(line.strip()))
        return True

    def _switch(self, name: str) -> None:
        self.client.models.retrieve(name)
        self.model = name

    def _answer(self, text: str) -> None:
        asked = {"role": "user", "content": text}
        messages = [*self.opening, *self.turns, asked]
        chunks = self.client.chat.completions.create(model=self.model, messages=messages, stream=True, **self.options)
        try:
            said = print_stream(chunks)
        except KeyboardInterrupt:  # enough of this answer: the service stops making it, the talk goes on
            chunks.close()
            _note("\n(interrupted)")
            return
        self.turns += [asked, {"role": "assistant", "content": said}]

    def _attempt(self, act: Any) -> None:
        """What the service refuses is said, and the conversation goes on as if it had not been asked."""
        from ..cluster.errors import InputError, NotFound, RunFailed

        try:
            with ours(str(self.client.base_url)):
                act()
        except (InputError, NotFound, RunFailed) as error:
            _note(str(error))


def _read() -> str | None:
    """The next line; none at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  arrow keys and history in `input`

        try:
            return input("> ")
        except EOFError:
            return None
    return sys.stdin.readline() or None


def _note(text: str) -> None:
    notes.print(text, highlight=False)
