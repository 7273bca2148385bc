"""Modules called without ceremony: the same numbers to the bit, and the very call wherever somebody could notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import hf_paged
from hf_paged.patches import direct
from tests.helpers import make_model, native_calls

SIZE = 24
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(SIZE, 40),
    "linear without bias": lambda: nn.Linear(SIZE, 40, bias=False),
    "conv1d": lambda: Conv1D(40, SIZE),
    "dropout": lambda: nn.Dropout(0.5).eval(),
    "another class": lambda: nn.LayerNorm(SIZE),
}


def called(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are called as modules from now on."""
    calls: list[nn.Module] = []
    original = nn.Module.__call__

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_same_bits_as_the_call(make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make().to(dtype)
    x = torch.randn(1, 7, SIZE, dtype=dtype)
    expected = module(x)
    calls = called(module, monkeypatch)
    assert torch.equal(direct.call(module, x), expected)
    assert calls == ([module] if isinstance(module, nn.LayerNorm) else [])


def test_under_autocast_as_the_call() -> None:
    module, x = nn.Linear(SIZE, 40), torch.randn(1, 7, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = module(x), direct.call(module, x)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, expected)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def forward_hook(module: Any) -> Any:
    module.register_forward_hook(lambda m, args, output: output + 1)
    return module


def pre_hook(module: Any) -> Any:
    module.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return module


def wrapped(module: Any) -> Any:
    original = module.forward
    module.forward = lambda x: original(x) + 1
    return module


def extra_parameter(module: Any) -> Any:
    module.scale = nn.Parameter(torch.ones(1))  # its class or a wrapper may know what to do with it
    return module


NOTICED: dict[str, Callable[[], nn.Module]] = {
    "forward hook": lambda: forward_hook(nn.Linear(SIZE, 8)),
    "forward pre-hook": lambda: pre_hook(nn.Linear(SIZE, 8)),
    "wrapped forward": lambda: wrapped(nn.Linear(SIZE, 8)),
    "subclass": lambda: Doubled(SIZE, 8),
    "pruned": lambda: prune.random_unstructured(nn.Linear(SIZE, 8), "weight", 0.5),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(SIZE, 8)),
    "training dropout": lambda: nn.Dropout(0.5),
    "extra parameter": lambda: extra_parameter(nn.Linear(SIZE, 8)),
}


@pytest.mark.parametrize("make", NOTICED.values(), ids=NOTICED)
def test_whatever_could_be_noticed_is_called(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(), torch.randn(1, 7, SIZE)
    torch.manual_seed(0)
    expected = module(x)
    calls = called(module, monkeypatch)
    torch.manual_seed(0)
    assert torch.equal(direct.call(module, x), expected)
    assert calls[0] is module


def test_a_forward_patched_in_for_all_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Linear(SIZE, 8), torch.randn(1, 7, SIZE)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x[..., :8] * 3)
    assert torch.equal(direct.call(module, x), x[..., :8] * 3)


def without_its_weight(module: Any) -> Any:
    """As pruning leaves a layer whose hook was taken off: the weight is a plain attribute."""
    weight = module.weight.detach().clone()
    del module.weight
    module.register_parameter("weight_orig", nn.Parameter(weight))
    module.weight = weight
    return module


def test_a_layer_with_other_parameters_is_called() -> None:
    module, x = without_its_weight(nn.Linear(SIZE, 8)), torch.randn(1, 7, SIZE)
    assert torch.equal(direct.call(module, x), module(x))


def test_a_function_is_called() -> None:
    x = torch.randn(3)
    assert torch.equal(direct.call(torch.tanh, x), x.tanh())


def replaced_norm(model: Any) -> None:
    for layer in model.model.layers:
        layer.post_attention_layernorm = nn.Identity()


def plain_activation(model: Any) -> None:
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = torch.tanh


def hooked_mlp(model: Any) -> None:
    prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3)


@pytest.mark.parametrize("change", [replaced_norm, plain_activation, hooked_mlp])
def test_layers_with_parts_of_the_users(change: Any) -> None:
    plain, model = make_model("llama"), make_model("llama")
    for one in (plain, model):
        torch.manual_seed(3)
        change(one)
    ids = torch.tensor([[5, 9, 2, 7], [1, 8, 3, 4]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    hf_paged.enable(model, fallback="error")
    with native_calls(model):
        found = model.generate(ids, **options)
    assert torch.equal(found, plain.generate(ids, **options))
    hf_paged.disable(model)
