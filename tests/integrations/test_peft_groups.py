"""What is remembered of LoRA matrices between steps holds no longer than they do, and no tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_paged.engine.adapters import Selection
from hf_paged.integrations.peft_groups import LoraLayers
from hf_paged.kernels.lora_matmul import lora_add_prepared_
from hf_paged.step import AdapterRuns
from tests.integrations.peft_models import config, peft_model

ROWS = [(Selection(("a",)), 0, 3), (Selection(()), 3, 4), (Selection(("b",)), 4, 9)]


@pytest.fixture
def layers() -> tuple[list[Any], LoraLayers]:
    model = peft_model("llama", {"a": config("llama"), "b": config("llama", r=8)})
    linears = [module for module in model.modules() if hasattr(module, "lora_A")]
    lora = LoraLayers()
    for linear in linears:
        lora.add(linear)
    return linears, lora


def step(rows: Any = ROWS) -> Any:
    return SimpleNamespace(adapters=AdapterRuns(tokens=list(rows), rows=[]), backend="cpu")


def result(lora: LoraLayers, layer: Any, inputs: Any) -> torch.Tensor:
    groups = lora.groups(layer, inputs, inputs.adapters.tokens)
    x = torch.linspace(-1, 1, 9 * layer.in_features).view(9, -1)
    output = torch.zeros(9, layer.out_features)
    return lora_add_prepared_(output, x, groups, backend="cpu")


def test_the_first_layer_has_all_made_ready(layers: Any) -> None:
    linears, lora = layers
    inputs = step()
    groups = lora.groups(linears[-1], inputs, inputs.adapters.tokens)
    assert [(g.first, g.end) for g in groups.groups] == [(0, 3), (4, 9)]
    assert inputs.adapters.prepared.keys() == {id(linear) for linear in linears}
    assert lora.groups(linears[-1], inputs, inputs.adapters.tokens) is groups
    assert lora.groups(linears[0], step([(None, 0, 9)]), [(None, 0, 9)]) is not None  # rows of another list


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.lora_A["a"].weight.data.mul_(2),
        lambda layer: setattr(layer.lora_A["a"].weight, "data", layer.lora_A["a"].weight.data * 2),
        lambda layer: setattr(layer.lora_B["a"], "weight", torch.nn.Parameter(layer.lora_B["a"].weight * 2)),
        lambda layer: layer.scaling.update(a=2 * layer.scaling["a"]),
    ],
    ids=["in place", "other data", "other parameter", "scaling"],
)
def test_changes_are_seen_at_the_next_step(layers: Any, change: Callable[[Any], None]) -> None:
    linears, lora = layers
    layer = linears[0]
    before = result(lora, layer, step())
    assert before[:3].abs().max() > 1e-3
    with torch.no_grad():
        change(layer)
    after = result(lora, layer, step())
    torch.testing.assert_close(after[:3], 2 * before[:3])
    torch.testing.assert_close(after[4:], before[4:])


def test_nothing_keeps_matrices_alive(layers: Any) -> None:
    linears, lora = layers
    layer = linears[0]
    result(lora, layer, step())
    matrix = weakref.ref(layer.lora_A["a"].weight)
    del layer.lora_A["a"], layer.lora_B["a"]
    gc.collect()
    assert matrix() is None
    inputs = step()
    assert [g.first for g in lora.groups(layer, inputs, inputs.adapters.tokens).groups] == [4]
    lora.remove(id(layer))
    assert torch.equal(result(lora, layer, step())[:4], torch.zeros(4, layer.out_features))


def test_matrices_that_do_not_fit_are_named(layers: Any) -> None:
    linears, lora = layers
    linears[0].lora_A["a"].weight = torch.nn.Parameter(torch.zeros(4, linears[0].in_features + 1))
    with pytest.raises(ValueError, match="must be"):
        result(lora, linears[0], step())
