"""Beam search and beam sampling of an enabled model: sequences, scores and beams are upstream's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput

import hf_paged
from hf_paged.engine.groups import most_blocks
from tests.helpers import (
    EOS,
    FAMILIES,
    PAD,
    assert_same_tokens,
    demo_model,
    demo_tokenizer,
    left_pad,
    make_model,
    native_calls,
    random_prompts,
)
from tests.parity.equality import TALLY, TIE, seeded_generate
from tests.parity.grid import PROCESSORS, VARIANTS, WARPERS
from tests.parity.test_generate_parity import BLOCK, plain_model, pool_bytes

OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
#: So many ends of sequence that beams end at many lengths.
MANY_EOS = {"eos_token_id": [EOS, *range(40, 52)]}


def draw_case(source: random.Random) -> dict[str, Any]:
    """One random call: family, variant, prompt lengths, options, pool."""
    family = source.choice(list(VARIANTS))
    new_tokens = source.choice([1, 2, 6, 13])
    beams = source.choice([2, 3, 4, 6])
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "pad_token_id": source.choice([PAD, 0]),
        "num_beams": beams,
        "num_return_sequences": source.randint(1, beams),
        "early_stopping": source.choice([False, True, "never"]),
        "length_penalty": source.choice([1.0, 0.0, 2.0, -1.0]),
        "do_sample": source.random() < 0.4,
    }
    names = source.sample(list(PROCESSORS), source.choice([0, 0, 1, 2]))
    for name in names:
        options |= PROCESSORS[name]
    if options["do_sample"]:
        options |= WARPERS[source.choice(list(WARPERS))]
    ends = source.choice(["one", "many", "many", "none"])
    if ends == "many" and "eos_list" not in names:
        options |= MANY_EOS
    if ends == "none" and "exponential_decay" not in names:
        options["eos_token_id"] = None
    return {
        "family": family,
        "variant": source.choice(list(VARIANTS[family])),
        "lengths": [source.randint(1, 40) for _ in range(source.choice([1, 1, 2, 4]))],
        "options": options,
        "pool": source.choice(["default", "tight"]),
        "seed": source.randrange(2**31),
    }


def check(case: dict[str, Any]) -> None:
    plain = plain_model(case["family"], case["variant"])
    model = make_model(case["family"], **VARIANTS[case["family"]][case["variant"]])
    options, seed = case["options"], case["seed"]
    kwargs = left_pad(random_prompts(case["lengths"], seed=seed), PAD) | options
    expected = seeded_generate(plain, seed, **kwargs, **OUTPUTS)
    state = torch.get_rng_state()
    settings = {}
    if case["pool"] == "tight":
        new, beams = options["max_new_tokens"], options["num_beams"]
        blocks = most_blocks(case["lengths"], new, beams, BLOCK)
        settings["kv_cache_memory"] = pool_bytes(plain, blocks)
    with hf_paged.enabled(model, block_size=BLOCK, fallback="error", **settings):
        with native_calls(model):
            actual = seeded_generate(model, seed, **kwargs, **OUTPUTS)
        compare(actual, expected)
        del actual
        if case["pool"] == "tight":  # room for the longest prompt's beams only
            hf_paged.disable(model)
            longest = max(most_blocks([n], new, beams, BLOCK) for n in case["lengths"])
            settings["kv_cache_memory"] = pool_bytes(plain, longest)
            hf_paged.enable(model, block_size=BLOCK, fallback="error", **settings)
        if case["pool"] == "tight" and hf_paged.explain(model, **kwargs).reasons:
            return  # all prompts have to advance together: that is a named reason
        with native_calls(model):
            sequences = seeded_generate(model, seed, **kwargs)
        compare_sequences(sequences, expected)
        if torch.equal(sequences, expected.sequences):
            assert torch.equal(torch.get_rng_state(), state), "the global generator stands elsewhere"


def compare(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected) is GenerateBeamDecoderOnlyOutput
    assert actual.keys() == expected.keys()
    TALLY.tokens += expected.sequences.numel()
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-5)
    if not torch.equal(actual.sequences, expected.sequences):
        differing = tied_rows(actual.sequences, expected)
        TALLY.ties.append(f"beams {differing}")
        return
    assert actual.beam_indices.dtype == expected.beam_indices.dtype
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    for name in ("scores", "logits"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(*without_cut_ties(ours, theirs), atol=1e-4, rtol=1e-5)


def without_cut_ties(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [rows, vocab], less those that one side cut off and that lie at the very cut of their row."""
    one_sided = torch.isinf(ours) != torch.isinf(theirs)
    if not one_sided.any():
        return ours, theirs
    kept = torch.where(torch.isinf(ours), theirs, ours)
    lowest = kept.masked_fill(torch.isinf(kept), float("inf")).amin(-1, keepdim=True).expand_as(kept)
    assert one_sided.sum() <= 2, "too many for ties"
    assert torch.all(kept[one_sided] - lowest[one_sided] <= 1e-4), "cut off by one side, far above the cut"
    TALLY.ties.append(f"cut {one_sided.nonzero().tolist()}")
    return ours.masked_fill(one_sided, 0.0), theirs.masked_fill(one_sided, 0.0)


def compare_sequences(sequences: torch.Tensor, expected: Any) -> None:
    TALLY.tokens += sequences.numel()
    if not torch.equal(sequences, expected.sequences):
        TALLY.ties.append(f"beams {tied_rows(sequences, expected)}")


def tied_rows(actual: torch.Tensor, expected: Any) -> list[int]:
    """Rows that differ, all of them next to another of upstream's with the same score up to a tie."""
    assert actual.shape == expected.sequences.shape, f"{actual.shape}, expected {expected.sequences.shape}"
    differing = (actual != expected.sequences).any(dim=1).nonzero().flatten().tolist()
    scores = expected.sequences_scores
    for row in differing:
        gaps = [abs(float(scores[row] - scores[other])) for other in range(len(scores)) if other != row]
        assert min(gaps, default=TIE) < TIE, (
            f"row {row}: {actual[row].tolist()} instead of {expected.sequences[row].tolist()}"
        )
    return differing


def check_all(seed: int, count: int) -> None:
    source = random.Random(seed)
    for _ in range(count):
        case = draw_case(source)
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error


def test_random_cases(parity_seed: int) -> None:
    check_all(parity_seed, 40)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_cases(part: int) -> None:
    check_all(2000 + part, 40)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampled", [False, True])
def test_beams_of_many_prompts_in_a_pool_that_preempts(family: str, sampled: bool) -> None:
    plain, model = plain_model(family, next(iter(VARIANTS[family]))), make_model(family)
    lengths = [5, 21, 9, 30, 2, 14]
    kwargs = left_pad(random_prompts(lengths)) | {"num_beams": 4, "max_new_tokens": 14, **MANY_EOS}
    kwargs |= {"do_sample": sampled, "num_return_sequences": 2}
    expected = seeded_generate(plain, 3, **kwargs, **OUTPUTS)
    pool = pool_bytes(plain, most_blocks([30], 14, 4, BLOCK) + 8)
    with (
        hf_paged.enabled(model, block_size=BLOCK, fallback="error", kv_cache_memory=pool),
        native_calls(model),
    ):
        compare_sequences(seeded_generate(model, 3, **kwargs), expected)
        assert hf_paged.stats(model).preemptions > 0, "nothing was preempted: this proves nothing"


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_trained_models_end_beams_by_themselves(early_stopping: bool | str) -> None:
    plain, model, tokenizer = demo_model("llama"), demo_model("llama"), demo_tokenizer("llama")
    batch = tokenizer(["def __init__(self", "The", "class "], return_tensors="pt", padding=True)
    kwargs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": 30,
    }
    kwargs |= {"num_beams": 4, "early_stopping": early_stopping, "num_return_sequences": 3}
    with hf_paged.enabled(model, fallback="error", kv_cache_memory="32MiB"):
        for options in ({}, {"stop_strings": ["\n", "self"], "tokenizer": tokenizer}):
            expected = plain.generate(**kwargs, **options, **OUTPUTS)
            with native_calls(model, 2):
                compare(model.generate(**kwargs, **options, **OUTPUTS), expected)
                compare_sequences(model.generate(**kwargs, **options), expected)


def test_a_time_that_is_up_ends_all_beams() -> None:
    plain, model = make_model("gpt2"), make_model("gpt2")
    kwargs = left_pad(random_prompts([4, 9])) | {"num_beams": 3, "max_new_tokens": 9, "max_time": 0.0}
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        assert_same_tokens(model.generate(**kwargs), plain.generate(**kwargs))


def test_beams_of_half_precision_models_are_scored_in_float32() -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        kwargs = left_pad(random_prompts([4, 9])) | {"num_beams": 3, "max_new_tokens": 5}
        output = model.generate(**kwargs, **OUTPUTS)
    assert {t.dtype for t in (*output.scores, *output.logits, output.sequences_scores)} == {torch.float32}


def test_zz_ties_are_rare() -> None:
    """Runs last in this file: over all cases of the session."""
    print(f"{TALLY.tokens} tokens compared, {len(TALLY.ties)} ties")
    TALLY.check()
