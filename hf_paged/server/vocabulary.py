"""What single tokens say, as text and as bytes, for log-probabilities: a token may be a part of a character."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any


class Vocabulary:
    """The tokens of a fast tokenizer one by one.

    Args:
        tokenizer: transformers' fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        decoder = json.dumps(json.loads(self._backend.to_str()).get("decoder"))
        self._byte_of = _byte_level_alphabet() if '"ByteLevel"' in decoder else None
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """The token as text; what is no whole character of UTF-8 as U+FFFD."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:  # the model's embedding has more rows than the tokenizer has tokens
            return b""
        if self._byte_of is not None and all(c in self._byte_of for c in piece):
            return bytes(self._byte_of[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's BPE: printable Latin-1 stands for itself, the rest follows from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
