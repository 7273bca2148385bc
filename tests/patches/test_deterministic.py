"""What cannot be deterministic is refused by name, when it is enabled or when it is called; nothing runs silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_paged
from hf_paged.engine import runtime
from hf_paged.errors import ConfigError, FallbackError
from tests.helpers import FAMILIES, make_model, random_prompts
from tests.integrations.peft_models import config, peft_model

PROMPT = random_prompts([6])[0]


class OtherLinear(nn.Linear):
    pass


def with_other_linear(model: Any) -> None:
    model.lm_head = OtherLinear(64, 128, bias=False)


def with_other_dtype(model: Any) -> None:
    model.model.norm.double()


def with_strided_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn(128, 128)[:, ::2])


def with_forward(model: Any) -> None:
    layer = model.lm_head
    layer.forward = lambda x: type(layer).forward(layer, x)


def with_batch_norm(model: Any) -> None:
    model.model.layers[0].extra = nn.BatchNorm1d(4)


CHANGES = {
    with_other_linear: "OtherLinear",
    with_other_dtype: "float64",
    with_strided_weight: "strides",
    with_forward: "forward of a Linear was replaced",
    with_batch_norm: "BatchNorm1d",
}


@pytest.mark.parametrize("change", CHANGES)
def test_enable_names_what_cannot_be_and_leaves_the_model_alone(change: Any) -> None:
    model = make_model("llama")
    change(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=CHANGES[change]):
        hf_paged.enable(model, deterministic=True)
    assert not hf_paged.is_enabled(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("change", [with_other_linear, with_strided_weight, with_batch_norm])
def test_what_comes_later_is_refused_at_the_call(change: Any) -> None:
    model = make_model("llama")
    hf_paged.enable(model, deterministic=True)
    hf_paged.generate_many(model, [PROMPT], max_new_tokens=2)
    change(model)
    with pytest.raises(FallbackError, match=f"deterministic=True.*not_deterministic.*{CHANGES[change]}"):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=2)
    with pytest.raises(FallbackError, match=CHANGES[change]):
        hf_paged.generate_many(model, [PROMPT], max_new_tokens=2)
    with pytest.raises(FallbackError, match=CHANGES[change]):
        hf_paged.engine(model).submit(PROMPT, max_new_tokens=2)


def test_a_linear_that_came_later_is_refused_though_its_class_is_known() -> None:
    model = make_model("llama")
    hf_paged.enable(model, deterministic=True)
    model.lm_head = nn.Linear(64, 128, bias=False)
    with pytest.raises(FallbackError, match="a Linear came to the model"):
        hf_paged.engine(model).submit(PROMPT, max_new_tokens=2)


def test_a_call_that_would_fall_back_raises() -> None:
    model = make_model("gpt2")
    hf_paged.enable(model, deterministic=True)
    with pytest.raises(FallbackError, match="deterministic=True: use_cache"):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=2, use_cache=False)
    assert hf_paged.stats(model).fallback_calls == {}


def test_autocast_and_attentions_are_refused() -> None:
    model = make_model("gpt2", attn_implementation="eager")
    hf_paged.enable(model, deterministic=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(FallbackError, match="autocast is on"):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=2)
    with pytest.raises(FallbackError, match="output_attentions"):
        model.generate(
            torch.tensor([PROMPT]), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
        )


@pytest.mark.parametrize("backend", ["reference"])
def test_other_backends_are_refused(backend: str) -> None:
    with pytest.raises(ConfigError, match="needs backend='cpu'"):
        hf_paged.enable(make_model("gpt2"), deterministic=True, backend=backend)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cuda.*only the CPU is supported so far"):
        runtime.check_deterministic(torch.device("cuda"), "auto")
    with pytest.raises(ConfigError, match="meta"):
        hf_paged.enable(make_model("gpt2").to("meta"), deterministic=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tuner", ["dora", "embedding", "modules_to_save", "ia3"])
def test_adapters_without_row_kernels_are_refused(tuner: str) -> None:
    model = peft_model("llama", {"a": config("llama", tuner)})
    with pytest.raises(ConfigError, match="deterministic=True"):
        hf_paged.enable(model, deterministic=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_comes_later_is_served_or_refused() -> None:
    model = peft_model("llama", {"a": config("llama")})
    hf_paged.enable(model, deterministic=True)
    model.add_adapter("b", config("llama", r=8))
    assert hf_paged.engine(model).submit(PROMPT, adapter="b", max_new_tokens=2).result().token_ids
    model.add_adapter("c", config("llama", "dora"))
    with pytest.raises(FallbackError, match="LoRA of the kind Dora"):
        hf_paged.engine(model).submit(PROMPT, adapter="b", max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_disable_takes_everything_off(family: str) -> None:
    model = make_model(family)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    plain = model(torch.tensor([PROMPT])).logits
    hf_paged.enable(model, deterministic=True)
    hf_paged.generate_many(model, [PROMPT], max_new_tokens=2)
    assert torch.equal(model(torch.tensor([PROMPT])).logits, plain), "outside of steps nothing changes"
    hf_paged.disable(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(model(torch.tensor([PROMPT])).logits, plain)
