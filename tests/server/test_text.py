"""Pieces of text: together they are the text, however tokens split characters and stop strings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.server.text import StopScanner, TokenText
from hf_paged.server.vocabulary import Vocabulary
from tests.helpers import demo_tokenizer

TOKENIZER = demo_tokenizer("llama")
BACKEND = TOKENIZER.backend_tokenizer
IDS = st.integers(0, len(TOKENIZER) - 1)


def pieces_of(prompt: list[int], ids: list[int], skip: bool = True) -> list[str]:
    text = TokenText(BACKEND, prompt, skip)
    return [*(text.push(token) for token in ids), text.flush_if_pending()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_pieces_of_any_text_are_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert "".join(pieces_of([5, 6], ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=12), st.lists(IDS, max_size=40), st.booleans())
def test_pieces_of_any_tokens_are_what_decoding_them_says(
    prompt: list[int], ids: list[int], skip: bool
) -> None:
    """Also of tokens that are no characters. What the prompt left incomplete is not the answer's."""
    joined = "".join(pieces_of(prompt, ids, skip))
    whole = TOKENIZER.decode(prompt + ids, skip_special_tokens=skip)
    before = TOKENIZER.decode(prompt, skip_special_tokens=skip)
    if not before.endswith("\ufffd"):
        assert before + joined == whole
    elif whole.startswith(before):
        assert joined == whole[len(before) :]


@pytest.mark.parametrize("prompt", ["a\ufffd", "\ufffd", "ab \ufffd\ufffd", "x" * 40 + "\ufffd"])
@pytest.mark.parametrize("answer", [" the list", "\n", "\ufffd", "\ufffd and", "é", ""])
def test_a_prompt_that_ends_in_a_replacement_character_is_not_repeated(prompt: str, answer: str) -> None:
    encoded = TOKENIZER.encode(prompt, add_special_tokens=False)
    ids = TOKENIZER.encode(answer, add_special_tokens=False)
    assert "".join(pieces_of(encoded, ids)) == answer


def test_a_character_that_the_prompt_began_is_the_answers() -> None:
    first, *rest = TOKENIZER.encode("é", add_special_tokens=False)
    assert rest
    word = TOKENIZER.encode("caf", add_special_tokens=False)
    assert "".join(pieces_of([*word, first], [*rest, *word])) == "écaf"


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = TOKENIZER.encode("é🙂中", add_special_tokens=False)
    assert len(ids) > 3
    pieces = [piece for piece in pieces_of([5], ids) if piece]
    assert "".join(pieces) == "é🙂中"
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_is_told() -> None:
    ids = TOKENIZER.encode("🙂", add_special_tokens=False)[:-1]
    assert "".join(pieces_of([5], ids)) == TOKENIZER.decode(ids) != ""


def test_the_tokens_of_the_vocabulary_are_the_bytes_of_the_text() -> None:
    vocabulary = Vocabulary(TOKENIZER)
    text = "class Ünïcode: 🙂\n\t中文 <|endoftext|>"
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert b"".join(map(vocabulary.bytes_of, ids)) == text.encode()
    assert vocabulary.text_of(len(TOKENIZER) + 5) == ""


def scan(pieces: list[str], stops: tuple[str, ...], include: bool = False) -> tuple[str, str | None]:
    scanner = StopScanner(stops, include)
    shown = ""
    for piece in pieces:
        shown += scanner.push(piece)
        if scanner.stopped_by is not None:
            return shown, scanner.stopped_by
    return shown + scanner.flush(), None


@settings(max_examples=500, deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_what_is_shown_does_not_depend_on_the_pieces_where_nothing_stops(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    at = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(at)]
    shown, stopped = scan(pieces, tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert (stopped is None) == (not ends)
    if stopped is None:
        assert shown == text
    else:
        # It stops in the piece in which the first stop string became complete, at the earliest one there.
        seen = next(b for b in at if b >= min(ends))
        assert shown == text[: min(i for s in stops if (i := text[:seen].find(s)) >= 0)]
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    "pieces, stops, include, expected",
    [
        (["ab", "cd", "ef"], ("cde",), False, ("ab", "cde")),
        (["ab", "cd", "ef"], ("cde",), True, ("abcde", "cde")),
        (["aab"], ("ab", "aab"), False, ("", "aab")),
        (["x", "ab", "y"], ("abz",), False, ("xaby", None)),
        (["ab"], ("abc",), False, ("ab", None)),
        (["é", "\n", "\nz"], ("\n\n",), False, ("é", "\n\n")),
    ],
)
def test_stop_strings(pieces: Any, stops: Any, include: bool, expected: Any) -> None:
    assert scan(pieces, stops, include) == expected
