"""The checks every other test leans on are able to fail."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import hf_paged
from hf_paged.engine import registry
from tests import helpers
from tests.helpers import (
    EOS,
    FAMILIES,
    MAX_POSITIONS,
    assert_same_tokens,
    check_engines,
    left_pad,
    make_model,
    random_prompts,
)


@dataclass
class FakeEngine:
    is_idle: bool = True
    blocks_add_up: bool = True

    def check_integrity(self) -> None:
        assert self.blocks_add_up, "blocks are lost"


def test_a_busy_engine_and_a_lost_block_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "IDLE_WITHIN_S", 0.01)
    check_engines([FakeEngine()])
    with pytest.raises(AssertionError, match="still has requests"):
        check_engines([FakeEngine(), FakeEngine(is_idle=False)])
    with pytest.raises(AssertionError, match="blocks are lost"):
        check_engines([FakeEngine(), FakeEngine(blocks_add_up=False)])


def test_the_registry_has_what_the_leak_check_asks_for() -> None:
    """Only this model's engine is looked for: models of other tests may still be alive."""
    model = make_model("llama")
    with hf_paged.enabled(model):
        engine = registry.get(model)
        assert engine is not None
        assert engine in registry.live_engines()
    assert engine not in registry.live_engines()


def test_same_tokens_names_the_first_difference() -> None:
    expected = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert_same_tokens(expected.clone(), expected)
    with pytest.raises(AssertionError, match="row 1 differs first at column 2"):
        assert_same_tokens(torch.tensor([[1, 2, 3], [4, 5, 7]]), expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_tokens(expected[:, :2], expected)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_tokens(expected.int(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_worth_comparing(family: str) -> None:
    """Greedy output varies, and rounding of 1e-5 could not change it."""
    model = make_model(family)
    inputs = left_pad(random_prompts([3, 9, 17, 30]))
    output = model.generate(
        **inputs, max_new_tokens=60, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best = torch.stack(output.logits).topk(2).values  # [steps, rows, 2]
    assert (best[..., 0] - best[..., 1]).min() > 1e-4
    for row in output.sequences[:, 30:]:
        assert len(set(row.tolist())) >= 8 or EOS in row
    assert len({tuple(row.tolist()) for row in output.sequences[:, 30:]}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_the_same_every_time(family: str) -> None:
    state = torch.random.get_rng_state()
    first, again, other = make_model(family), make_model(family), make_model(family, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = left_pad(random_prompts([MAX_POSITIONS]))["input_ids"]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, again(ids).logits)
        assert not torch.equal(first(ids).logits, other(ids).logits)
