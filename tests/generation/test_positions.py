"""Calls that may go beyond the learned positions of a model: native, with upstream's result or upstream's error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged.engine import registry
from tests.helpers import check_engines, left_pad, make_model, native_calls, random_prompts

FAMILIES = ("gpt2", "gpt_bigcode")
POSITIONS = 20
PROMPTS = random_prompts([9, 4, 12])
BEYOND = {"max_new_tokens": 60, "do_sample": False}
#: One in so many tokens ends a row.
OFTEN, SELDOM, NEVER = list(range(3, 30)), [7, 8], None


class _Same(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class _Streamer:
    def __init__(self) -> None:
        self.steps: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.steps.append(value.tolist())

    def end(self) -> None:
        self.steps.append("end")


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "max_length": {"max_new_tokens": None, "max_length": 70},
    "sampled": {"do_sample": True, "top_k": 40},
    "copies": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "user code": {"logits_processor": LogitsProcessorList([_Same()])},
    "beams": {"num_beams": 3},
    "beams, early_stopping": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "time": {"max_time": 60.0},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any) -> Iterator[tuple[Any, Any]]:
    plain, model = (make_model(request.param, n_positions=POSITIONS) for _ in range(2))
    hf_paged.enable(model, block_size=4, backend="reference", fallback="error", kv_cache_memory="1MiB")
    yield plain, model
    hf_paged.disable(model)


def outcome(model: Any, **kwargs: Any) -> Any:
    """What a call gave, type and text of what it raised, and a random number drawn after it."""
    torch.manual_seed(3)
    try:
        result = model.generate(**kwargs)
    except Exception as error:
        return type(error), str(error), torch.rand(()).item()
    sequences = result if isinstance(result, torch.Tensor) else result.sequences
    return sequences.tolist(), torch.rand(()).item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eos", [OFTEN, SELDOM, NEVER], ids=["often", "seldom", "never"])
@pytest.mark.parametrize("name", OPTIONS)
def test_as_upstream(name: str, eos: Any, pair: tuple[Any, Any]) -> None:
    plain, model = pair
    calls = [[PROMPTS[0]], PROMPTS, [[5] * POSITIONS], [[5] * (POSITIONS + 1), [6, 7]]]
    for prompts in calls:
        kwargs = left_pad(prompts) | BEYOND | {"eos_token_id": eos} | OPTIONS[name]
        expected = outcome(plain, **kwargs)
        with native_calls(model):
            assert outcome(model, **kwargs) == expected
        assert hf_paged.stats(model).kv_blocks_used == 0
    ended = isinstance(expected[0], list)
    assert not ended, "a prompt beyond the positions ended well"


def test_both_ends_happen(pair: tuple[Any, Any]) -> None:
    """The grid above is worth something: of these calls upstream finishes one and fails one."""
    plain, _ = pair
    batch = left_pad([PROMPTS[0]]) | BEYOND
    assert outcome(plain, **batch, eos_token_id=OFTEN)[0] is not IndexError
    assert outcome(plain, **batch, eos_token_id=NEVER)[0] is IndexError


@pytest.mark.parametrize("drafting", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_stay_within_the_positions(drafting: str, pair: tuple[Any, Any]) -> None:
    plain, model = pair
    value = {"prompt_lookup_num_tokens": 4, "assistant_model": make_model("gpt2", n_positions=64)}[drafting]
    prompt = left_pad([[5, 6, 7, 5, 6, 7]])
    for eos in (OFTEN, NEVER):
        kwargs = prompt | BEYOND | {"eos_token_id": eos}
        expected = outcome(plain, **kwargs)[:-1]
        with native_calls(model):
            assert outcome(model, **kwargs, **{drafting: value})[:-1] == expected


def test_a_stream_has_all_tokens_that_came_before_the_error(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    streams = []
    for one in (plain, model):
        streams.append(_Streamer())
        kwargs = left_pad([PROMPTS[0]]) | BEYOND | {"eos_token_id": None, "streamer": streams[-1]}
        with pytest.raises(IndexError):
            one.generate(**kwargs)
    assert streams[1].steps == [*streams[0].steps, "end"]  # with us an error ends the stream
    assert len(streams[0].steps) == 1 + POSITIONS - len(PROMPTS[0]) + 1


def test_the_error_is_that_of_its_call_alone(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    client = hf_paged.engine(model)
    batch = left_pad([PROMPTS[2]])
    bad = [client.submit(PROMPTS[0], max_new_tokens=60, eos_token_id=None) for _ in range(3)]
    good = [client.submit(PROMPTS[2], max_new_tokens=8, eos_token_id=None) for _ in range(3)]
    expected = plain.generate(**batch, max_new_tokens=8, eos_token_id=None)[0, len(PROMPTS[2]) :].tolist()
    for handle in good:
        assert handle.result().token_ids == expected
    for handle in bad:
        with pytest.raises(IndexError, match="out of range") as raised:
            handle.result()
        assert f"{len(PROMPTS[0])} prompt tokens" in raised.value.__notes__[0]
    check_engines([registry.get(model)])


def test_many_and_submit(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    results = hf_paged.generate_many(model, PROMPTS, max_new_tokens=60, eos_token_id=OFTEN)
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = outcome(plain, **left_pad([prompt]), **BEYOND, eos_token_id=OFTEN)[0]
        if expected is IndexError:
            assert isinstance(result.error, IndexError)
        else:
            assert result.token_ids == expected[0][len(prompt) :]
    with pytest.raises(hf_paged.InvalidRequestError, match=f"21 tokens: the model has {POSITIONS} positions"):
        hf_paged.engine(model).submit([5] * (POSITIONS + 1), max_new_tokens=1)


def test_a_pool_for_the_positions_is_large_enough() -> None:
    """The cache must hold what positions allow, not what was asked for."""
    plain, model = make_model("gpt2", n_positions=POSITIONS), make_model("gpt2", n_positions=POSITIONS)
    bytes_a_token = 2 * 2 * 48 * 4
    memory = bytes_a_token * (POSITIONS + 4)
    with hf_paged.enabled(model, block_size=4, backend="reference", kv_cache_memory=memory):
        kwargs = left_pad([PROMPTS[1]]) | BEYOND | {"eos_token_id": NEVER}
        with native_calls(model):
            assert outcome(model, **kwargs) == outcome(plain, **kwargs)
