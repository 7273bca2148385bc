"""vLLM's `use_beam_search`: the texts of `generate(num_beams=...)`, alone and among others."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.helpers import native_calls
from tests.server.support import Running, error_of
from tests.server.test_limits import SHORT, start

BEAMS: dict[str, Any] = {"prompt": "The list of", "max_tokens": 12, "use_beam_search": True}


def upstream(llama: Any, tokenizer: Any, prompt: str, width: int, n: int, **options: Any) -> list[str]:
    """What transformers' own loop finds."""
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {
        "num_beams": width,
        "num_return_sequences": n,
        "max_new_tokens": 12,
        "do_sample": False,
    } | options
    found = type(llama).generate(llama, **inputs, **options, custom_generate=None)
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "asked, options",
    [
        ({}, {}),
        ({"length_penalty": 2.0}, {"length_penalty": 2.0}),
        ({"length_penalty": -1.0, "early_stopping": True}, {"length_penalty": -1.0, "early_stopping": True}),
        ({"early_stopping": "never", "repetition_penalty": 1.2},) * 2,
    ],
)
def test_texts_are_those_of_generate(
    client: httpx.Client, llama: Any, tokenizer: Any, asked: dict[str, Any], options: dict[str, Any]
) -> None:
    prompts = ["The list of", "import os"]
    expected = [text for prompt in prompts for text in upstream(llama, tokenizer, prompt, 4, 2, **options)]
    with native_calls(llama, 2):
        body = BEAMS | {"prompt": prompts, "n": 2, "best_of": 4} | asked
        answer = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
    ids = tokenizer(prompts)["input_ids"]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] <= 4 * 12


def test_a_search_of_one_beam_is_greedy(client: httpx.Client, llama: Any, tokenizer: Any) -> None:
    (expected,) = upstream(llama, tokenizer, "The list of", 1, 1)
    answer = client.post("/v1/completions", json=BEAMS).json()
    assert [choice["text"] for choice in answer["choices"]] == [expected]
    messages = [{"role": "user", "content": "hello"}]
    asked = {"messages": messages, "max_tokens": 5, "temperature": 0}
    plain, search = (
        client.post("/v1/chat/completions", json=asked | more).json()
        for more in ({}, {"use_beam_search": True})
    )
    assert search["choices"] == plain["choices"]
    assert search["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"] > 0


def test_a_search_ends_at_stop_tokens(client: httpx.Client, llama: Any, tokenizer: Any) -> None:
    (text,) = upstream(llama, tokenizer, "The list of", 3, 1)
    stop = tokenizer(text, add_special_tokens=False)["input_ids"][4]
    expected = upstream(llama, tokenizer, "The list of", 3, 1, eos_token_id=[stop, *eos(llama)])
    body = BEAMS | {"n": 1, "best_of": 3, "stop_token_ids": [stop], "include_stop_str_in_output": True}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == expected[0]
    if choice["finish_reason"] == "stop":
        assert choice["stop_reason"] in (stop, None)


def eos(llama: Any) -> list[int]:
    ids = llama.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def test_chat_searches_too_and_neighbours_are_free(client: httpx.Client, llama: Any, tokenizer: Any) -> None:
    expected = client.post("/v1/completions", json=SHORT).json()["choices"]
    body = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 12}
    body |= {"use_beam_search": True, "n": 3, "temperature": 0}
    prompt = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    own = type(llama).generate(
        llama,
        ids,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        do_sample=False,
        custom_generate=None,
    )
    texts = tokenizer.batch_decode(own[:, ids.shape[1] :], skip_special_tokens=True)
    with ThreadPoolExecutor(6) as threads:
        searches = [threads.submit(client.post, "/v1/chat/completions", json=body) for _ in range(3)]
        others = [threads.submit(client.post, "/v1/completions", json=SHORT) for _ in range(3)]
        for search in searches:
            assert [c["message"]["content"] for c in search.result(60).json()["choices"]] == texts
        assert all(other.result(60).json()["choices"] == expected for other in others)


@pytest.mark.parametrize(
    "field, value",
    [
        ("stream", True),
        ("logprobs", 1),
        ("temperature", 0.5),
        ("top_p", 0.5),
        ("top_k", 5),
        ("stop", "x"),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 1),
        ("echo", True),
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"choice": ["a"]}),
        ("length_penalty", 1e9),
        ("early_stopping", "soon"),
        ("best_of", 129),
        ("use_beam_search", "yes"),
    ],
)
def test_what_beams_cannot_do_is_named(client: httpx.Client, field: str, value: Any) -> None:
    error = error_of(client.post("/v1/completions", json=BEAMS | {"n": 2, field: value}), 400)
    assert (error["param"] or "").startswith(field) or field in error["message"]


def test_its_options_are_of_beam_search_only(client: httpx.Client) -> None:
    for name, value in (("length_penalty", 2.0), ("early_stopping", True), ("early_stopping", "never")):
        assert error_of(client.post("/v1/completions", json=SHORT | {name: value}), 400)["param"] == name
    nothing = {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False}
    assert client.post("/v1/completions", json=SHORT | nothing).is_success


@pytest.mark.parametrize("after", [0.0, 0.005, 0.03, 0.1])
def test_a_client_that_goes_away_from_a_search_leaves_nothing(server: Running, after: float) -> None:
    connection = start(server, BEAMS | {"n": 8, "max_tokens": 400, "ignore_eos": True})
    time.sleep(after)
    connection.close()
    server.wait_until_empty(3)


def test_the_width_counts_as_sequences(server: Running, client: httpx.Client) -> None:
    assert client.post("/v1/completions", json=BEAMS | {"n": 1, "best_of": 128, "max_tokens": 2}).is_success
    assert server.state.runs.admission.sequences == 0
