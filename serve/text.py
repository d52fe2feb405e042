"""From tokens to text, piece by piece: the pieces of a completion join to exactly its decoded text.

Text is held back while a character is incomplete (its bytes are spread over several tokens) and while it may be the
beginning of a stop string. Imports neither ray nor torch.
"""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"
"""What decoders give for bytes that form no character, or none yet."""
_MOST_PIECES = 3
"""A character has at most four bytes, so an incomplete one shows as at most three of these."""


class IncrementalText:
    """One completion's text as its tokens arrive; `stopped` once a stop string has come, which is not part of it.

    `decode` turns token ids into text. At each token only a window is decoded: the newest tokens, and before them one
    whole piece of text as context (some decoders strip the space that a text begins with).
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._window = 0
        self._whole = 0
        """Tokens up to here end in a whole character."""
        self._given = 0
        """Characters of the window's text that have been given out."""
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; gives the text that is now certain."""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """No token follows; gives the text held back."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        text = self._decode(self._tokens[self._window :])
        unsure = 0 if final else min(len(text) - len(text.rstrip(_INCOMPLETE)), _MOST_PIECES)
        sure = text[: len(text) - unsure]
        new, self._given = sure[self._given :], max(self._given, len(sure))
        if not text.endswith(_INCOMPLETE):
            self._slide()
        return new

    def _slide(self) -> None:
        context = self._decode(self._tokens[self._whole :])
        if context:
            self._window, self._whole, self._given = self._whole, len(self._tokens), len(context)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        keep = 0 if final else self._begun()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def _begun(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
