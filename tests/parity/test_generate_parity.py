"""`model.generate` enabled equals disabled, token for token, and ran natively."""

from __future__ import annotations

import functools

import pytest
import torch

import hf_paged
from tests.helpers import PAD, left_pad, make_model, native_calls, random_prompts
from tests.parity.equality import TALLY, assert_equal_output, seeded_generate
from tests.parity.grid import VARIANTS, Case, cases, every_option_alone, every_variant

BLOCK = 4


@functools.lru_cache(maxsize=64)
def plain_model(family: str, variant: str):
    return make_model(family, **VARIANTS[family][variant])


def pool_bytes(model, num_blocks: int) -> int:
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * layers * kv_heads * head_dim * 4 * BLOCK * num_blocks


def check(case: Case) -> None:
    plain = plain_model(case.family, case.variant)
    enabled = make_model(case.family, **VARIANTS[case.family][case.variant])
    kwargs = left_pad(random_prompts(case.lengths, seed=case.seed), PAD) | case.kwargs
    expected = seeded_generate(plain, case.seed, **kwargs)
    state = torch.get_rng_state()
    options = {}
    if case.pool == "tight":
        longest = max(case.lengths) + case.kwargs["max_new_tokens"]
        options["kv_cache_memory"] = pool_bytes(plain, -(-longest // BLOCK) + 1)
    with hf_paged.enabled(enabled, block_size=BLOCK, fallback="error", **options), native_calls(enabled):
        actual = seeded_generate(enabled, case.seed, **kwargs)
        assert_equal_output(plain, kwargs, case.seed, expected, actual)
        if torch.equal(expected, actual):
            assert torch.equal(torch.get_rng_state(), state), (
                "the global generator stands elsewhere than after upstream"
            )


def check_all(several: list[Case]) -> None:
    for case in several:
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error


def test_random_cases(parity_seed):
    """A sub-grid that rotates with the printed seed."""
    check_all(cases(parity_seed, 60))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_cases(part):
    check_all(cases(1000 + part, 60))


@pytest.mark.parametrize("case", every_variant(), ids=str)
def test_every_variant(case):
    check(case)


def test_every_option_alone(parity_seed):
    """A third of the options, by the seed; all of them in the full set."""
    check_all(every_option_alone()[parity_seed % 3 :: 3])


@pytest.mark.slow
@pytest.mark.parametrize("case", every_option_alone(), ids=str)
def test_every_option_alone_in_full(case):
    check(case)


@pytest.mark.parametrize("family", VARIANTS)
def test_two_calls_after_one_seed(family):
    plain, enabled = plain_model(family, next(iter(VARIANTS[family]))), make_model(family)
    inputs = left_pad(random_prompts([3, 11, 6]), PAD)
    kwargs = inputs | {"do_sample": True, "max_new_tokens": 9, "pad_token_id": PAD, "top_k": 0}
    torch.manual_seed(3)
    expected = [plain.generate(**kwargs), plain.generate(**kwargs), torch.rand(3)]
    with hf_paged.enabled(enabled, fallback="error"), native_calls(enabled, 2):
        torch.manual_seed(3)
        actual = [enabled.generate(**kwargs), enabled.generate(**kwargs), torch.rand(3)]
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


def test_zz_ties_are_rare():
    """Runs last in this file: over all cases of the session."""
    print(f"{TALLY.tokens} tokens compared, {len(TALLY.ties)} ties")
    TALLY.check()
