"""Beams beside other traffic, in `generate_many` and `submit`, and when something goes wrong."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor

import hf_paged
from hf_paged.generation.fallback import HfPagedFallbackWarning
from tests.helpers import (
    FAMILIES,
    assert_same_tokens,
    check_engines,
    demo_model,
    demo_tokenizer,
    left_pad,
    make_model,
    native_calls,
    random_prompts,
)

PROMPTS = random_prompts([5, 19, 2, 33])
BEAMS = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": [1, *range(40, 50)], "pad_token_id": 2}


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    plain, model = make_model(request.param), make_model(request.param)
    hf_paged.enable(model, block_size=4, fallback="error", kv_cache_memory="1MiB")
    yield plain, model
    hf_paged.disable(model)


def alone(plain: Any, prompt: list[int], **kwargs: Any) -> list[list[int]]:
    """New tokens of each returned beam, cut after their end."""
    output = plain.generate(
        torch.tensor([prompt]), **BEAMS, **kwargs, return_dict_in_generate=True, output_scores=True
    )
    lengths = (output.beam_indices >= 0).sum(dim=1).tolist()
    return [
        row[len(prompt) : len(prompt) + n].tolist() for row, n in zip(output.sequences, lengths, strict=True)
    ]


def test_generate_many_gives_the_best_beams_of_each_prompt(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    with native_calls(model, len(PROMPTS)):
        results = hf_paged.generate_many(model, PROMPTS, **BEAMS, num_return_sequences=2)
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = alone(plain, prompt, num_return_sequences=2)
        assert [beam.token_ids for beam in result.beams] == expected
        assert result.token_ids == expected[0]
        assert result.beams[0].score >= result.beams[1].score
        ends = "stop" if expected[0][-1] in BEAMS["eos_token_id"] else "length"
        assert result.finish_reason == ends


def test_beams_greedy_and_sampled_requests_share_steps(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    single = {"max_new_tokens": 20, "eos_token_id": None}
    engine = hf_paged.engine(model)
    greedy = [engine.submit(p, **single) for p in PROMPTS]
    beams = [engine.submit(p, **BEAMS) for p in PROMPTS]
    sampled = [engine.submit(p, **single, do_sample=True, seed=3) for p in PROMPTS]
    for prompt, handle in zip(PROMPTS, beams, strict=True):
        assert handle.result(60).token_ids == list(handle) == alone(plain, prompt)[0]
    for prompt, handle in zip(PROMPTS, greedy, strict=True):
        expected = plain.generate(torch.tensor([prompt]), **single)[0, len(prompt) :].tolist()
        assert handle.result(60).token_ids == expected
    again = [engine.submit(p, **single, do_sample=True, seed=3).result(60).token_ids for p in PROMPTS]
    assert [h.result(60).token_ids for h in sampled] == again
    assert hf_paged.stats(model).peak_running > 2 * len(PROMPTS)


def test_a_seed_gives_the_same_beams_whatever_else_runs(pair: tuple[Any, Any]) -> None:
    engine = hf_paged.engine(pair[1])
    first = engine.submit(PROMPTS[0], **BEAMS, do_sample=True, seed=5).result(60)
    handles = [engine.submit(p, **BEAMS, do_sample=True, seed=5) for p in (*PROMPTS[1:], PROMPTS[0])]
    last = handles[-1].result(60)
    assert [beam.token_ids for beam in last.beams] == [beam.token_ids for beam in first.beams]
    assert last.beams[0].score == pytest.approx(first.beams[0].score, abs=1e-4)


def test_threads_with_beams_each_get_their_own(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    expected = [plain.generate(torch.tensor([p]), **BEAMS) for p in PROMPTS]
    actual: list[Any] = [None] * len(PROMPTS)

    def run(i: int) -> None:
        actual[i] = model.generate(torch.tensor([PROMPTS[i]]), **BEAMS)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(actual, expected, strict=True):
        assert_same_tokens(got, want)


def test_a_cancelled_group_gives_its_blocks_back(pair: tuple[Any, Any]) -> None:
    model = pair[1]
    handle = hf_paged.engine(model).submit(PROMPTS[3], num_beams=4, max_new_tokens=90, eos_token_id=None)
    handle.cancel()
    with pytest.raises(hf_paged.RequestCancelledError):
        handle.result(60)
    check_engines([hf_paged.engine.registry.get(model)])
    assert hf_paged.stats(model).kv_blocks_used == 0


def test_what_raises_in_one_call_harms_no_other(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    bad = LogitsProcessorList([NoBadWordsLogitsProcessor([[5]])])
    bad[0].sequence_bias = {(10**6,): -1.0}
    bad[0].length_1_bias = torch.zeros(3)
    bad[0].prepared_bias_variables = True
    good = hf_paged.engine(model).submit(PROMPTS[1], **BEAMS)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model.generate(torch.tensor([PROMPTS[0]]), **BEAMS, logits_processor=bad)
    assert good.result(60).token_ids == alone(plain, PROMPTS[1])[0]


def test_the_returned_cache_is_that_of_the_beams_upstream_would_go_on_with(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    batch = left_pad(PROMPTS)
    options = BEAMS | {"eos_token_id": None, "return_dict_in_generate": True}
    expected, actual = plain.generate(**batch, **options), model.generate(**batch, **options)
    assert_same_tokens(actual.sequences, expected.sequences)
    mask = batch["attention_mask"].repeat_interleave(3, 0).bool()
    mask = torch.nn.functional.pad(
        mask, (0, expected.past_key_values.get_seq_length() - mask.shape[1]), value=True
    )
    for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            got, want = (getattr(layer, name).transpose(1, 2)[mask] for layer in (ours, theirs))
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    del actual
    gc.collect()
    assert hf_paged.stats(model).kv_blocks_used == 0


def test_prompts_whose_end_depends_on_others_are_run_by_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens but EOS are forbidden after a while: some prompts are left without a beam before others are done."""
    plain, model = make_model("llama"), make_model("llama")
    allowed = set(BEAMS["eos_token_id"])
    options = BEAMS | {
        "suppress_tokens": [t for t in range(128) if t not in allowed],
        "do_sample": True,
        "top_k": 0,
    }
    batch = left_pad(PROMPTS)
    torch.manual_seed(2)
    expected = plain.generate(**batch, **options)
    state = torch.get_rng_state()
    monkeypatch.setattr("hf_paged.engine.beam_choice._UNTAKEN", float("inf"))  # nothing counts as settled
    with hf_paged.enabled(model):
        torch.manual_seed(2)
        with pytest.warns(HfPagedFallbackWarning, match="beam_search"):
            actual = model.generate(**batch, **options)
        assert hf_paged.stats(model).native_calls == 0
    assert_same_tokens(actual, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_beams_that_can_never_fit_are_refused(pair: tuple[Any, Any]) -> None:
    model = pair[1]
    with pytest.raises(hf_paged.FallbackError, match="max_num_seqs"):
        hf_paged.engine(model).submit(PROMPTS[0], num_beams=257, max_new_tokens=2)
    hf_paged.disable(model)
    hf_paged.enable(model, block_size=4, fallback="error", kv_cache_memory="24KiB")
    with pytest.raises(hf_paged.InvalidRequestError, match="tokens, room for"):
        hf_paged.engine(model).submit(PROMPTS[0], num_beams=100, max_new_tokens=50)
    for extra in ({"logprobs": 2}, {"logits_edit": lambda tokens, logits: None}):
        with pytest.raises(hf_paged.InvalidRequestError, match="single sequences"):
            hf_paged.engine(model).submit([5, 6], num_beams=2, max_new_tokens=2, **extra)


def test_beams_save_the_blocks_they_share() -> None:
    """Lengths of Alpaca, six beams: vLLM's paper saves 37 % and more."""
    model = demo_model("llama")
    ids = demo_tokenizer("llama")("def __init__(self, name, value):\n    self.name = name\n").input_ids[:19]
    with hf_paged.enabled(model, prefix_caching=False, fallback="error"), native_calls(model):
        model.generate(torch.tensor([ids]), num_beams=6, max_new_tokens=58, eos_token_id=None)
        stats = hf_paged.stats(model)
        assert stats.kv_shared >= 0.37
        assert stats.peak_blocks_used < stats.peak_blocks_if_unshared
