"""The streaming handler of chat apps (gradio's documentation has it): a thread, a TextIteratorStreamer, a generator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

import hf_paged
from tests.helpers import demo_model, demo_tokenizer, native_calls

pytestmark = pytest.mark.clients

QUESTIONS = ["What is a list?", "How do I import?", "Why?", "What is the value of an object?"]


class StopOnTokens(StoppingCriteria):
    """As in the examples of chat apps: looks at the first row only."""

    def __init__(self, stop_ids: list[int]) -> None:
        self.stop_ids = stop_ids

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        return any(bool(input_ids[0][-1] == stop_id) for stop_id in self.stop_ids)


class App:
    """A model, its tokenizer and the handler that an app calls for each message."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.threads: list[threading.Thread] = []

    def predict(self, message: str, history: list[dict[str, str]]) -> Iterator[str]:
        messages = [*history, {"role": "user", "content": message}]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextIteratorStreamer(
            self.tokenizer, timeout=60.0, skip_prompt=True, skip_special_tokens=True
        )
        options = {
            **inputs,
            "streamer": streamer,
            "max_new_tokens": 32,
            "do_sample": False,
            "stopping_criteria": StoppingCriteriaList([StopOnTokens([self.tokenizer.eos_token_id])]),
        }
        thread = threading.Thread(target=self.model.generate, kwargs=options)
        self.threads.append(thread)
        thread.start()
        partial = ""
        for text in streamer:
            partial += text
            yield partial


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return demo_tokenizer("llama")


def answers(model: Any, tokenizer: Any, workers: int) -> list[list[str]]:
    """All that the app showed for each question, `workers` users at once."""
    app = App(model, tokenizer)
    with ThreadPoolExecutor(workers) as pool:
        shown = list(pool.map(lambda question: list(app.predict(question, [])), QUESTIONS))
    for thread in app.threads:
        thread.join()
    return shown


def test_users_at_once_see_what_each_would_see_alone(tokenizer: Any) -> None:
    model = demo_model("llama")
    expected = answers(model, tokenizer, 1)
    assert all(len(shown) > 2 for shown in expected)
    with hf_paged.enabled(model, fallback="error"), native_calls(model, len(QUESTIONS)):
        assert answers(model, tokenizer, len(QUESTIONS)) == expected
        assert hf_paged.stats(model).peak_running > 1


def test_a_conversation_goes_on(tokenizer: Any) -> None:
    def talk(model: Any) -> list[str]:
        app, history = App(model, tokenizer), []
        for question in QUESTIONS[:2]:
            *_, answer = app.predict(question, history)
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for thread in app.threads:
            thread.join()
        return [entry["content"] for entry in history]

    model = demo_model("llama")
    expected = talk(model)
    with hf_paged.enabled(model, fallback="error"), native_calls(model, 2):
        assert talk(model) == expected
