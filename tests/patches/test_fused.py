"""Fused forms: the same numbers within rounding, in steps only, and nowhere a forward is not the known one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_paged.patches.fused import find_fused
from hf_paged.step import active_step
from tests.helpers import make_model, random_prompts
from tests.patches.packed import PackedRun, patch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rms_norm(dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(96, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(0))
    return norm.to(dtype)


def in_step(module: Any, x: Tensor) -> Tensor:
    (found,) = find_fused(module)
    assert found[0] is module
    return found[1](module, None, x)


def exact_gelu(module: Any, x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def exact_norm(module: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight.double() * (x * scale)


CASES = [(lambda dtype: NewGELUActivation(), exact_gelu), (rms_norm, exact_norm)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("make, exact", CASES, ids=["gelu", "rms_norm"])
def test_fused_is_as_near_to_the_exact_result_as_upstream(
    make: Any, exact: Any, scale: float, dtype: torch.dtype
) -> None:
    module = make(dtype)
    x = (torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    truth = exact(module, x.double())
    fused, upstream = in_step(module, x), module(x)
    assert fused.dtype == upstream.dtype == dtype
    size = truth.abs().amax()
    error, theirs = ((y.double() - truth).abs() / size for y in (fused, upstream))
    assert (
        error.max() <= max(1e-6, theirs.max().item())
        if dtype == torch.float32
        else error.mean() <= theirs.mean()
    )


def test_fused_parts_run_in_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(
        torch.nn.functional, "gelu", lambda *args, **kwargs: (calls.append(1), gelu(*args, **kwargs))[1]
    )
    model = make_model("gpt2")
    applied = patch(model)
    with torch.no_grad():
        model(torch.tensor([[4, 5]]))
    assert not calls
    PackedRun(model, applied, random_prompts([4])).step((0, 4))
    assert len(calls) == len(model.transformer.h)


@pytest.mark.parametrize("name", ["gelu", "gelu_fast", "quick_gelu", "silu", "relu"])
def test_other_activations_are_left_alone(name: str) -> None:
    assert find_fused(ACT2FN[name]) == []


def test_an_instance_forward_of_somebody_is_left_alone() -> None:
    module = NewGELUActivation()
    module.forward = lambda x: x
    assert find_fused(module) == []


def test_a_subclass_is_left_alone() -> None:
    class Mine(LlamaRMSNorm):
        pass

    assert find_fused(Mine(8)) == []


def test_a_class_patched_later_is_honoured_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    run = PackedRun(model, patch(model), random_prompts([4]))
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: torch.zeros_like(x))
    with active_step(run.inputs([(0, 4)])):
        assert model.model.norm(torch.ones(1, 4, 64)).abs().max() == 0


def test_norm_of_another_dtype_promotes_as_upstream() -> None:
    module = rms_norm(torch.float32)
    x = torch.randn(3, 96).bfloat16()
    assert in_step(module, x).dtype == module(x).dtype == torch.float32
