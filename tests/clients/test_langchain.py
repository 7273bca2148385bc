"""LangChain's HuggingFacePipeline around an enabled pipeline: invoke, batch, stream and a chat model, unedited."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import pipeline

import hf_paged
from tests.helpers import demo_model, demo_tokenizer, native_calls

pytestmark = pytest.mark.clients

langchain = pytest.importorskip("langchain_huggingface", reason="langchain-huggingface is not installed")

TEXTS = ["The statement", "import os", "A", "If the class of an object is", "def f(x):\n    return"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipeline(
        "text-generation",
        model=demo_model(request.param),
        tokenizer=demo_tokenizer(request.param),
        max_new_tokens=16,
        do_sample=False,
        return_full_text=False,
    )


@pytest.fixture(scope="module")
def llm(pipe: Any) -> Any:
    return langchain.HuggingFacePipeline(pipeline=pipe, batch_size=len(TEXTS))


def both(pipe: Any, calls: int, run: Any) -> Any:
    """What `run` gives on the enabled pipeline, by `calls` native calls, asserted to be what it gives without."""
    expected = run()
    with hf_paged.enabled(pipe, fallback="error"), native_calls(pipe, calls):
        assert run() == expected
    return expected


def test_invoke(pipe: Any, llm: Any) -> None:
    assert both(pipe, 1, lambda: llm.invoke(TEXTS[0]))


def test_batch(pipe: Any, llm: Any) -> None:
    texts = both(pipe, len(TEXTS), lambda: llm.batch(TEXTS))
    assert len(set(texts)) == len(TEXTS)
    with hf_paged.enabled(pipe):
        llm.batch(TEXTS)
        assert hf_paged.stats(pipe).peak_running > 1  # at once, where plain HF runs one prompt after another


def test_a_chain_batches_from_threads(pipe: Any, llm: Any) -> None:
    from langchain_core.prompts import PromptTemplate

    chain = PromptTemplate.from_template("The {word} of") | llm
    words = [{"word": word} for word in ("value", "name", "type", "list")]
    both(pipe, len(words), lambda: chain.batch(words))


def test_stream(pipe: Any, llm: Any) -> None:
    # One prompt with a streamer and LangChain's own criterion, in a thread of LangChain's.
    chunks = both(pipe, 1, lambda: list(llm.stream(TEXTS[1], pipeline_kwargs={"max_new_tokens": 16})))
    assert len(chunks) > 1
    assert "".join(chunks)


def test_a_chat_model() -> None:
    tokenizer = demo_tokenizer("llama")
    pipe = pipeline(
        "text-generation", model=demo_model("llama"), tokenizer=tokenizer, max_new_tokens=12, do_sample=False
    )
    llm = langchain.HuggingFacePipeline(pipeline=pipe)
    chat = langchain.ChatHuggingFace(llm=llm, tokenizer=tokenizer)
    assert both(pipe, 1, lambda: chat.invoke("What is a list?").content)
