"""Whether a look at a snapshot of a model's tensors tells every kind of change that a version tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_paged.engine.weights_snapshot import WeightsSnapshot
from tests.helpers import make_model

#: Looks after which every tensor has been looked at.
ROUND = 8


def holds(snapshot: WeightsSnapshot) -> bool:
    return all(snapshot.holds() for _ in range(ROUND))


def layer(model: Any) -> nn.Module:
    return model.model.layers[1].mlp.up_proj


CHANGES: dict[str, Callable[[Any], object]] = {
    ".data edited": lambda m: layer(m).weight.data.mul_(-1),
    ".data set": lambda m: setattr(layer(m).weight, "data", layer(m).weight.data.clone()),
    "another parameter": lambda m: setattr(layer(m), "weight", nn.Parameter(layer(m).weight.detach())),
    "another module": lambda m: setattr(m.model.layers[1].mlp, "up_proj", nn.Linear(1, 1)),
    "a parameter more": lambda m: layer(m).register_parameter("bias", nn.Parameter(torch.zeros(1))),
    "a buffer more": lambda m: layer(m).register_buffer("scale", torch.ones(1)),
    ".to(dtype)": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen_within_a_round(name: str) -> None:
    model = make_model("llama")
    snapshot = WeightsSnapshot.of(model)
    assert snapshot is not None
    assert all(holds(snapshot) for _ in range(6))  # every number that is kept of a tensor
    CHANGES[name](model)
    assert not holds(snapshot)


def test_no_snapshot_where_it_would_not_tell_enough() -> None:
    model = make_model("llama")
    layer(model).weight = nn.Parameter(torch.zeros(8, 4).t())
    assert WeightsSnapshot.of(model) is None
