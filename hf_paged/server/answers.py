"""The JSON of answers, whole and in chunks, for completions and for chat."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from hf_paged.engine.sampling import TokenLogprobs
from hf_paged.server.choice import Choice, Piece
from hf_paged.server.vocabulary import Vocabulary

#: JSON knows no -inf. The least that OpenAI's clients are used to.
_LEAST = -9999.0


def usage(choices: Sequence[Choice], copies: int) -> dict[str, Any]:
    """Tokens of a request: each prompt once, the tokens of all choices.

    Args:
        copies: choices of each prompt, which lie side by side.
    """
    firsts = [choice.handle.partial() for choice in choices[::copies]]
    prompt = sum(result.prompt_length for result in firsts)
    new = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_length for result in firsts)},
    }


class Form:
    """How the answers of one route look.

    Args:
        model: the name the request called it by.
        logprobs: whether the request asked for log-probabilities.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, vocabulary: Vocabulary, *, logprobs: bool) -> None:
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer at once."""
        choices = [self.whole_choice(index, piece) for index, piece in enumerate(pieces)]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """A part of the answer."""
        return self._head | {"object": self.chunk_object, "choices": choices} | extra

    def whole_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """What comes before the text of a choice, if anything does."""
        raise NotImplementedError

    def piece_chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError


class CompletionForm(Form):
    """/v1/completions.

    Args:
        echoes: text to begin each choice with.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, vocabulary: Vocabulary, *, logprobs: bool, echoes: list[str]) -> None:
        super().__init__(model, vocabulary, logprobs=logprobs)
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]  # characters given out, a choice

    def whole_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, self._echoes[index] + piece.text, piece)

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, self._echoes[index], Piece()) if self._echoes[index] else None

    def piece_chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece.text, piece)

    def _choice(self, index: int, text: str, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._table(index, piece.logprobs) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _table(self, index: int, logprobs: list[TokenLogprobs]) -> dict[str, list[Any]]:
        text_of = self._vocabulary.text_of
        table: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for entry in logprobs:
            text = text_of(entry.token_id)
            top = {text_of(token): _number(value) for token, value in reversed(entry.top)}
            top.setdefault(text, _number(entry.logprob))
            table["tokens"].append(text)
            table["token_logprobs"].append(_number(entry.logprob))
            table["top_logprobs"].append(top)
            table["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return table


class ChatForm(Form):
    """/v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text},
            "logprobs": self._list(piece.logprobs),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece_chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        chunk = {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._list(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }
        return chunk if piece.finish_reason is None else chunk | {"stop_reason": piece.stop_reason}

    def _list(self, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            self._entry(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._entry(token, value) for token, value in entry.top]}
            for entry in logprobs
        ]
        return {"content": content}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._vocabulary.text_of(token),
            "logprob": _number(logprob),
            "bytes": list(self._vocabulary.bytes_of(token)),
        }


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)
