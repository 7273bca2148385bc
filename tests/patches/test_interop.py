"""Other libraries change a model, before the patch and while it is on: accelerate, PEFT, quantised linears."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from tests.helpers import FAMILIES, make_model, random_prompts
from tests.patches.packed import PackedRun, patch, plain_logits
from tests.patches.test_packed_parity import assert_close_rows
from tests.patches.test_reversible import IDS, assert_plain, attributes

pytestmark = [
    # Upstream's and PEFT's own business.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def assert_paged(model: Any, applied: Any, plain: Any = None, atol: float = 1e-4) -> None:
    assert applied.reasons() == []
    sequences = random_prompts([9, 14])
    expected = plain_logits(plain if plain is not None else model, sequences)
    run = PackedRun(model, applied, sequences)
    assert_close_rows(run.all_logits(), expected, atol)
    assert not torch.isnan(run.store[0][0]).all(), "the step did not run paged"


def dispatch(model: Any) -> Any:
    accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    return model


def hook_everything(model: Any) -> Any:
    """As a device_map over several devices does: a hook on every module, attention included."""
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


HOOKED = [dispatch, hook_everything]


@pytest.mark.parametrize("hooked", HOOKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_hooks_before(family: str, hooked: Any) -> None:
    model = hooked(make_model(family))
    before = attributes(model)
    applied = patch(model)
    assert_paged(model, applied, make_model(family))
    assert torch.equal(model(IDS).logits, make_model(family)(IDS).logits)
    applied.revert()
    assert attributes(model) == before


@pytest.mark.parametrize("hooked", HOOKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_hooks_while_patched(family: str, hooked: Any) -> None:
    model = make_model(family)
    applied = patch(model)
    hooked(model)
    assert_paged(model, applied, make_model(family))
    applied.revert()
    assert torch.equal(model(IDS).logits, make_model(family)(IDS).logits)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        forward = vars(module).get("forward")  # accelerate leaves the bound method behind
        assert forward is None or forward.__func__ is type(module).forward
        assert "__getstate__" not in vars(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_hooks_removed_while_patched(family: str) -> None:
    model = hook_everything(make_model(family))
    applied = patch(model)
    remove_hook_from_module(model, recurse=True)
    assert_paged(model, applied)
    applied.revert()
    for module in model.modules():
        forward = vars(module).get("forward")
        assert forward is None or forward.__func__ is type(module).forward
    assert torch.equal(model(IDS).logits, make_model(family)(IDS).logits)


def test_attention_hook_still_places_the_inputs() -> None:
    model = hook_everything(make_model("llama"))
    seen = []
    attention = model.model.layers[0].self_attn
    pre_forward = attention._hf_hook.pre_forward
    attention._hf_hook.pre_forward = lambda *args, **kwargs: (seen.append(1), pre_forward(*args, **kwargs))[1]
    PackedRun(model, patch(model), random_prompts([4])).all_logits()
    assert seen


def test_deepcopy_of_a_hooked_model_is_bound_to_itself() -> None:
    model = hook_everything(make_model("gpt2"))
    applied = patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.h[0].attn.c_proj.weight.zero_()
    assert torch.equal(model(IDS).logits, make_model("gpt2")(IDS).logits)
    applied.revert()


def test_from_pretrained_with_a_device_map(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path)
    model = type(make_model("gpt2")).from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert_paged(model, patch(model), make_model("gpt2"))


def lora(model: Any, **options: Any) -> Any:
    targets = ["q_proj", "v_proj", "o_proj"] if model.config.model_type == "llama" else ["c_attn", "c_proj"]
    config = peft.LoraConfig(
        r=4,
        target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",
        init_lora_weights=False,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("when", ["before", "while patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str, when: str) -> None:
    model = make_model(family)
    if when == "before":
        wrapped = lora(model)
        applied = patch(model)
    else:
        applied = patch(model)
        wrapped = lora(model)
    expected = plain_logits(lora(make_model(family)), random_prompts([9]))
    assert (expected[0] - plain_logits(make_model(family), random_prompts([9]))[0]).abs().max() > 1e-2
    assert_paged(model, applied, lora(make_model(family)))
    with wrapped.disable_adapter():
        assert_paged(model, applied, make_model(family))
    wrapped.merge_adapter()
    assert_paged(model, applied, lora(make_model(family)))
    wrapped.unmerge_adapter()
    applied.revert()
    assert_plain(model)
    assert_close_rows(plain_logits(wrapped, random_prompts([9])), expected)


def test_dora_and_modules_to_save() -> None:
    model = make_model("llama")
    wrapped = lora(model, use_dora=True, modules_to_save=["lm_head"])
    assert_paged(model, patch(model), wrapped)


def test_layernorm_tuning_keeps_its_own_norm() -> None:
    model = make_model("llama")
    targets = ["input_layernorm"]
    wrapped = peft.get_peft_model(
        model, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)
    ).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "ln_tuning" in name:
                parameter.mul_(1.5)
    assert_paged(model, patch(model))


class Int8Linear(nn.Module):
    """A linear whose weight is int8 and whose `weight` says nothing about the dtype it computes in."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax() / 127, requires_grad=False)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.transposed = type(linear).__name__ == "Conv1D"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight.T if self.transposed else weight, self.bias)


def quantise(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("Linear", "Conv1D") and name != "lm_head":
                setattr(module, name, Int8Linear(child))
    return model


@pytest.mark.parametrize("when", ["before", "while patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_linears(family: str, when: str) -> None:
    model = make_model(family)
    if when == "before":
        quantise(model)
    applied = patch(model)
    if when == "while patched":
        quantise(model)
    assert {layer.dtype for layer in applied.layer_geometry()} == {torch.float32}
    assert_paged(model, applied)


def test_linears_quantised_by_the_range_of_their_input_are_a_named_fallback() -> None:
    """They are read without an error, too: `weight` is a method there, and there are no parameters at all."""
    model = make_model("llama")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    applied = patch(quantised)
    assert {(layer.dtype, layer.device.type) for layer in applied.layer_geometry()} == {
        (torch.float32, "cpu")
    }
    assert dict(applied.reasons()).keys() == {"batch_dependent"}
    sequences = random_prompts([9, 14])
    alone, beside = (
        plain_logits(quantised, sequences),
        PackedRun(quantised, applied, sequences).step((0, 9), (1, 14)),
    )
    assert (alone[0] - beside[0]).abs().max() > 1e-3, "packing is exact: the reason can go"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_in_training_mode(family: str) -> None:
    without = {} if family == "llama" else dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = make_model(family, **without)
    applied = patch(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert_paged(model, applied)


def test_mixed_precision_of_accelerate_around_the_model() -> None:
    model = make_model("gpt2")
    applied = patch(model)
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
    sequences = random_prompts([9, 14])
    exact = torch.cat(plain_logits(make_model("gpt2"), sequences))
    upstream = torch.cat(plain_logits(model, sequences))
    ours = torch.cat(PackedRun(model, applied, sequences).all_logits())
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() <= 2 * (upstream - exact).abs().mean()
