"""`generate_many`: each prompt as if alone, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import hf_paged
from hf_paged.errors import FallbackError, InvalidRequestError
from tests.helpers import FAMILIES, demo_model, demo_tokenizer, make_model, native_calls, random_prompts

PROMPTS = random_prompts([3, 17, 1, 5, 5, 40, 2, 9])


@pytest.fixture
def model() -> Iterator[Any]:
    model = make_model("llama")
    hf_paged.enable(model, block_size=4, backend="reference", fallback="silent", kv_cache_memory="4MiB")
    yield model
    hf_paged.disable(model)


def alone(model: Any, prompt: list[int], **kwargs: Any) -> list[int]:
    """The new tokens of `generate` for one prompt."""
    return model.generate(torch.tensor([prompt]), **kwargs)[0, len(prompt) :].tolist()


def tokens(results: list[Any]) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"min_new_tokens": 5, "eos_token_id": list(range(3, 40))},
        {"max_length": 45, "max_new_tokens": None, "forced_eos_token_id": 1},
        {"exponential_decay_length_penalty": (2, 1.5), "begin_suppress_tokens": [7, 8]},
        {"min_length": 20, "suppress_tokens": [9], "eos_token_id": list(range(3, 40))},
    ],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_greedy_equals_one_by_one(family: str, options: dict[str, Any]) -> None:
    plain, model = make_model(family), make_model(family)
    kwargs = {"max_new_tokens": 12} | options
    expected = [alone(plain, prompt, **kwargs) for prompt in PROMPTS]
    with hf_paged.enabled(model, block_size=4, backend="reference", kv_cache_memory="4MiB"):
        with native_calls(model, len(PROMPTS)):
            results = hf_paged.generate_many(model, PROMPTS, **kwargs)
    assert tokens(results) == expected
    assert [result.prompt_length for result in results] == [len(prompt) for prompt in PROMPTS]
    assert all(result.error is None for result in results)


def test_a_pool_under_pressure_gives_the_same_tokens() -> None:
    plain, model = make_model("gpt2"), make_model("gpt2")
    expected = [alone(plain, prompt, max_new_tokens=12) for prompt in PROMPTS]
    block = 2 * 2 * 48 * 4 * 4
    with hf_paged.enabled(model, block_size=4, backend="reference", kv_cache_memory=16 * block):
        assert tokens(hf_paged.generate_many(model, PROMPTS, max_new_tokens=12)) == expected
        assert hf_paged.stats(model).preemptions > 0


def test_prompts_may_be_tensors_arrays_or_lists(model: Any) -> None:
    expected = tokens(hf_paged.generate_many(model, PROMPTS[:3], max_new_tokens=4))
    mixed = [torch.tensor(PROMPTS[0]), np.array(PROMPTS[1]), tuple(PROMPTS[2])]
    assert tokens(hf_paged.generate_many(model, mixed, max_new_tokens=4)) == expected


def test_samples_depend_on_seed_and_place_only(model: Any) -> None:
    kwargs = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.5}

    def run(prompts: list[list[int]], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return tokens(hf_paged.generate_many(model, prompts, **kwargs))

    together = run(PROMPTS, 0)
    assert run(PROMPTS, 0) == together
    assert run(PROMPTS, 1) != together
    assert run(PROMPTS[:3], 0) == together[:3]
    torch.manual_seed(0)
    first = hf_paged.generate_many(model, PROMPTS, **kwargs)
    assert tokens(hf_paged.generate_many(model, PROMPTS, **kwargs)) != tokens(first), (
        "a second run draws a new seed"
    )


def test_equal_prompts_are_sampled_apart(model: Any) -> None:
    results = hf_paged.generate_many(
        model, [PROMPTS[1]] * 4, max_new_tokens=10, do_sample=True, temperature=2.0
    )
    assert len({tuple(result.token_ids) for result in results}) == 4


def test_greedy_leaves_the_global_generator_alone(model: Any) -> None:
    state = torch.get_rng_state()
    hf_paged.generate_many(model, PROMPTS, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_config_a_prompt(model: Any) -> None:
    plain = make_model("llama")
    configs = [
        GenerationConfig(max_new_tokens=n, repetition_penalty=p) for n, p in ((3, 1.0), (7, 1.4), (5, 1.0))
    ]
    results = hf_paged.generate_many(model, PROMPTS[:3], generation_config=configs)
    expected = [alone(plain, p, generation_config=c) for p, c in zip(PROMPTS, configs, strict=False)]
    assert tokens(results) == expected
    assert [result.finish_reason for result in results] == ["length"] * 3


def test_finish_reasons_and_stop_strings_on_text() -> None:
    plain, model, tokenizer = demo_model("gpt2"), demo_model("gpt2"), demo_tokenizer("gpt2")
    prompts = [tokenizer(text)["input_ids"] for text in ("def __init__(self", "import", "The value of")]
    kwargs = {"max_new_tokens": 25, "stop_strings": ["\n", "self"], "tokenizer": tokenizer}
    expected = [alone(plain, prompt, **kwargs) for prompt in prompts]
    with hf_paged.enabled(model, backend="reference"):
        results = hf_paged.generate_many(model, prompts, **kwargs)
    assert tokens(results) == expected
    assert [r.finish_reason for r in results] == ["length" if len(t) == 25 else "stop" for t in expected]
    assert "stop" in [r.finish_reason for r in results]


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_native_runs_on_the_original(model: Any) -> None:
    plain = make_model("llama")
    configs = [GenerationConfig(max_new_tokens=6, use_cache=cached) for cached in (True, False, True, False)]
    results = hf_paged.generate_many(model, PROMPTS[:4], generation_config=configs)
    expected = [alone(plain, p, generation_config=c) for p, c in zip(PROMPTS, configs, strict=False)]
    assert tokens(results) == expected
    stats = hf_paged.stats(model)
    assert stats.native_calls == 2
    assert stats.fallback_calls == {"use_cache": 2}
    state = torch.get_rng_state()
    hf_paged.generate_many(model, PROMPTS[:1], max_new_tokens=3, use_cache=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_error_mode_refuses_before_anything_runs() -> None:
    model = make_model("llama")
    configs = [GenerationConfig(max_new_tokens=6, use_cache=cached) for cached in (True, False)]
    with hf_paged.enabled(model, backend="reference", fallback="error"):
        with pytest.raises(FallbackError, match=r"inputs\[1\].*use_cache"):
            hf_paged.generate_many(model, PROMPTS[:2], generation_config=configs)
        assert hf_paged.stats(model).requests == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "bad, kwargs, message",
    [
        ([], {}, "empty"),
        ([5, 128], {}, "128 is outside"),
        ([5, -1], {}, "-1 is outside"),
        ("text", {}, "text"),
        ([5, 6.5], {}, "flat list"),
        ([[5, 6]], {}, "flat list"),
        (7, {}, "flat list"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens"),
        ([5], {"temperature": -1.0, "do_sample": True}, "temperature"),
        ([5], {"max_new_tokns": 3}, "max_new_tokns"),
        ([5], {"num_return_sequences": 2, "do_sample": True}, "several times"),
        ([5], {"max_new_tokens": 100_000}, "room for"),
        ([5] * 200, {"max_length": 100, "max_new_tokens": None}, "max_length"),
    ],
)
def test_all_is_validated_before_anything_runs(
    bad: Any, kwargs: dict[str, Any], message: str, model: Any
) -> None:
    prompts = [[5, 6], [7], bad] if not kwargs else [bad]
    with pytest.raises(InvalidRequestError, match=rf"inputs\[{len(prompts) - 1}\]: .*{message}"):
        hf_paged.generate_many(model, prompts, **({"max_new_tokens": 3} | kwargs))
    assert hf_paged.stats(model).requests == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"attention_mask": torch.ones(1, 2)},
        {"input_ids": [[5]]},
        {"output_scores": True},
        {"return_dict_in_generate": True},
        {"adapters": "one"},
        {"generation_config": [GenerationConfig(), GenerationConfig()]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_without_a_meaning_here_are_refused(kwargs: dict[str, Any], model: Any) -> None:
    with pytest.raises(InvalidRequestError):
        hf_paged.generate_many(model, [[5]], **kwargs)


def test_nothing_for_nothing(model: Any) -> None:
    assert hf_paged.generate_many(model, []) == []


def test_a_failure_is_its_requests_own(model: Any) -> None:
    # Upstream looks at the ids of a bias only when it is first applied.
    broken = GenerationConfig(max_new_tokens=6, sequence_bias=[[[10**6], 1.0]])
    configs = [GenerationConfig(max_new_tokens=6, sequence_bias=[[[7], 1.0]]) for _ in range(3)]
    configs[1] = broken
    results = hf_paged.generate_many(model, PROMPTS[:3], generation_config=configs)
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert isinstance(results[1].error, ValueError)
    assert results[1].token_ids == []
    assert len(results[0].token_ids) == len(results[2].token_ids) == 6


def test_metrics_and_progress(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results = hf_paged.generate_many(model, PROMPTS, max_new_tokens=3, progress=True)
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err
    for result in results:
        metrics = result.metrics
        assert 0 <= metrics.queued <= metrics.time_to_first_token <= metrics.total
