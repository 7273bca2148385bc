"""Which models are found, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2Model,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.gpt2 import modeling_gpt2

from hf_paged.errors import UnsupportedModelError
from hf_paged.patches import registry
from hf_paged.patches.apply import apply
from tests.helpers import FAMILIES, ROOT, make_model


class Subclass(modeling_gpt2.GPT2LMHeadModel):
    """Adds a method: forward stays upstream's."""

    def score(self) -> int:
        return 1


class OtherForward(modeling_gpt2.GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OtherAttention(modeling_gpt2.GPT2Attention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def no_layers(model: Any) -> None:
    model.transformer.h = nn.ModuleList()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_found(family: str) -> None:
    assert registry.find(make_model(family)).model_types == (family,)


def test_a_subclass_that_keeps_the_forward_is_found() -> None:
    model = Subclass(make_model("gpt2").config)
    assert registry.find(model) is registry.find(make_model("gpt2"))


@pytest.mark.parametrize("cls", [GPT2Model, GPT2DoubleHeadsModel, LlamaForSequenceClassification])
def test_classes_without_a_plain_head_are_refused(cls: type) -> None:
    family = "llama" if "Llama" in cls.__name__ else "gpt2"
    model = cls(make_model(family).config)
    with pytest.raises(
        UnsupportedModelError, match=rf"{cls.__name__} .*gpt2, gpt_bigcode, llama.*GPT2LMHeadModel"
    ):
        registry.find(model)


def test_another_family_is_refused() -> None:
    config = OPTConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        word_embed_proj_dim=16,
    )
    with pytest.raises(UnsupportedModelError, match="OPTForCausalLM is not supported"):
        registry.find(OPTForCausalLM(config))


def test_overridden_model_forward_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="OtherForward overrides the forward of GPT2LMHeadModel"):
        registry.find(OtherForward(make_model("gpt2").config))


def test_overridden_attention_forward_is_refused() -> None:
    model = make_model("gpt2")
    model.transformer.h[1].attn = OtherAttention(model.config, layer_idx=1)
    with pytest.raises(UnsupportedModelError, match="OtherAttention overrides the forward of GPT2Attention"):
        registry.find(model)


def test_a_foreign_attention_module_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[0].self_attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="Identity stands in place of LlamaAttention"):
        registry.find(model)


def test_a_monkey_patched_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    monkeypatch.setattr(modeling_gpt2.GPT2Attention, "forward", OtherAttention.forward)
    with pytest.raises(
        UnsupportedModelError, match=f"forward of GPT2Attention was replaced by one from '{__name__}'"
    ):
        registry.find(model)
    monkeypatch.undo()
    registry.find(model)


def test_layers_that_share_an_attention_module_are_refused() -> None:
    model = make_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="several layers share one attention module"):
        registry.find(model)


def test_a_model_without_layers_is_refused() -> None:
    model = make_model("gpt2")
    no_layers(model)
    with pytest.raises(UnsupportedModelError, match="no attention layers"):
        apply(model, registry.find(model))


def test_looking_up_one_family_imports_no_other() -> None:
    code = (
        "import sys, torch, transformers\n"
        "from hf_paged.patches import registry\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=60000))\n"
        "registry.find(model)\n"
        "assert 'transformers.models.llama.modeling_llama' not in sys.modules\n"
        "assert not {'numba', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_registered_spec_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))
    model = make_model("gpt2")
    spec = registry.find(model)
    mine = dataclasses.replace(spec, model_types=("mine",), model_class=registry.qualified_name(Subclass))
    registry.register(mine)
    assert registry.find(Subclass(model.config)) is mine
    assert registry.find(model) is spec
    assert "mine" in registry.supported_model_types()


def test_cross_attention_is_a_named_variant() -> None:
    model = make_model("gpt2", add_cross_attention=True)
    spec = registry.find(model)
    assert "add_cross_attention=True" in (spec.check(model) or "")
    applied = apply(model, spec)
    assert dict(applied.reasons()).keys() == {"unsupported_variant"}
    with torch.no_grad():
        model(torch.tensor([[4, 5]]))
