"""Speculation changes how fast tokens come and never which: prompt lookup and assistant models, in any batch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_paged
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
from tests.parity.equality import TALLY, assert_equal_output, seeded_generate
from tests.parity.test_generate_parity import pool_bytes

BLOCK = 4
LOOKUP = {"prompt_lookup_num_tokens": 5}


@functools.cache
def plain_model(family: str) -> Any:
    return make_model(family)


@functools.cache
def assistant_of(family: str) -> Any:
    """A model that agrees with `make_model(family)` often, and not always."""
    model = make_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def repeating(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Prompts which say things twice, so that lookups find something."""
    return [
        (prompt * 3)[:length]
        for prompt, length in zip(random_prompts([5] * len(lengths), seed=seed), lengths, strict=True)
    ]


def drafts_of(kind: str, family: str) -> dict[str, Any]:
    if kind == "early exit":
        return {"assistant_early_exit": 1}
    return LOOKUP if kind == "lookup" else {"assistant_model": assistant_of(family)}


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "processed": {
        "do_sample": True,
        "top_k": 20,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 7,
    },
    "greedy, processed": {"repetition_penalty": 1.5, "bad_words_ids": [[7], [9, 11]], "min_length": 30},
    # Goes round 5, 6, 7 once it has come to 5, but may leave.
    "looping": {"sequence_bias": [[[5], 6.0], [[5, 6], 20.0], [[6, 7], 20.0], [[7, 5], 12.0]]},
    "forced end": {"forced_eos_token_id": EOS, "suppress_tokens": [5, 6, 7]},
}


@pytest.mark.parametrize("kind", ["lookup", "assistant", "early exit"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "lengths", [(9,), (3, 9, 20, 1), (12, 1, 30, 7, 5, 16, 17, 2, 4, 8, 15, 31, 33, 3, 6, 10)]
)
@pytest.mark.parametrize("pool", ["default", "tight"])
def test_tokens_are_those_of_plain_generate(
    kind: str, family: str, lengths: tuple[int, ...], pool: str, eager: None
) -> None:
    plain, enabled = plain_model(family), make_model(family)
    inputs = left_pad(repeating(lengths))
    config: dict[str, Any] = {}
    if pool == "tight":
        config["kv_cache_memory"] = pool_bytes(plain, -(-(max(lengths) + 24) // BLOCK) + 1)
    drafted = accepted = 0
    for seed, (name, options) in enumerate(OPTIONS.items()):
        if len(lengths) == 16 and name not in ("greedy", "processed", "looping"):
            continue
        kwargs = {**inputs, "max_new_tokens": 24, "pad_token_id": PAD, **options}
        expected = seeded_generate(plain, seed, **kwargs)
        state = torch.get_rng_state()
        with hf_paged.enabled(enabled, block_size=BLOCK, fallback="error", **config), native_calls(enabled):
            actual = seeded_generate(enabled, seed, **kwargs, **drafts_of(kind, family))
            stats = hf_paged.stats(enabled)
        assert_equal_output(plain, kwargs, seed, expected, actual)
        if torch.equal(expected, actual):
            assert torch.equal(torch.get_rng_state(), state), f"{name}: the generator stands elsewhere"
        drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
    assert 0 < accepted < drafted, "some drafts must be right and some wrong, or this shows nothing"


def test_zz_ties_are_rare() -> None:
    TALLY.check()


@pytest.mark.parametrize("kind", ["lookup", "assistant", "early exit"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_returned_scores_logits_and_cache(kind: str, do_sample: bool, eager: None) -> None:
    plain, enabled = plain_model("llama"), make_model("llama")
    kwargs = {**left_pad(repeating((3, 9, 14))), "max_new_tokens": 20, "pad_token_id": PAD}
    kwargs |= {
        "do_sample": do_sample,
        "top_k": 30,
        "repetition_penalty": 1.1,
        "eos_token_id": [EOS, 40, 41, 42],
    }
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = seeded_generate(plain, 5, **kwargs)
    ends = [row.tolist().index(PAD) for row in expected.sequences[:, 14:] if PAD in row]
    assert ends, "a row must end before the others, or nothing runs on"
    with hf_paged.enabled(enabled, block_size=BLOCK, fallback="error"), native_calls(enabled):
        actual = seeded_generate(enabled, 5, **kwargs, **drafts_of(kind, "llama"))
        assert_same_tokens(actual.sequences, expected.sequences)
        for ours, theirs in ((actual.scores, expected.scores), (actual.logits, expected.logits)):
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=0)
        for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
            width = kwargs["input_ids"].shape[1]
            torch.testing.assert_close(ours.keys[:, :, width:], theirs.keys[:, :, width:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_stop_strings_and_ends_inside_of_a_draft(kind: str, eager: None) -> None:
    model, tokenizer = demo_model("llama"), demo_tokenizer("llama")
    texts = [
        "for x in range(3):\n    print(x)\nfor x in range(3):\n",
        "import os\nimport sys\nimport",
        "a b a b a b",
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    drafts = LOOKUP if kind == "lookup" else {"assistant_model": demo_model("llama")}
    cases: list[dict[str, Any]] = [
        {"max_new_tokens": 40},
        {"max_new_tokens": 40, "stop_strings": [")", "sys"], "tokenizer": tokenizer},
        {"max_new_tokens": 7},
        {"max_length": inputs["input_ids"].shape[1] + 3},
        {"max_new_tokens": 1},
        {"max_new_tokens": 30, "min_new_tokens": 29, "eos_token_id": list(range(100, 400))},
        {"max_new_tokens": 30, "eos_token_id": list(range(100, 400))},
    ]
    expected = [model.generate(**inputs, **case) for case in cases]
    with hf_paged.enabled(model, block_size=BLOCK, fallback="error"):
        for case, tokens in zip(cases, expected, strict=True):
            with native_calls(model):
                assert_same_tokens(model.generate(**inputs, **case, **drafts), tokens)
        stats = hf_paged.stats(model)
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert stats.steps < sum(tokens.shape[1] - inputs["input_ids"].shape[1] for tokens in expected)


def test_an_assistant_that_agrees_makes_few_steps(eager: None) -> None:
    model = make_model("llama")
    inputs = left_pad(random_prompts([7]))
    options = {"max_new_tokens": 33, "eos_token_id": None, "pad_token_id": PAD}
    expected = plain_model("llama").generate(**inputs, **options)
    assistant = make_model("llama")
    assistant.generation_config.num_assistant_tokens = 7
    assistant.generation_config.assistant_confidence_threshold = 0.0
    with hf_paged.enabled(model, fallback="error"):
        assert_same_tokens(model.generate(**inputs, **options, assistant_model=assistant), expected)
        stats = hf_paged.stats(model)
    # The prompt gives one token, each step after it eight.
    assert (stats.steps, stats.drafted_tokens, stats.accepted_tokens) == (5, 28, 28)


def test_upstreams_schedules_and_confidence_are_followed(eager: None) -> None:
    model, assistant = make_model("gpt2"), copy.deepcopy(assistant_of("gpt2"))
    inputs = {
        **left_pad(random_prompts([7])),
        "max_new_tokens": 30,
        "pad_token_id": PAD,
        "eos_token_id": None,
    }
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 2, "heuristic"
    config.assistant_confidence_threshold = 0.0
    expected = plain_model("gpt2").generate(**inputs)
    with hf_paged.enabled(model, fallback="error"):
        assert_same_tokens(model.generate(**inputs, assistant_model=assistant), expected)
        assert config.num_assistant_tokens > 2  # longer while drafts are right, and so for the next call
        hf_paged.reset_stats(model)
        config.num_assistant_tokens_schedule = "constant"
        config.num_assistant_tokens, config.assistant_confidence_threshold = 8, 1.1
        assert_same_tokens(model.generate(**inputs, assistant_model=assistant), expected)
        stats = hf_paged.stats(model)
        # Nobody is ever that sure: one token at a time.
        assert 0 < stats.drafted_tokens < stats.steps


def test_the_assistant_is_left_as_it_was(eager: None) -> None:
    model, assistant = make_model("llama"), copy.deepcopy(assistant_of("llama"))
    before = {name: set(vars(module)) for name, module in assistant.named_modules()}
    inputs = {**left_pad(random_prompts([5, 9])), "max_new_tokens": 8, "pad_token_id": PAD}
    expected = plain_model("llama").generate(**inputs)
    with hf_paged.enabled(model, fallback="error"):
        assert_same_tokens(model.generate(**inputs, assistant_model=assistant), expected)
        assert {name: set(vars(module)) for name, module in assistant.named_modules()} == before
        # Enabled itself, and the very model itself, it drafts as well.
        with hf_paged.enabled(assistant, fallback="error"):
            assert_same_tokens(model.generate(**inputs, assistant_model=assistant), expected)
            assert hf_paged.stats(assistant).native_calls == 0
        assert_same_tokens(model.generate(**inputs, assistant_model=model), expected)
        assert hf_paged.stats(model).native_calls == 3


def test_an_assistant_of_another_family_with_fewer_positions(eager: None) -> None:
    model, assistant = make_model("llama"), make_model("gpt2", n_positions=24)
    inputs = {**left_pad(random_prompts([5, 20])), "max_new_tokens": 20, "pad_token_id": PAD}
    expected = plain_model("llama").generate(**inputs)
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        assert_same_tokens(model.generate(**inputs, assistant_model=assistant), expected)


def test_an_assistant_without_room_drafts_less_and_harms_nothing(eager: None) -> None:
    plain, model = plain_model("gpt_bigcode"), make_model("gpt_bigcode")
    # One layer's worth of the main model's memory is a fifth of what this assistant needs.
    assistant = make_model("gpt_bigcode", n_embd=48, n_layer=10)
    inputs = {**left_pad(random_prompts([5, 20, 11, 3])), "max_new_tokens": 20, "pad_token_id": PAD}
    expected = plain.generate(**inputs)
    with (
        hf_paged.enabled(model, block_size=BLOCK, fallback="error", kv_cache_memory=pool_bytes(plain, 42)),
        native_calls(model),
    ):
        assert_same_tokens(model.generate(**inputs, assistant_model=assistant), expected)


def test_long_prompts_of_the_assistant_are_computed_in_parts(eager: None) -> None:
    plain, model = plain_model("llama"), make_model("llama")
    inputs = {**left_pad(random_prompts([60, 45])), "max_new_tokens": 20, "pad_token_id": PAD}
    expected = plain.generate(**inputs)
    with hf_paged.enabled(
        model, block_size=BLOCK, fallback="error", max_num_batched_tokens=16, max_num_seqs=4
    ):
        assert_same_tokens(model.generate(**inputs, assistant_model=assistant_of("llama")), expected)
        assert hf_paged.stats(model).accepted_tokens > 0


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_beside_other_requests(kind: str, eager: None) -> None:
    model = make_model("gpt2")
    prompts = repeating((9, 14, 3, 8, 12))
    with hf_paged.enabled(model, block_size=BLOCK, fallback="error"):
        engine = hf_paged.engine(model)
        options: list[dict[str, Any]] = [
            {**drafts_of(kind, "gpt2")},
            {},
            {"do_sample": True, **drafts_of(kind, "gpt2")},
            {"do_sample": True, "temperature": 0.7},
            {"repetition_penalty": 1.2, **drafts_of(kind, "gpt2")},
        ]

        def submit(i: int, drafts: bool) -> Any:
            given = {k: v for k, v in options[i].items() if drafts or k not in ("assistant_model", *LOOKUP)}
            return engine.submit(prompts[i], seed=i, max_new_tokens=25, pad_token_id=PAD, **given)

        alone = [submit(i, False).result(60).token_ids for i in range(5)]
        handles = [submit(i, True) for i in range(5)]
        assert [handle.result(60).token_ids for handle in handles] == alone
        many = hf_paged.generate_many(
            model, prompts, max_new_tokens=25, pad_token_id=PAD, **drafts_of(kind, "gpt2")
        )
        for prompt, result in zip(prompts, many, strict=True):
            inputs = left_pad([prompt])
            expected = plain_model("gpt2").generate(**inputs, max_new_tokens=25, pad_token_id=PAD)
            assert result.token_ids == expected[0, len(prompt) :].tolist()
        assert hf_paged.stats(model).accepted_tokens > 0


def test_sampled_tokens_have_the_right_distribution(eager: None) -> None:
    """Chi-square over all texts of three tokens; the assistant is another model altogether."""
    shape = {"vocab_size": 6, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    model = make_model("llama", seed=1, **shape)
    assistant = make_model("llama", seed=2, **shape)
    prompt, rows = torch.tensor([[1, 4, 2, 5]]), 6000
    texts = torch.cartesian_prod(*[torch.arange(6)] * 3)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts], dim=1)).logits[:, 3:-1]
    logprobs = (logits / 2).log_softmax(-1).gather(-1, texts[..., None])[..., 0].sum(-1)
    torch.manual_seed(0)
    with hf_paged.enabled(model, fallback="error"), native_calls(model):
        output = model.generate(
            prompt.expand(rows, -1),
            attention_mask=torch.ones(rows, 4, dtype=torch.long),
            generation_config=GenerationConfig(
                do_sample=True, temperature=2.0, max_new_tokens=3, pad_token_id=0
            ),
            assistant_model=assistant,
            top_k=0,
        )
        stats = hf_paged.stats(model)
    assert 0.1 < stats.accepted_tokens / stats.drafted_tokens < 0.9
    seen = torch.bincount((output[:, 4:] * torch.tensor([36, 6, 1])).sum(-1), minlength=216).double()
    expected = logprobs.double().exp() * rows
    common = expected >= 5
    cells = [(seen[common], expected[common]), (seen[~common].sum()[None], expected[~common].sum()[None])]
    chi2 = sum(((s - e) ** 2 / e).sum() for s, e in cells)
    degrees = int(common.sum())
    p = float(torch.special.gammaincc(torch.tensor(degrees / 2.0).double(), chi2 / 2))
    assert p > 1e-3, f"chi-square {float(chi2):.1f} over {degrees} degrees of freedom"


@pytest.fixture
def broken() -> Any:
    """An assistant whose forward raises after its first calls."""
    assistant = copy.deepcopy(assistant_of("llama"))
    calls = []

    class Broken(type(assistant.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("the assistant broke")
            return super().forward(hidden_states)

    assistant.model.norm.__class__ = Broken
    return assistant


def test_an_assistant_that_raises_fails_its_calls_and_no_other(
    eager: None, broken: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("hf_paged.integrations.assistants.Assistants.problems", lambda self, model: [])
    model = make_model("llama")
    prompts = random_prompts([5, 9])
    options = {"max_new_tokens": 30, "pad_token_id": PAD}
    with hf_paged.enabled(model, block_size=BLOCK, fallback="error"):
        engine = hf_paged.engine(model)
        expected = engine.submit(prompts[1], **options).result(60).token_ids
        failing = engine.submit(prompts[0], assistant_model=broken, **options)
        other = engine.submit(prompts[1], **options)
        with pytest.raises(RuntimeError, match="the assistant broke"):
            failing.result(60)
        assert other.result(60).token_ids == expected
    assert not any("hf_paged" in str(value) for value in vars(broken.model.layers[0].self_attn).values())


FALLING_BACK: dict[str, dict[str, Any]] = {
    "assistant_early_exit=0": {"assistant_early_exit": 0},
    "assistant_ensemble_weight": {"assistant_early_exit": 1, "assistant_ensemble_weight": 0.5},
    "prompt_lookup_num_tokens=0": {"prompt_lookup_num_tokens": 0},
    "assistant_model": {"assistant_model": "hooked"},
}


@pytest.mark.parametrize("detail", FALLING_BACK)
def test_what_is_not_served_is_named(detail: str) -> None:
    if detail == "assistant_ensemble_weight" and not hasattr(GenerationConfig(), detail):
        pytest.skip("this transformers does not know it")
    model, hooked = make_model("llama"), make_model("llama")
    hooked.model.layers[0].register_forward_hook(lambda module, args, output: output)
    given = {k: hooked if v == "hooked" else v for k, v in FALLING_BACK[detail].items()}
    with hf_paged.enabled(model):
        explanation = hf_paged.explain(model, **left_pad(random_prompts([4])), max_new_tokens=3, **given)
        assert [reason.code for reason in explanation.reasons] == ["assisted_decoding"]
        assert detail in str(explanation)
