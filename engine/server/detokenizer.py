"""Tokens to text, piece by piece, without ever giving out a part of a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
MOST_OPEN = (
    3  # a character has at most 4 bytes, so at most 3 tokens at the end can be of one that is not complete
)
MAX_HELD_TOKENS = (
    16  # decoders that give up on a whole run of bytes for one that is missing get so many to come right
)

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Text of one generation as its tokens come.

    `decode` is applied to a window: the tokens that were given out last, for decoders that look back (a leading space), and all that are not out.
    Text that ends with U+FFFD may end in the middle of a character and is held back; so what is given out never changes.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that is certain now."""
        self._held += tokens
        text = self._decode(self._context + self._held)
        if not text.endswith(REPLACEMENT):
            return self._give_out(text, [])
        return "" if len(self._held) <= MAX_HELD_TOKENS else self._give_out_all_but_the_end()

    def _give_out_all_but_the_end(self) -> str:
        """Give out what is no text and will not become any; keep what may be the beginning of a character."""
        for count in range(1, MOST_OPEN + 1):
            rest, end = self._held[:-count], self._held[-count:]
            text = self._decode(self._context + rest)
            if not text.endswith(REPLACEMENT):
                break
        self._held = rest
        return self._give_out(text, end)

    def flush(self) -> str:
        """Return what was held back, without a character that was never completed."""
        if not self._held:
            return ""
        return self._give_out(self._decode(self._context + self._held), []).rstrip(REPLACEMENT)

    def _give_out(self, text: str, rest: list[int]) -> str:
        new = text[len(self._context_text) :]
        if new:  # tokens without text (special ones) are no context: the window must not grow with them
            self._context, self._context_text = self._held, self._decode(self._held)
        self._held = rest
        return new
