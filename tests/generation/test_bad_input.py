"""Bad input ends as it does without hf_paged, by the same error or the same tokens, and the engine works on
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_paged
from hf_paged.engine import registry
from tests.helpers import MAX_POSITIONS, VOCAB_SIZE, left_pad, make_model, native_calls, random_prompts

BATCH = left_pad(random_prompts([3, 7]))
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]
NAN, INF, HUGE = math.nan, math.inf, 10**9

NUMBERS: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, HUGE, 2.5, NAN, INF, "3"],
    "max_length": [0, -1, 7, 6, HUGE, NAN],
    "min_length": [-1, HUGE, NAN, INF],
    "min_new_tokens": [-1, HUGE, 2.5],
    "max_time": [0.0, -1.0, NAN, HUGE],
    "temperature": [0.0, -1.0, NAN, INF, 1e-30, 1e30],
    "top_k": [-1, 0, HUGE, 1.5],
    "top_p": [-0.1, 0.0, 2.0, NAN, INF],
    "min_p": [-0.1, 0.0, 1.0, 2.0, NAN],
    "top_h": [-0.1, 0.0, 2.0, NAN],
    "typical_p": [-0.1, 0.0, 2.0, NAN],
    "epsilon_cutoff": [-0.1, 2.0, NAN, 0.999],
    "eta_cutoff": [-0.1, 2.0, NAN, 0.999],
    "repetition_penalty": [0.0, -1.0, NAN, INF, 1e30],
    "encoder_repetition_penalty": [0.0, -1.0, NAN, INF],
    "no_repeat_ngram_size": [-1, HUGE, 1],
    "num_return_sequences": [0, -1],
    "num_beams": [0, -1],
    "eos_token_id": [-1, HUGE, 2.5, []],
    "pad_token_id": [-1, HUGE],
    "bad_words_ids": [[], [[]], [[-1]], [[HUGE]]],
    "suppress_tokens": [[-1], [HUGE], []],
    "forced_eos_token_id": [-1, HUGE],
    "sequence_bias": [{}, {(5,): NAN}, {(HUGE,): 1.0}],
    "exponential_decay_length_penalty": [(-1, 1.0), (1, NAN), (1, -1.0)],
    "guidance_scale": [NAN],
    "prefill_chunk_size": [-1, 0],
}


class Raising(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("user code")


class RaisingCriterion(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        raise KeyError("user code")


def raise_key_error(row: int, ids: torch.Tensor) -> list[int]:
    raise KeyError("user code")


INPUTS: dict[str, dict[str, Any]] = {
    "a prompt longer than the positions": {"input_ids": torch.full((1, MAX_POSITIONS + 5), 7)},
    "a prompt that fills the positions": {"input_ids": torch.full((1, MAX_POSITIONS), 7)},
    "more new tokens than positions": {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 200},
    "an empty prompt": {"input_ids": torch.empty((1, 0), dtype=torch.long)},
    "no row": {"input_ids": torch.empty((0, 3), dtype=torch.long)},
    "an id above the vocabulary": {"input_ids": torch.tensor([[5, VOCAB_SIZE]])},
    "a negative id": {"input_ids": torch.tensor([[5, -1]])},
    "an id outside under a pad": {
        "input_ids": torch.tensor([[-100, 5], [6, 7]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
    },
    "float ids": {"input_ids": IDS.float()},
    "bool ids": {"input_ids": IDS > 5},
    "one dimension": {"input_ids": IDS[0]},
    "three dimensions": {"input_ids": IDS[None]},
    "a list": {"input_ids": [[5, 6]]},
    "text": {"input_ids": "text"},
    "right padding": {"input_ids": IDS.flip(-1), "attention_mask": MASK.flip(-1)},
    "a hole in the mask": {
        "input_ids": IDS,
        "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1]]).expand(2, -1),
    },
    "a mask of zeros": {"input_ids": IDS, "attention_mask": torch.zeros_like(MASK)},
    "a mask of twos": {"input_ids": IDS, "attention_mask": MASK * 2},
    "a float mask": {"input_ids": IDS, "attention_mask": MASK.float()},
    "a bool mask": {"input_ids": IDS, "attention_mask": MASK.bool()},
    "a mask of NaN": {"input_ids": IDS, "attention_mask": MASK * NAN},
    "a short mask": {"input_ids": IDS, "attention_mask": MASK[:, 1:]},
    "a mask of one row": {"input_ids": IDS, "attention_mask": MASK[1:]},
    "a mask of four dimensions": {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 7, 7)},
    "a typo": {**BATCH, "max_new_tokns": 3},
    "inputs twice": {**BATCH, "inputs": IDS},
    "copies without sampling": {**BATCH, "num_return_sequences": 2},
    "stop strings without a tokenizer": {**BATCH, "stop_strings": ["x"]},
    "an unknown cache": {**BATCH, "cache_implementation": "imaginary"},
    "a processor that raises": {**BATCH, "logits_processor": LogitsProcessorList([Raising()])},
    "a criterion that raises": {**BATCH, "stopping_criteria": StoppingCriteriaList([RaisingCriterion()])},
    "a prefix function that raises": {**BATCH, "prefix_allowed_tokens_fn": raise_key_error},
}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    plain, model = make_model("gpt2"), make_model("gpt2")
    hf_paged.enable(model, block_size=4, backend="reference", fallback="silent", kv_cache_memory="1MiB")
    yield plain, model
    hf_paged.disable(model)


def outcome(model: Any, **kwargs: Any) -> Any:
    """The tokens, or the type and text of the error."""
    torch.manual_seed(0)
    try:
        tokens = model.generate(**({"max_new_tokens": 4} | kwargs))
    except Exception as error:
        return type(error), str(error)
    return tokens.tolist()


def check(pair: tuple[Any, Any], **kwargs: Any) -> None:
    plain, model = pair
    expected, actual = outcome(plain, **kwargs), outcome(model, **kwargs)
    assert actual == expected
    registry.get(model).check_integrity()
    assert hf_paged.stats(model).kv_blocks_used == 0
    with native_calls(model):
        assert outcome(model, **BATCH) == outcome(plain, **BATCH)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name, value", [(n, v) for n, values in NUMBERS.items() for v in values])
def test_a_number_that_makes_no_sense(name: str, value: Any, do_sample: bool, pair: tuple[Any, Any]) -> None:
    length = {"max_new_tokens": None} if name == "max_length" else {}
    check(pair, **{**BATCH, "do_sample": do_sample, **length, name: value})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_makes_no_sense(name: str, pair: tuple[Any, Any]) -> None:
    check(pair, **INPUTS[name])


def test_weights_that_are_not_numbers(pair: tuple[Any, Any]) -> None:
    plain, model = make_model("llama"), make_model("llama")
    for broken in (plain, model):
        with torch.no_grad():
            broken.lm_head.weight[3] = NAN
    with hf_paged.enabled(model, backend="reference", fallback="error"), native_calls(model, 3):
        for options in ({}, {"do_sample": True}, {"do_sample": True, "remove_invalid_values": True}):
            assert outcome(model, **BATCH, **options) == outcome(plain, **BATCH, **options)
        assert hf_paged.stats(model).kv_blocks_used == 0


def test_a_pool_that_cannot_hold_one_request() -> None:
    plain, model = make_model("llama"), make_model("llama")
    tiny = 2 * 2 * 2 * 16 * 4 * 4  # one block of four tokens
    with hf_paged.enabled(model, block_size=4, backend="reference", fallback="silent", kv_cache_memory=tiny):
        assert outcome(model, **BATCH) == outcome(plain, **BATCH)
        assert hf_paged.stats(model).fallback_calls == {"kv_budget": 1}
        with pytest.raises(hf_paged.InvalidRequestError, match=r"inputs\[0\].*room for 4"):
            hf_paged.generate_many(model, [[5, 6, 7]], max_new_tokens=4)
