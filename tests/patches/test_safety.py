"""What is reported as unsafe for native execution, and what is known to be harmless."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2 import modeling_gpt2

from hf_paged.patches import safety
from tests.helpers import FAMILIES, make_model
from tests.patches.packed import patch

IDS = torch.tensor([[4, 5, 6]])


def codes(applied: Any) -> set[str]:
    return {code for code, _ in applied.reasons()}


def noop(*args: Any) -> None:
    return None


def wrap_forward(module: Any) -> Callable[[], None]:
    had = vars(module).get("forward")
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)

    def undo() -> None:
        if had is None:
            del module.forward
        else:
            module.forward = had

    return undo


def hook(register: str, part: Callable[[Any], nn.Module]) -> Callable[[Any], Callable[[], None]]:
    return lambda model: getattr(part(model), register)(noop).remove


def attribute(part: Callable[[Any], Any], name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    def make(model: Any) -> Callable[[], None]:
        target = part(model)
        before = getattr(target, name)
        setattr(target, name, value)
        return lambda: setattr(target, name, before)

    return make


def swap_layer(model: Any) -> Callable[[], None]:
    block = model.transformer.h[1]
    before = block.attn
    block.attn = modeling_gpt2.GPT2Attention(model.config, layer_idx=1)
    return lambda: setattr(block, "attn", before)


def drop_layer(model: Any) -> Callable[[], None]:
    before = model.transformer.h
    model.transformer.h = before[:1]
    return lambda: setattr(model.transformer, "h", before)


def own_prepare(model: Any) -> Callable[[], None]:
    model.prepare_inputs_for_generation = noop
    return lambda: delattr(model, "prepare_inputs_for_generation")


def compile_model(model: Any) -> Callable[[], None]:
    model.compile()
    return lambda: setattr(model, "_compiled_call_impl", None)


def compile_block(model: Any) -> Callable[[], None]:
    before = model.transformer.h[0]
    model.transformer.h[0] = torch.compile(before, backend="eager")
    return lambda: model.transformer.h.__setitem__(0, before)


def compile_forward(model: Any) -> Callable[[], None]:
    model.forward = torch.compile(model.forward, backend="eager")
    return lambda: delattr(model, "forward")


def train(model: Any) -> Callable[[], None]:
    model.train()
    return model.eval


def attention_of(model: Any) -> Any:
    return model.transformer.h[1].attn


#: what happens to an enabled GPT-2 -> the code it is reported under; each returns its undo
UNSAFE = {
    "hook on the model": ("forward_hooks", hook("register_forward_hook", lambda m: m)),
    "pre-hook on the model": ("forward_hooks", hook("register_forward_pre_hook", lambda m: m)),
    "hook on attention": ("forward_hooks", hook("register_forward_hook", attention_of)),
    "hook on a linear": (
        "forward_hooks",
        hook("register_forward_hook", lambda m: m.transformer.h[0].mlp.c_fc),
    ),
    "global hook": ("forward_hooks", lambda m: nn.modules.module.register_module_forward_hook(noop).remove),
    "global pre-hook": (
        "forward_hooks",
        lambda m: nn.modules.module.register_module_forward_pre_hook(noop).remove,
    ),
    "wrapped attention": ("forward_replaced", lambda m: wrap_forward(attention_of(m))),
    "wrapped model": ("forward_replaced", wrap_forward),
    "wrapped mlp": ("forward_replaced", lambda m: wrap_forward(m.transformer.h[0].mlp)),
    "wrapped activation": ("forward_replaced", lambda m: wrap_forward(m.transformer.h[0].mlp.act)),
    "compiled model": ("compiled_forward", compile_model),
    "compiled block": ("compiled_forward", compile_block),
    "compiled forward": ("compiled_forward", compile_forward),
    "swapped layer": ("layers_changed", swap_layer),
    "dropped layer": ("layers_changed", drop_layer),
    "training": ("dropout_active", train),
    "own attention": (
        "attention_implementation",
        attribute(lambda m: m.config, "_attn_implementation_internal", "mine"),
    ),
    "own prepare_inputs": ("prepare_inputs_replaced", own_prepare),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_unsafe_is_reported_as_long_as_it_lasts(what: str) -> None:
    code, happen = UNSAFE[what]
    model = make_model("gpt2")
    applied = patch(model)
    assert applied.reasons() == []
    undo = happen(model)
    assert code in codes(applied)
    undo()
    assert applied.reasons() == []


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_forward_replaced_before_is_reported_too(part: str) -> None:
    model = make_model("gpt2")
    wrap_forward(attention_of(model) if part == "attention" else model.transformer.h[0].mlp)
    applied = patch(model)
    assert codes(applied) == {"forward_replaced"}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, make_model("gpt2")(IDS).logits)


def test_wrapping_before_and_reverting_before_the_next_apply() -> None:
    """A wrapper of an earlier binding of ours is left by revert; applied again, it lies below and is reported."""
    model = make_model("gpt2")
    applied = patch(model)
    undo = wrap_forward(attention_of(model))
    applied.revert()
    again = patch(model)
    assert codes(again) == {"forward_replaced"}
    again.revert()
    del undo


def test_monkey_patched_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    applied = patch(model)
    monkeypatch.setattr(modeling_gpt2.GPT2Block, "forward", lambda *args, **kwargs: None)
    assert codes(applied) == {"class_forward_replaced"}


def test_overridden_prepare_inputs() -> None:
    class Own(GPT2LMHeadModel):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model = Own(make_model("gpt2").config).eval()
    assert codes(patch(model)) == {"prepare_inputs_replaced"}


def test_prepare_inputs_put_back_as_an_instance_attribute_is_harmless() -> None:
    """PEFT leaves the model's own method behind like this."""
    model = make_model("gpt2")
    applied = patch(model)
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    assert applied.reasons() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_training_without_dropout_is_safe(family: str) -> None:
    without = (
        {"attention_dropout": 0.0}
        if family == "llama"
        else dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    )
    model = make_model(family, **without)
    applied = patch(model)
    model.train()
    assert applied.reasons() == []


def test_functional_attention_dropout_counts() -> None:
    model = make_model("llama", attention_dropout=0.1)
    applied = patch(model)
    model.train()
    assert codes(applied) == {"dropout_active"}
    model.model.eval()
    assert applied.reasons() == []


def test_hooks_known_to_be_harmless() -> None:
    model = make_model("gpt2")
    applied = patch(model)
    with torch.no_grad():
        model(IDS, output_hidden_states=True, output_attentions=False)
    assert any(module._forward_hooks for module in model.modules()), "upstream no longer captures by hooks"
    model.enable_input_require_grads()
    prune.l1_unstructured(model.transformer.h[0].attn.c_proj, "weight", amount=0.1)
    assert applied.reasons() == []


def test_backward_hooks_are_harmless() -> None:
    model = make_model("gpt2")
    applied = patch(model)
    model.transformer.h[0].register_full_backward_hook(noop)
    assert applied.reasons() == []


def test_mixed_precision_of_accelerate_is_harmless_and_other_wrappers_are_not() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model("gpt2")
    applied = patch(model)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(
        model, evaluation_mode=True
    )
    assert prepared is model
    assert "forward" in vars(model)
    assert applied.reasons() == []
    model.forward = types.MethodType(lambda self, *args, **kwargs: None, model)
    assert codes(applied) == {"forward_replaced"}


def test_weights_that_are_not_in_memory() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model("gpt2")
    applied = patch(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert "offloaded_weights" in codes(applied)


def test_adapters_chosen_row_by_row() -> None:
    peft = pytest.importorskip("peft")
    model = make_model("gpt2")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    ).eval()
    applied = patch(model)
    assert applied.reasons() == []
    with wrapped._enable_peft_forward_hooks(adapter_names=["default"]):
        assert codes(applied) == {"adapter_names"}
    assert applied.reasons() == []


def test_a_partial_that_is_not_peft_s_is_a_foreign_hook() -> None:
    model = make_model("gpt2")
    applied = patch(model)
    model.lm_head.register_forward_pre_hook(functools.partial(noop, 1))
    assert codes(applied) == {"forward_hooks"}


def test_every_code_is_documented() -> None:
    assert {code for code, _ in UNSAFE.values()} <= set((safety.__doc__ or "").split())


def test_texts_name_the_culprit() -> None:
    model = make_model("gpt2")
    applied = patch(model)
    attention_of(model).register_forward_hook(noop)
    assert applied.reasons() == [("forward_hooks", f"GPT2Attention has the forward hook {__name__}.noop")]


def test_checks_are_cheap_enough_for_every_call() -> None:
    """At most 0.3 ms on the shape of GPT-2 124M; the best of many, as other work may share the machine."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config()).eval()
    applied = patch(model)
    best = float("inf")
    for _ in range(60):
        start = time.perf_counter()
        applied.reasons()
        best = min(best, time.perf_counter() - start)
    assert best < 0.3e-3 * 2  # twice the budget: the test is for a change of kind, not of 20 %
