"""outlines on an enabled model: types and patterns, one prompt or several, as its own users call it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

import hf_paged
from tests.helpers import demo_model, demo_tokenizer, native_calls

pytestmark = pytest.mark.clients

outlines = pytest.importorskip("outlines", reason="outlines is not installed")


class Answer(BaseModel):
    word: Literal["list", "dict"]
    number: int


@pytest.fixture(scope="module")
def enabled() -> Iterator[Any]:
    model = demo_model("gpt2")
    with hf_paged.enabled(model, fallback="error"):
        yield model


def both(enabled: Any, run: Any, calls: int = 1) -> Any:
    """What `run` gives on the enabled model by native calls, asserted to be what it gives on a plain one."""
    tokenizer = demo_tokenizer("gpt2")
    expected = run(outlines.from_transformers(demo_model("gpt2"), tokenizer))
    with native_calls(enabled, calls):
        assert run(outlines.from_transformers(enabled, tokenizer)) == expected
    return expected


def test_a_pattern_for_several_prompts(enabled: Any) -> None:
    wanted = outlines.regex(r"(yes|no|[0-9]{2})")
    texts = both(enabled, lambda m: m.batch(["x = ", "y == "], wanted, max_new_tokens=8, do_sample=False))
    assert all(text in ("yes", "no") or text.isdigit() for text in texts)


def test_a_pydantic_model(enabled: Any) -> None:
    text = both(enabled, lambda m: m("The type is", Answer, max_new_tokens=60, do_sample=False))
    assert Answer.model_validate_json(text).word in ("list", "dict")


def test_a_choice_by_a_generator(enabled: Any) -> None:
    def run(model: Any) -> list[str]:
        generator = outlines.Generator(model, Literal["import", "class"])
        return [generator(text, max_new_tokens=8, do_sample=False) for text in ("The ", "A ")]

    assert set(both(enabled, run, 2)) <= {"import", "class"}


def test_free_text(enabled: Any) -> None:
    assert both(enabled, lambda m: m("The statement", max_new_tokens=12, do_sample=False))
