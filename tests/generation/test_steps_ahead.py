"""Requests whose steps are planned one ahead of the device come out as those of steps in turn."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine import ahead as ahead_module
from hf_paged.errors import RequestCancelledError
from tests.generation.ahead_runs import ENDS, GREEDY, enabled, engine_of, switched
from tests.helpers import (
    assert_same_tokens,
    demo_model,
    demo_tokenizer,
    make_model,
    native_calls,
    random_prompts,
)
from tests.integrations import peft_models

Outcome = tuple[list[int], Any, Any]


@dataclass
class Asked:
    """A request: what is submitted, and after how many tokens it is cancelled."""

    prompt: list[int]
    options: dict[str, Any]
    cancel_after: int | None = None


def asked(source: random.Random, hosted: bool) -> Asked:
    """Any request; `hosted`: maybe one that keeps the engine in step."""
    shared = random_prompts([9], seed=77)[0]
    prompt = (
        shared[: source.choice([0, 0, 9])]
        + random_prompts([source.randrange(1, 20)], seed=source.random())[0]
    )
    options: dict[str, Any] = {
        "max_new_tokens": source.randrange(1, 25),
        "eos_token_id": source.choice([None, ENDS, ENDS]),
        "do_sample": source.random() < 0.6,
        "priority": source.choice([0, 0, 1]),
    }
    if options["do_sample"]:
        options |= {
            "seed": source.randrange(2**40),
            "temperature": source.choice([0.7, 1.0, 1.6]),
            "top_k": source.choice([0, 5, 40]),
            "top_p": source.choice([1.0, 0.8]),
            "min_p": source.choice([None, 0.05]),
        }
    options["repetition_penalty"] = source.choice([1.0, 1.0, 1.3])
    options["logprobs"] = source.choice([None, None, 0, 2])
    if source.random() < 0.2:
        options["min_new_tokens"] = min(3, options["max_new_tokens"])
    if hosted and source.random() < 0.4:
        options |= source.choice(
            [
                {"no_repeat_ngram_size": 2},
                {"prompt_lookup_num_tokens": 3},
                {"logits_edit": no_edit},
            ]
        )
    return Asked(prompt, options, source.choice([None] * 6 + [1, 4]))


def no_edit(generated: list[int], logits: torch.Tensor) -> None:
    pass


def outcomes(model: Any, requests: list[Asked]) -> list[Outcome]:
    """Tokens, reason and log-probabilities of requests, the last dozen of which come when the others run."""
    client = hf_paged.engine(model)
    handles = [client.submit(r.prompt, **r.options) for r in requests[:-12]]
    next(iter(handles[0]))
    handles += [client.submit(r.prompt, **r.options) for r in requests[-12:]]
    for request, handle in zip(requests, handles, strict=True):
        if request.cancel_after is not None:
            for count, _ in enumerate(handle, 1):
                if count == request.cancel_after:
                    handle.cancel()
                    break
    found: list[Outcome] = []
    for handle in handles:
        try:
            result = handle.result(timeout=60)
        except RequestCancelledError:
            result = handle.partial()
        found.append((result.token_ids, str(result.finish_reason), result.logprobs))
    return found


def probabilities(outcome: Outcome) -> list[float]:
    """In other company the last bits are others."""
    return [p.logprob for p in outcome[2] or ()]


@pytest.mark.parametrize("hosted", [False, True], ids=["plain", "some_in_step"])
@pytest.mark.parametrize("blocks", [None, 16], ids=["ample", "crowded"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_storm_of_requests_comes_out_as_step_by_step(
    monkeypatch: pytest.MonkeyPatch, family: str, blocks: int | None, hosted: bool, parity_seed: int
) -> None:
    source = random.Random(f"{parity_seed} {family} {blocks} {hosted}")
    model = make_model(family)
    requests = [asked(source, hosted and i >= 24) for i in range(36)]
    per_block = 2 * 2 * 4 * (48 if family == "gpt2" else 32) * 4
    options = {} if blocks is None else {"kv_cache_memory": blocks * per_block}
    found, blocks_cached = [], []
    for ahead in (False, True):
        switched(monkeypatch, ahead)
        with enabled(model, **options, max_num_seqs=8), native_calls(model, len(requests)):
            found.append(outcomes(model, requests))
            hf_paged.engine(model)
            engine_of(model).drain()
            stats = hf_paged.stats(model)
            assert stats.kv_blocks_used == 0
            blocks_cached.append(set(engine_of(model)._loop.runtime.manager._by_key))
            assert stats.steps_ahead > 0 if ahead and not hosted else ahead or not stats.steps_ahead
    for request, in_turn, one_ahead in zip(requests, *found, strict=True):
        if request.options["logprobs"] is not None:
            assert len(one_ahead[2]) == len(one_ahead[0])
        if request.cancel_after is None:
            assert one_ahead[:2] == in_turn[:2], request
            assert probabilities(one_ahead) == pytest.approx(probabilities(in_turn), abs=1e-4)
        else:  # who was quicker: the end or the cancellation
            length = min(len(in_turn[0]), len(one_ahead[0]))
            assert one_ahead[0][:length] == in_turn[0][:length]
    if blocks is None and not any(r.cancel_after for r in requests):
        assert blocks_cached[0] == blocks_cached[1]


@pytest.mark.parametrize("patient", [True, False])
def test_texts_that_lose_their_blocks_come_out_the_same(
    monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """Blocks are short before a step: its predecessor's tokens are waited for. Or, to try it, they are not."""
    if not patient:
        monkeypatch.setattr(ahead_module, "_has_room", lambda scheduler: True)
    model, prompts = make_model("llama"), random_prompts([9, 6, 7, 10, 3])
    options = {"max_new_tokens": 24, "do_sample": True, "eos_token_id": ENDS[::4], "top_k": 30}
    found = []
    for ahead in (False, True):
        switched(monkeypatch, ahead)
        with enabled(model, kv_cache_memory=14 * 2048), native_calls(model, len(prompts)):
            torch.manual_seed(0)
            results = hf_paged.generate_many(model, prompts, **options)
            found.append([(r.token_ids, r.finish_reason) for r in results])
            assert hf_paged.stats(model).preemptions > 0
            assert (hf_paged.stats(model).steps_ahead > 0) == ahead
    assert found[0] == found[1]


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "llama"])
def test_texts_end_where_they_end_step_by_step(
    monkeypatch: pytest.MonkeyPatch, family: str, limit: int
) -> None:
    model, prompts = make_model(family), random_prompts([3, 4, 7, 8, 9, 12, 5, 1])
    found = []
    for ahead in (False, True):
        switched(monkeypatch, ahead)
        with enabled(model), native_calls(model, len(prompts)):
            results = hf_paged.generate_many(
                model, prompts, max_new_tokens=limit, do_sample=False, eos_token_id=ENDS
            )
            manager = engine_of(model)._loop.runtime.manager
            found.append(([(r.token_ids, r.finish_reason) for r in results], set(manager._by_key)))
    assert found[0] == found[1]  # the prefixes that are kept, too


def test_stop_strings_end_a_text_a_step_later_with_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo_model("llama"), demo_tokenizer("llama")
    prompts = [tokenizer(t).input_ids for t in ("def read(self", "import os\n", "class Error(", "Return")]
    options = {
        "max_new_tokens": 25,
        "stop_strings": ["\n", "self"],
        "tokenizer": tokenizer,
        "do_sample": False,
    }
    found = []
    for ahead in (False, True):
        switched(monkeypatch, ahead)
        with enabled(model), native_calls(model, len(prompts)):
            results = hf_paged.generate_many(model, prompts, **options)
            found.append([(r.token_ids, r.finish_reason) for r in results])
            assert (hf_paged.stats(model).steps_ahead > 0) == ahead
    assert found[0] == found[1]
    assert "stop" in [reason for _, reason in found[0]]


def test_adapters_of_each_request_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft_models.config("llama")
    model = peft_models.peft_model("llama", {"first": config, "second": config})
    names = ["first", "second", "__base__"] * 3
    prompts = random_prompts([5, 9, 3, 7, 2, 8, 4, 6, 5])
    found = []
    for ahead in (False, True):
        switched(monkeypatch, ahead)
        with enabled(model), native_calls(model, len(names)):
            results = hf_paged.generate_many(
                model, prompts, adapters=names, **GREEDY | {"eos_token_id": ENDS}
            )
            found.append([(r.token_ids, r.finish_reason) for r in results])
            assert (hf_paged.stats(model).steps_ahead > 0) == ahead
    assert found[0] == found[1]


@pytest.mark.parametrize("sampled", [False, True])
def test_generate_draws_what_upstream_draws(monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    """From the global generator step by step: a surplus draw would move it."""
    model, ids = make_model("llama"), torch.tensor(random_prompts([6] * 4))
    options = GREEDY | {"do_sample": sampled, "eos_token_id": ENDS, "pad_token_id": 2, "top_k": 20}
    options |= {} if sampled else {"top_k": None}
    torch.manual_seed(4)
    expected, state = model.generate(ids, **options), torch.get_rng_state()
    switched(monkeypatch, True)
    with enabled(model), native_calls(model):
        torch.manual_seed(4)
        assert_same_tokens(model.generate(ids, **options), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert (hf_paged.stats(model).steps_ahead == 0) == sampled


def test_rows_of_one_prompt_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), torch.tensor(random_prompts([9])).expand(3, -1)
    options = GREEDY | {"num_return_sequences": 2, "do_sample": True}
    torch.manual_seed(1)
    expected = model.generate(ids[:1], **options)
    found = []
    for ahead in (False, True):
        switched(monkeypatch, ahead)
        with enabled(model), native_calls(model, 4):
            torch.manual_seed(1)
            assert_same_tokens(model.generate(ids[:1], **options), expected)
            found.append(hf_paged.generate_many(model, ids.tolist(), **GREEDY))
            assert (hf_paged.stats(model).steps_ahead > 0) == ahead
    assert [r.token_ids for r in found[0]] == [r.token_ids for r in found[1]]


def test_calls_of_other_ambient_states_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a step in inference mode are the input of no step outside of it, but lie beside it in flight."""
    prompts = random_prompts([4, 5, 6, 7])
    found = []
    for ahead in (False, True):
        switched(monkeypatch, ahead)
        with enabled(make_model("llama")) as model, native_calls(model, 4):
            client = hf_paged.engine(model)
            handles = []
            for i, prompt in enumerate(prompts):
                with torch.inference_mode(i % 2 == 0):
                    options = GREEDY | {
                        "do_sample": True,
                        "seed": i,
                        "repetition_penalty": 1.2,
                        "logprobs": 1,
                    }
                    handles.append(client.submit(prompt, **options))
            found.append([h.result(timeout=60).token_ids for h in handles])
            assert (hf_paged.stats(model).steps_ahead > 0) == ahead
    assert found[0] == found[1]
