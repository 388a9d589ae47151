"""Text from a stream of tokens: whole characters only, up to a stop string."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

REPLACEMENT = "\ufffd"
"""Decoding an incomplete character gives this."""
MAX_HELD = 3
"""Maximum number of tokens of an incomplete character: all bytes of a UTF-8 character but the last."""


@dataclass
class TextStream:
    """Turns tokens into text, one by one.

    A character can have several tokens, so the end of the text is held back while it is incomplete, and while it could
    be the beginning of a stop string.
    """

    decode: Callable[[np.ndarray], str]
    """Returns the text of tokens."""
    stop: Sequence[str] = ()
    """Ends the text before the first of these strings."""
    text: str = ""
    """The text so far, without what is held back."""
    stopped: bool = False
    """True once a stop string was found."""
    _tokens: list[int] = field(default_factory=list)
    _start: int = 0
    """Index of the token from which on tokens are decoded. Those before the pending ones are its context."""
    _pending: int = 0
    """Index of the first token whose text is pending."""
    _held: str = ""

    def add(self, token: int) -> str:
        """Returns the text that is complete with this token."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before = self.decode(np.array(self._tokens[self._start : self._pending], np.int64))
        after = self.decode(np.array(self._tokens[self._start :], np.int64))
        first = max(len(self._tokens) - MAX_HELD, self._pending) if after.endswith(REPLACEMENT) else len(self._tokens)
        for ready in range(first, len(self._tokens)):
            head = self.decode(np.array(self._tokens[self._start : ready], np.int64))
            rest = after.removeprefix(head)
            if after.startswith(head) and rest and not rest.strip(REPLACEMENT):
                return self._advance(before, head, ready)
        return self._advance(before, after, len(self._tokens))

    def _advance(self, before: str, after: str, ready: int) -> str:
        """Returns what is new in the text `after`, that of the tokens before number `ready`."""
        if ready == self._pending:
            return ""
        # The tokens decoded last are the context of the next ones: a decoder may drop a space at the beginning.
        self._start, self._pending = self._pending, ready
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """Returns the text that was held back, at the end of the stream."""
        if self.stopped:
            return ""
        before = self.decode(np.array(self._tokens[self._start : self._pending], np.int64))
        after = self.decode(np.array(self._tokens[self._start :], np.int64))
        self._pending = len(self._tokens)
        released = self._release(after[len(before) :]) + ("" if self.stopped else self._held)
        if not self.stopped:
            self.text, self._held = self.text + self._held, ""
        return released

    def _release(self, new: str) -> str:
        held = self._held + new
        found = [held.find(stop) for stop in self.stop if stop in held]
        if found:
            self.stopped = True
            released, self._held = held[: min(found)], ""
        else:
            keep = max((_overlap(held, stop) for stop in self.stop), default=0)
            released, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Returns the number of characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
