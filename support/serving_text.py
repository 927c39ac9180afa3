"""The text of a completion while it is written, in pieces that never have to be taken back."""

from collections.abc import Callable

UNFINISHED = "\ufffd"  # what a decoder writes for a character of which a byte is still missing


class TextStream:
    """Tokens in, pieces of text out.

    Args:
        decode: tokens to text, as for a whole completion.
        ends: tokens after which a completion is over; they and padding are no part of the text.
        stop: texts at which the completion ends; they are no part of it either.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], ends: list[int], stop: tuple[str, ...] = ()
    ) -> None:
        self.decode, self.ends, self.stop = decode, ends, stop
        self.ids: list[int] = []
        self.sent = ""
        self.over = False  # an end token or a stop text has come

    def add(self, token: int) -> str:
        """The text that is certain since this token, beyond what was given before."""
        if self.over or token in self.ends:
            self.over = True
            return ""
        self.ids.append(token)
        return self.grow(self.decode(self.ids).rstrip(UNFINISHED))

    def grow(self, text: str) -> str:
        """The same, with the whole text so far."""
        text, self.over = cut(text, self.stop)
        held = 0 if self.over else longest_start(text, self.stop)
        return self.advance(text[: len(text) - held])

    def finish(self, text: str) -> str:
        """What is left of the whole text."""
        return self.advance(text)

    def advance(self, text: str) -> str:
        """The part of `text` that was not given yet."""
        if not text.startswith(self.sent):  # a decoder that changes what it has written: wait
            return ""
        piece, self.sent = text[len(self.sent) :], text
        return piece


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to the first of the stop texts; and whether there is one."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def longest_start(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    sizes = [size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])]
    return max(sizes, default=0)
