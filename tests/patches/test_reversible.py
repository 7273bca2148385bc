"""While patched a model is, for everybody but the engine, what it was; afterwards it is so attribute by attribute."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_paged.errors import UnsupportedModelError
from hf_paged.patches import registry
from hf_paged.patches.apply import apply
from hf_paged.step import active_step
from tests.helpers import FAMILIES, make_model, random_prompts
from tests.patches.packed import PackedRun, patch, plain_logits
from tests.patches.test_packed_parity import assert_close_rows

IDS = torch.tensor([random_prompts([12])[0], random_prompts([12], seed=1)[0]])
OURS = {"forward", "__getstate__", "_replicate_for_data_parallel"}


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every instance attribute of every module; values are compared by identity."""
    return {
        name: {key: id(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def assert_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        assert not OURS & set(vars(module)), f"{name} carries {OURS & set(vars(module))}"


def assert_paged_equals_plain(model: Any, applied: Any, atol: float = 1e-4) -> None:
    sequences = random_prompts([9, 14])
    assert_close_rows(PackedRun(model, applied, sequences).all_logits(), plain_logits(model, sequences), atol)


def train_step(model: Any) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.eval()
    return loss.detach(), gradients


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    # Active dropout: training draws from the generator, so that a changed number of draws shows.
    dropout = {"attention_dropout": 0.1} if request.param == "llama" else {}
    return make_model(request.param, **dropout)


def test_revert_restores_every_attribute(model: Any) -> None:
    before, state = attributes(model), {k: v.data_ptr() for k, v in model.state_dict().items()}
    applied = patch(model)
    assert attributes(model) != before
    PackedRun(model, applied, random_prompts([5])).all_logits()
    applied.revert()
    assert attributes(model) == before
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    applied.revert()
    assert attributes(model) == before


def test_another_model_of_the_class_is_untouched(model: Any) -> None:
    other = make_model(model.config.model_type)
    before = attributes(other)
    classes = {type(module): type(module).__dict__.get("forward") for module in model.modules()}
    applied = patch(model)
    assert attributes(other) == before
    assert {cls: cls.__dict__.get("forward") for cls in classes} == classes
    run = PackedRun(other, applied, random_prompts([5]))
    with active_step(run.inputs([(0, 5)])), torch.no_grad():
        inside = other(IDS).logits  # a step of somebody else
    assert torch.equal(inside, other(IDS).logits)
    assert torch.isnan(run.store[0][0]).all(), "another model's layers wrote to the store"


def test_another_patched_model_runs_plain_in_a_step_of_this_one(model: Any) -> None:
    other = make_model(model.config.model_type, seed=1)
    expected = other(IDS).logits
    applied = patch(model)
    patch(other)
    run = PackedRun(model, applied, random_prompts([5]))
    with active_step(run.inputs([(0, 5)])), torch.no_grad():
        assert torch.equal(other(IDS).logits, expected)
    assert torch.isnan(run.store[0][0]).all()


def test_plain_forward_and_training_are_bit_for_bit_the_same(model: Any) -> None:
    with torch.no_grad():
        logits = model(IDS).logits
        cached = model(IDS, use_cache=True).past_key_values
    loss, gradients = train_step(model)
    applied = patch(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
        again = model(IDS, use_cache=True).past_key_values
    assert torch.equal(again.layers[1].keys, cached.layers[1].keys)
    loss_again, gradients_again = train_step(model)
    assert torch.equal(loss, loss_again)
    assert all(map(torch.equal, gradients, gradients_again))
    applied.revert()
    assert torch.equal(train_step(model)[0], loss)


def test_plain_forward_in_another_thread_during_a_step(model: Any) -> None:
    expected = model(IDS).logits
    applied = patch(model)
    run = PackedRun(model, applied, random_prompts([5]))
    seen: list[Tensor] = []
    with active_step(run.inputs([(0, 5)])):
        thread = threading.Thread(target=lambda: seen.append(model(IDS).logits))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], expected)


def saved_by_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_by_torch],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_are_plain_and_work(model: Any, duplicate: Any) -> None:
    expected = model(IDS).logits
    applied = patch(model)
    before = attributes(model)
    twin = duplicate(model)
    assert_plain(twin)
    assert torch.equal(twin(IDS).logits, expected)
    assert attributes(model) == before
    run = PackedRun(model, applied, random_prompts([5]))
    with active_step(run.inputs([(0, 5)])), torch.no_grad():
        twin(IDS)
    assert torch.isnan(run.store[0][0]).all(), "a copy's layers ran paged"
    del model  # the twin must not depend on what it was copied from
    gc.collect()
    assert torch.equal(twin(IDS).logits, expected)
    assert_paged_equals_plain(twin, patch(twin))


def test_save_pretrained_and_state_dict_are_plain(model: Any, tmp_path: Path) -> None:
    expected, keys = model(IDS).logits, list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_plain(loaded)
    assert torch.equal(loaded(IDS).logits, expected)


def test_a_dropped_model_is_freed_while_the_patch_is_held(model: Any) -> None:
    family = model.config.model_type
    del model
    mine = make_model(family)
    applied = patch(mine)
    PackedRun(mine, applied, random_prompts([5])).all_logits()
    references = [weakref.ref(module) for module in mine.modules()]
    gc.collect()
    gc.disable()
    try:
        del mine
        alive = [reference() for reference in references if reference() is not None]
        assert not alive, "only the garbage collector could free these"
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="the patched model is gone"):
        applied.layer_geometry()
    applied.revert()


def test_a_failing_apply_leaves_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = attributes(model)
    calls = []

    def failing(patch_: Any, module: Any, layer: int, *args: Any) -> Any:
        calls.append(layer)
        if layer == 1:
            raise KeyboardInterrupt
        return original(patch_, module, layer, *args)

    from hf_paged.patches import apply as apply_module

    original = apply_module.bind
    monkeypatch.setattr(apply_module, "bind", failing)
    with pytest.raises(KeyboardInterrupt):
        patch(model)
    assert calls == [0, 1]
    assert attributes(model) == before


def test_applying_twice_is_refused_and_changes_nothing(model: Any) -> None:
    applied = patch(model)
    before = attributes(model)
    with pytest.raises(UnsupportedModelError, match=r"attention layer 0 of this .* is already patched"):
        apply(model, registry.find(model))
    assert attributes(model) == before
    assert_paged_equals_plain(model, applied)


def test_apply_again_after_revert(model: Any) -> None:
    patch(model).revert()
    assert_paged_equals_plain(model, patch(model))


def test_dtype_and_device_are_read_live(model: Any) -> None:
    applied = patch(model)
    assert {layer.dtype for layer in applied.layer_geometry()} == {torch.float32}
    model.bfloat16()
    assert {layer.dtype for layer in applied.layer_geometry()} == {torch.bfloat16}
    model.half()
    assert {layer.dtype for layer in applied.layer_geometry()} == {torch.float16}
    assert applied.reasons() == []
    model.float()
    assert_paged_equals_plain(model, applied)
    model.double()
    assert dict(applied.reasons()).keys() == {"unsupported_dtype"}
    model.to("meta")
    assert {layer.device.type for layer in applied.layer_geometry()} == {"meta"}
    assert "offloaded_weights" in dict(applied.reasons())


def test_resize_token_embeddings_while_patched(model: Any) -> None:
    applied = patch(model)
    model.resize_token_embeddings(160)
    assert applied.reasons() == []
    run = PackedRun(model, applied, random_prompts([7], vocab_size=160))
    assert_close_rows(run.all_logits(), plain_logits(model, run.sequences))
    applied.revert()
    assert_plain(model)


def test_compiled_plain_forward_is_unchanged(model: Any) -> None:
    """Dynamo traces through the binding without a break."""
    with torch.no_grad():
        expected = torch.compile(model, backend="eager", fullgraph=True)(IDS).logits
        torch._dynamo.reset()
        patch(model)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(IDS).logits, expected)
    torch._dynamo.reset()


def test_signature_of_the_forward_is_the_module_s_own(model: Any) -> None:
    import inspect

    layer = registry.find(model).find_attention_layers(model)[0]
    expected = inspect.signature(layer.forward)
    patch(model)
    assert inspect.signature(layer.forward) == expected
