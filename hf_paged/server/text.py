"""From token ids to text as they come, and where the text stops.

Decoding is tokenizers' `DecodeStream`; here is what it leaves to its caller: the bytes that are still incomplete when a
request ends, and stop strings, which may begin in one token and end in another.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

from tokenizers.decoders import DecodeStream

#: Tokens of context that the first new token is decoded in: enough for any character, and for the space before a word.
_CONTEXT = 8
#: What decoders write for bytes that are no character, or none yet; also a character that texts may have.
_REPLACEMENT = "\ufffd"


class TokenText:
    """The text of one stream of tokens, piece by piece: all pieces together are the text, whatever the pieces.

    Args:
        tokenizer: the `tokenizers.Tokenizer` behind the model's.
        prompt: the tokens before the first.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = deque(prompt[-_CONTEXT:], _CONTEXT)  # context of what is pending
        self._pending: list[int] = []  # tokens whose text did not come yet
        self._repeated = ""  # what the stream will give out once more before its first text
        self._begin()

    def push(self, token: int) -> str:
        """The text that is complete with `token`; it may be empty."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:
            # The decoder rewrote text it had given out (tokenizers says "invalid prefix"): begins anew here.
            text = self.flush()
            self._begin()
            return text
        if text is None:
            return ""
        self._forget_pending()
        if self._repeated:
            text = _without(self._repeated, text)
            self._repeated = ""
        return text

    def _begin(self) -> None:
        """A stream that goes on from the window."""
        context = list(self._window)
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        before = self._decode(context)
        # The stream takes such a context for unfinished and gives it out again before its first text, but for a
        # character that only this text completes.
        self._repeated = before if before.endswith(_REPLACEMENT) else ""

    def flush(self) -> str:
        """The text of what is pending, though it may be an incomplete character."""
        context = list(self._window)
        before = self._decode(context)
        after = self._decode(context + self._pending)
        text = after[len(before) :] if after.startswith(before) else self._decode(self._pending)
        self._forget_pending()
        return text

    def flush_if_pending(self) -> str:
        """As `flush`; empty where every token's text has come."""
        return self.flush() if self._pending else ""

    def _forget_pending(self) -> None:
        self._window.extend(self._pending)
        self._pending.clear()

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


def _without(beginning: str, text: str) -> str:
    """`text` from where it stops being like `beginning`."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(beginning, text, strict=False))
    return text[sum(1 for _ in same) :]


class StopScanner:
    """Lets text through up to the first stop string, holding back what may be the beginning of one.

    Args:
        stops: non-empty texts.
        include: whether the stop string itself is let through.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str, *, look: bool = True) -> str:
        """What may be shown now.

        Args:
            look: False while the text must not stop yet; then nothing of it is looked at, later either.
        """
        if not self._stops or not text:
            return text
        if not look:
            text, self._held = self._held + text, ""
            return text
        text = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)
            self.stopped_by, self._held = stop, ""
            return text[: at + len(stop)] if self._include else text[:at]
        kept = self._longest_beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self, text: str) -> int:
        """Characters at the end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
