"""/v1/completions: texts are those of `generate`, cut where they stop, the same streamed and whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

import hf_paged
from tests.helpers import native_calls
from tests.server.support import events

PROMPTS = ("The list of", "import os", "class Shape:\n    def", "An object that")


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(client: httpx.Client, **body: Any) -> str:
    (choice,) = complete(client, **body)["choices"]
    return choice["text"]


def generated(llama: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    """What transformers' own loop says: the model is not enabled meanwhile."""
    inputs = tokenizer(prompt, return_tensors="pt")
    plain = type(llama).generate(llama, **inputs, do_sample=False, custom_generate=None, **options)
    return tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def streamed(client: httpx.Client, **body: Any) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """The texts by choice, and all chunks."""
    response = client.post("/v1/completions", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    texts: dict[int, str] = {}
    for chunk in parsed:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts, parsed


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_generate(
    client: httpx.Client, llama: Any, tokenizer: Any, prompt: str
) -> None:
    expected = generated(llama, tokenizer, prompt, max_new_tokens=40)
    with native_calls(llama):
        assert text_of(client, prompt=prompt, max_tokens=40, temperature=0) == expected


def test_texts_are_the_same_when_many_run_at_once(client: httpx.Client, llama: Any, tokenizer: Any) -> None:
    alone = [text_of(client, prompt=p, max_tokens=24, temperature=0) for p in PROMPTS]
    with native_calls(llama, 24), ThreadPoolExecutor(8) as threads:
        together = list(
            threads.map(lambda p: text_of(client, prompt=p, max_tokens=24, temperature=0), PROMPTS * 6)
        )
    assert together == alone * 6


def test_a_seed_gives_the_same_text_alone_and_under_load(client: httpx.Client) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0.9, "top_p": 0.95}
    alone = {seed: text_of(client, seed=seed, **body) for seed in range(4)}
    assert len(set(alone.values())) > 1
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda seed: (seed, text_of(client, seed=seed, **body)), [*range(4)] * 5))
    assert all(text == alone[seed] for seed, text in together)


def test_without_a_seed_texts_differ(client: httpx.Client) -> None:
    texts = {text_of(client, prompt=PROMPTS[0], max_tokens=16, temperature=1.5) for _ in range(4)}
    assert len(texts) > 1


def test_the_global_generator_is_left_alone(client: httpx.Client) -> None:
    before = torch.get_rng_state()
    text_of(client, prompt=PROMPTS[0], max_tokens=4)
    text_of(client, prompt=PROMPTS[0], max_tokens=4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_choices_of_several_prompts_lie_side_by_side(client: httpx.Client) -> None:
    answer = complete(client, prompt=list(PROMPTS[:2]), n=3, max_tokens=12, seed=5, temperature=1)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len(set(texts)) > 2
    first = complete(client, prompt=PROMPTS[0], n=3, max_tokens=12, seed=5, temperature=1)
    assert [choice["text"] for choice in first["choices"]] == texts[:3]
    # The first choice is that of a request for one.
    assert text_of(client, prompt=PROMPTS[0], max_tokens=12, seed=5, temperature=1) == texts[0]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [None, ["\n", "is"]])
def test_streamed_and_whole_texts_are_the_same(client: httpx.Client, n: int, stop: Any) -> None:
    body = {"prompt": PROMPTS[2], "n": n, "max_tokens": 32, "seed": 1, "temperature": 0.8, "stop": stop}
    whole = complete(client, **body)
    texts, chunks = streamed(client, **body, stream_options={"include_usage": True})
    assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
    *parts, last = chunks
    assert all(chunk["usage"] is None for chunk in parts)
    assert last["choices"] == []
    assert last["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {"prompt_tokens_details": None}
    ends = {c["index"]: c["finish_reason"] for chunk in parts for c in chunk["choices"] if c["finish_reason"]}
    assert ends == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert whole["object"] == "text_completion"


def test_a_text_stops_at_the_first_stop_string(client: httpx.Client) -> None:
    full = text_of(client, prompt=PROMPTS[0], max_tokens=40, temperature=0)
    # Characters from the middle: they begin and end inside of tokens.
    stop = full[9:14]
    (choice,) = complete(client, prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=stop)["choices"]
    assert choice["text"] == full[: full.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    (choice,) = complete(
        client, prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=[stop], include_stop_str_in_output=True
    )["choices"]
    assert choice["text"] == full[: full.index(stop) + len(stop)]


def test_a_stop_string_that_looks_like_a_pattern_is_text(client: httpx.Client) -> None:
    full = text_of(client, prompt=PROMPTS[0], max_tokens=24, temperature=0)
    for stop in (".*", "[a-z]+", "(", "\\w"):
        if stop not in full:
            body = {"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "stop": stop}
            assert text_of(client, **body) == full


def test_stop_tokens_end_the_text_and_are_not_shown(client: httpx.Client, tokenizer: Any) -> None:
    answer = complete(client, prompt=PROMPTS[0], max_tokens=24, temperature=0, logprobs=0)
    (choice,) = answer["choices"]
    ids = tokenizer.encode(choice["text"])[-1:]
    (stopped,) = complete(client, prompt=PROMPTS[0], max_tokens=24, temperature=0, stop_token_ids=ids)[
        "choices"
    ]
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == ids[0]
    assert choice["text"].startswith(stopped["text"])
    assert len(stopped["text"]) < len(choice["text"])


def test_the_end_of_sequence_ends_the_text_unless_it_is_ignored(
    client: httpx.Client, llama: Any, tokenizer: Any
) -> None:
    eos = llama.generation_config.eos_token_id
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "logit_bias": {str(eos): 100}}
    (choice,) = complete(client, **body)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    ignoring = complete(client, **body, ignore_eos=True)
    assert ignoring["choices"][0]["finish_reason"] == "length"
    assert ignoring["usage"]["completion_tokens"] == 12
    later = complete(client, **body, min_tokens=5)
    assert later["usage"]["completion_tokens"] == 6
    shown = complete(client, **body, ignore_eos=True, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == tokenizer.decode([eos]) * 12


def test_logprobs_are_the_models(client: httpx.Client, llama: Any, tokenizer: Any) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0.5, "top_k": 4, "seed": 2, "logprobs": 3}
    (choice,) = complete(client, **body)["choices"]
    table = choice["logprobs"]
    assert "".join(table["tokens"]) == choice["text"]
    assert table["text_offset"] == [len("".join(table["tokens"][:i])) for i in range(8)]
    prompt = tokenizer.encode(PROMPTS[0])
    ids = tokenizer.encode(PROMPTS[0] + choice["text"])[len(prompt) :]
    if [tokenizer.decode([i]) for i in ids] == table["tokens"]:  # else it would be split otherwise
        with torch.no_grad():
            logits = llama(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).flatten()
        assert table["token_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(3 <= len(top) <= 4 for top in table["top_logprobs"])


def test_streamed_logprobs_are_those_of_the_whole(client: httpx.Client) -> None:
    body = {"prompt": PROMPTS[1], "max_tokens": 20, "temperature": 0, "logprobs": 2, "stop": ["zz", "qq"]}
    whole = complete(client, **body)["choices"][0]["logprobs"]
    _, chunks = streamed(client, **body)
    for key in whole:
        parts = [chunk["choices"][0]["logprobs"][key] for chunk in chunks]
        joined = [value for part in parts for value in part]
        assert joined == (pytest.approx(whole[key], abs=1e-4) if key == "token_logprobs" else joined)
        assert len(joined) == len(whole[key])


def test_the_best_of_several_has_the_highest_mean_logprob(client: httpx.Client) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 10, "temperature": 1.2, "seed": 4, "logprobs": 0}
    every = complete(client, **body, n=5)["choices"]

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = complete(client, **body, n=2, best_of=5)
    expected = sorted(every, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in expected]
    assert best["usage"]["completion_tokens"] == 50


def test_echo_gives_the_prompt_back(client: httpx.Client) -> None:
    plain = text_of(client, prompt=PROMPTS[0], max_tokens=6, temperature=0)
    assert text_of(client, prompt=PROMPTS[0], max_tokens=6, temperature=0, echo=True) == PROMPTS[0] + plain
    texts, _ = streamed(client, prompt=PROMPTS[0], max_tokens=6, temperature=0, echo=True)
    assert texts == {0: PROMPTS[0] + plain}


def test_prompts_may_be_token_ids(client: httpx.Client, tokenizer: Any) -> None:
    ids = [tokenizer.encode(p) for p in PROMPTS[:2]]
    texts = [text_of(client, prompt=p, max_tokens=8, temperature=0) for p in PROMPTS[:2]]
    assert text_of(client, prompt=ids[0], max_tokens=8, temperature=0) == texts[0]
    answer = complete(client, prompt=ids, max_tokens=8, temperature=0)
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    cut = complete(client, prompt=PROMPTS[2], max_tokens=8, temperature=0, truncate_prompt_tokens=3)
    assert cut["usage"]["prompt_tokens"] == 3


def test_defaults_are_openais(client: httpx.Client) -> None:
    answer = complete(client, prompt=PROMPTS[0], ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["model"] == "demo"


def test_cached_prompt_tokens_are_told(client: httpx.Client) -> None:
    prompt = "A prompt that nobody else begins with, long enough for several blocks of the cache. " * 2
    first = complete(client, prompt=prompt, max_tokens=2)["usage"]
    again = complete(client, prompt=prompt, max_tokens=2)["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["prompt_tokens_details"]["cached_tokens"] >= again["prompt_tokens"] // 2
    # Another salt finds nothing.
    salted = complete(client, prompt=prompt, max_tokens=2, cache_salt="other")["usage"]
    assert salted["prompt_tokens_details"] == {"cached_tokens": 0}


def test_penalties_and_biases_change_the_logits_as_openai_says(
    client: httpx.Client, llama: Any, tokenizer: Any
) -> None:
    prompt, steps = tokenizer.encode(PROMPTS[0]), 12
    bias = {str(prompt[-1]): 3.5, "17": -100}
    presence, frequency = 0.7, 1.1
    ids: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = llama(torch.tensor([prompt + ids])).logits[0, -1]
        for token, value in bias.items():
            logits[int(token)] += value
        for token in set(ids):
            logits[token] -= presence + frequency * ids.count(token)
        ids.append(int(logits.argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    body = {
        "prompt": PROMPTS[0],
        "max_tokens": steps,
        "temperature": 0,
        "logit_bias": bias,
        "ignore_eos": True,
    }
    assert text_of(client, **body, **penalties) == expected


def test_only_allowed_tokens_come(client: httpx.Client, tokenizer: Any) -> None:
    allowed = tokenizer.encode("list of names", add_special_tokens=False)
    body = {"prompt": PROMPTS[0], "max_tokens": 20, "temperature": 1.5, "logprobs": 0}
    (choice,) = complete(client, **body, allowed_token_ids=allowed)["choices"]
    assert set(choice["logprobs"]["tokens"]) <= {tokenizer.decode([i]) for i in allowed}


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3}, {"repetition_penalty": 1.3, "min_tokens": 20}],
)
def test_transformers_own_options_are_its_own(
    client: httpx.Client, llama: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    renamed = {"min_new_tokens" if k == "min_tokens" else k: v for k, v in options.items()}
    expected = generated(llama, tokenizer, PROMPTS[3], max_new_tokens=24, **renamed)
    assert text_of(client, prompt=PROMPTS[3], max_tokens=24, temperature=0, **options) == expected


def test_samples_are_those_of_submit(client: httpx.Client, llama: Any, tokenizer: Any) -> None:
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    handle = hf_paged.engine(llama).submit(
        tokenizer.encode(PROMPTS[1]), seed=11, do_sample=True, max_new_tokens=20, **options
    )
    expected = tokenizer.decode(handle.result().token_ids, skip_special_tokens=True)
    assert text_of(client, prompt=PROMPTS[1], seed=11, max_tokens=20, **options) == expected
