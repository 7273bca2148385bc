"""Whole models on the Triton backend without a GPU: the checks of `tests/gpu` on tiny models, in the interpreter."""

from __future__ import annotations

import pytest
import torch

import hf_paged
from tests.gpu import step_checks
from tests.helpers import FAMILIES, assert_same_tokens, left_pad, make_model, native_calls, random_prompts

pytest.importorskip("triton")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_on_its_kernels(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    step_checks.check_parity(monkeypatch, family, make_model(family), [5, 2], 3)


def test_a_norm_with_a_hook_keeps_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    seen = []
    norm = model.model.layers[0].post_attention_layernorm
    batch = left_pad(random_prompts([4]))
    expected = model.generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=None)

    def make_inputs_require_grads(module: object, inputs: object, output: torch.Tensor) -> None:
        seen.append(output.shape)

    # One of the names that are known to be harmless: with any other the call falls back.
    norm.register_forward_hook(make_inputs_require_grads)
    with hf_paged.enabled(model, backend="triton"), native_calls(model):
        assert_same_tokens(
            model.generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=None), expected
        )
    assert len(seen) == 2


def test_autocast_rounds_where_upstream_does() -> None:
    # The projections come out in the narrow dtype, the residual stays wide: nothing of this may be fused.
    model = make_model("llama")
    batch = left_pad(random_prompts([6, 3]))
    with torch.autocast("cpu", dtype=torch.float16):
        expected = model.generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=None)
        with hf_paged.enabled(model, backend="triton"), native_calls(model):
            actual = model.generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert_same_tokens(actual, expected)


def test_the_gpu_suites_checks_start_here(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    step_checks.check_low_precision(
        make_model("llama", dtype=torch.float16, **llama), random_prompts([6] * 2), 5
    )
    step_checks.check_replays(make_model("llama", **llama), [3, 2, 5], 2)
    step_checks.check_ahead(monkeypatch, make_model("llama", **llama), [3, 2, 5], 5)
    step_checks.check_preemption(make_model("llama", **llama), [4, 4], 6, 4)
    step_checks.check_adapters("llama", make_model("llama", **llama), [3, 5], 2)
    step_checks.check_soak(make_model("llama", **llama), 1, 3, 3)
    step_checks.check_move("llama", 2, **llama)


def test_every_check_of_the_gpu_suite_is_started_here() -> None:
    """A check that no test here calls would first run on the day a GPU is there."""
    checks = {name for name in vars(step_checks) if name.startswith("check_")}
    called = set(test_the_gpu_suites_checks_start_here.__code__.co_names)
    assert checks - called == {"check_parity"}  # each family has a test of its own
