"""A packed step of ragged sequences gives each sequence the logits that the plain model gives it alone."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch

from hf_paged.patches import registry
from hf_paged.patches.apply import apply
from hf_paged.step import active_step
from tests.helpers import FAMILIES, MAX_POSITIONS, make_model, random_prompts
from tests.patches.packed import PackedRun, patch, plain_logits

LENGTHS = (13, 1, 22, 9, 30)


def rope(rope_type: str, **parameters: object) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


HALF = 16 // 2  # head size of the tiny LLaMA / 2
LLAMA_ROPE = {
    "linear": rope("linear", factor=2.0),
    "dynamic": rope("dynamic", factor=2.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "longrope": rope(
        "longrope",
        short_factor=[1.0 + 0.1 * i for i in range(HALF)],
        long_factor=[2.0 + 0.5 * i for i in range(HALF)],
        original_max_position_embeddings=64,
        factor=2.0,
    ),
}
VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2-unscaled-inverse-layer": (
        "gpt2",
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
    "gpt2-eager": ("gpt2", {"attn_implementation": "eager"}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "gpt2-gelu": ("gpt2", {"activation_function": "gelu"}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-one-head": ("gpt2", {"n_head": 1}),
    "bigcode-multi-query": ("gpt_bigcode", {}),
    "bigcode-multi-head": ("gpt_bigcode", {"multi_query": False}),
    "bigcode-unscaled": ("gpt_bigcode", {"scale_attn_weights": False}),
    "bigcode-eager": ("gpt_bigcode", {"attn_implementation": "eager"}),
    "llama-grouped": ("llama", {}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    **{f"llama-rope-{name}": ("llama", overrides) for name, overrides in LLAMA_ROPE.items()},
}


def assert_close_rows(actual: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 1e-4) -> None:
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape
        worst = (ours - theirs).abs().amax(-1)
        assert worst.max() <= atol, f"sequence {index}, position {worst.argmax()}: off by {worst.max()}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_logits_equal_plain_ones(variant: str) -> None:
    family, overrides = VARIANTS[variant]
    model = make_model(family, **overrides)
    sequences = random_prompts(LENGTHS)
    expected = plain_logits(model, sequences)
    applied = patch(model)
    assert applied.reasons() == []
    assert_close_rows(PackedRun(model, applied, sequences).all_logits(), expected)


@pytest.mark.parametrize(
    "variant", ["gpt2-unscaled", "gpt2-inverse-layer", "bigcode-multi-head", "llama-head-dim"]
)
def test_the_variant_matters(variant: str) -> None:
    """The options are not no-ops in these tiny models: without them the logits are others."""
    family, overrides = VARIANTS[variant]
    with_option, without = make_model(family, **overrides), make_model(family)
    sequences = random_prompts([9])
    assert (plain_logits(with_option, sequences)[0] - plain_logits(without, sequences)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 100])
def test_packed_logits_to_the_last_position(family: str, chunk: int) -> None:
    model = make_model(family)
    sequences = random_prompts([MAX_POSITIONS, 3])
    expected = plain_logits(model, sequences)
    assert_close_rows(PackedRun(model, patch(model), sequences).all_logits(chunk), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family, overrides",
    [("gpt2", {}), ("gpt2", {"attn_implementation": "eager"}), ("gpt_bigcode", {}), ("llama", {})],
)
def test_half_precision_is_as_near_to_float32_as_upstream(
    family: str, overrides: dict, dtype: torch.dtype
) -> None:
    model = make_model(family, dtype=dtype, **overrides)
    sequences = random_prompts(LENGTHS)
    exact = torch.cat(plain_logits(copy.deepcopy(model).float(), sequences))
    upstream = torch.cat(plain_logits(model, sequences)).float()
    applied = patch(model)
    assert {layer.dtype for layer in applied.layer_geometry()} == {dtype}
    ours = torch.cat(PackedRun(model, applied, sequences).all_logits())
    assert ours.dtype == dtype
    assert (ours.float() - exact).abs().mean() <= 2 * (upstream - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_step_keeps_a_float32_cache(family: str) -> None:
    model = make_model(family)
    sequences = random_prompts(LENGTHS)
    exact = torch.cat(plain_logits(model, sequences))
    applied = patch(model)
    run = PackedRun(model, applied, sequences)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        upstream = torch.cat(plain_logits(model, sequences)).float()
        ours = torch.cat(run.all_logits()).float()
    assert {k.dtype for k, _ in run.store} == {torch.float32}
    assert (ours - exact).abs().mean() <= 2 * (upstream - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_step_builds_no_mask_and_warns_of_nothing(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(family)
    model.config.pad_token_id = 7  # a prompt that holds the pad token is what upstream warns about
    spec = registry.find(model)
    masks = []

    def recording(module, step, layer, *args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return spec.paged_forward(module, step, layer, *args, attention_mask=attention_mask, **kwargs)

    applied = apply(model, dataclasses.replace(spec, paged_forward=recording))
    run = PackedRun(model, applied, [[7, 5, 6, 7], [7, 7, 9]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.all_logits()
    assert masks
    assert {tuple(mask.shape) for mask in masks} == {(1, 1, 1, 1)}
    assert caplog.records == []


@pytest.mark.parametrize("family", FAMILIES)
def test_cpu_backend_runs_the_same_steps(family: str) -> None:
    pytest.importorskip("numba")
    model = make_model(family)
    sequences = random_prompts(LENGTHS)
    expected = plain_logits(model, sequences)
    assert_close_rows(PackedRun(model, patch(model), sequences, backend="cpu").all_logits(), expected)


def test_logits_to_keep_picks_rows_of_the_step() -> None:
    model = make_model("llama")
    run = PackedRun(model, patch(model), random_prompts([5, 7]))
    every = torch.cat(run.step((0, 5), (1, 7)))
    again = PackedRun(model, run.applied, run.sequences)
    inputs = again.inputs([(0, 5), (1, 7)])
    with active_step(inputs), torch.no_grad():
        picked = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            attention_mask=torch.ones(1, 1, 1, 1),
            use_cache=False,
            logits_to_keep=torch.tensor([4, 11]),
        ).logits
    torch.testing.assert_close(picked[0], every[[4, 11]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_limit_is_where_packing_stops_being_exact(rope_type: str) -> None:
    model = make_model("llama", **LLAMA_ROPE[rope_type])
    limit = registry.find(model).rope_limit(model)
    # `dynamic` keeps its frequencies up to one position more, but only if no longer forward came before.
    assert limit == {"dynamic": MAX_POSITIONS - 1, "longrope": 64}[rope_type]
    short = random_prompts([20])[0]
    expected = plain_logits(model, [short])
    applied = patch(model)
    for extra, exact in ((0, True), (2, False)):
        beside = random_prompts([limit + extra], seed=1)[0]
        ours = PackedRun(model, applied, [short, beside]).step((0, 20), (1, limit + extra))
        assert ((ours[0] - expected[0]).abs().max() <= 1e-4) == exact


@pytest.mark.parametrize("family", FAMILIES)
def test_position_limits(family: str) -> None:
    model = make_model(family)
    spec = registry.find(model)
    assert spec.position_limit(model) == (None if family == "llama" else MAX_POSITIONS)
    assert spec.rope_limit(model) is None
