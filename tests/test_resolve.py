"""Whatever a user holds, `resolve_model` finds the one HuggingFace model inside, or says what it was given."""

from __future__ import annotations

from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, pipeline
from transformers.pipelines.base import Pipeline

from hf_paged.errors import UnsupportedModelError
from hf_paged.resolve import lost_by_resolving, resolve_model
from tests.helpers import demo_model, demo_tokenizer, make_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def lora(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))


def prompt_tuning(model: Any) -> Any:
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def mixed(model: Any) -> Any:
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.PeftMixedModel(model, config, adapter_name="default")


def ddp(model: Any) -> Any:
    # A process group is needed to construct one; what is resolved is where it keeps the model.
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def text_pipeline(model: Any) -> Any:
    return pipeline("text-generation", model=model, tokenizer=demo_tokenizer("gpt2"))


WRAPPERS = {
    "itself": lambda model: model,
    "pipeline": text_pipeline,
    "LoRA": lora,
    "LoraModel": lambda model: lora(model).base_model,
    "mixed adapters": mixed,
    "prompt tuning": prompt_tuning,
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": ddp,
    "compiled DDP of LoRA": lambda model: torch.compile(ddp(lora(model))),
    "accelerate": lambda model: accelerate.Accelerator(cpu=True).prepare(model),
    "pipeline of LoRA": lambda model: text_pipeline(lora(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_inside_is_found(wrapper: str) -> None:
    model = demo_model("gpt2") if "pipeline" in wrapper else make_model("gpt2")
    before = set(vars(model))
    wrapped = WRAPPERS[wrapper](model)
    assert resolve_model(wrapped) is model
    assert set(vars(model)) >= before
    if "pipeline" in wrapper:
        assert isinstance(wrapped, Pipeline)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_lost_by_using_the_inner_model(wrapper: str) -> None:
    model = demo_model("gpt2") if "pipeline" in wrapper else make_model("gpt2")
    lost = lost_by_resolving(WRAPPERS[wrapper](model))
    if wrapper == "prompt tuning":
        assert lost is not None
        assert "virtual tokens" in lost
    else:
        assert lost is None


def looped() -> Any:
    wrapper = ddp(nn.Linear(1, 1))
    object.__setattr__(wrapper, "module", wrapper)
    del wrapper._modules["module"]
    return wrapper


@pytest.mark.parametrize(
    "obj, message",
    [
        (None, "NoneType holds no transformers PreTrainedModel: pass a model"),
        ("gpt2", "str holds no transformers PreTrainedModel"),
        (GPT2LMHeadModel, r"type holds .*\(a class: pass an instance\)"),
        (nn.Linear(1, 1), "Linear holds no"),
        (nn.DataParallel(nn.Linear(1, 1)), "DataParallel around a Linear holds no"),
        (looped(), "DistributedDataParallel holds no"),
    ],
)
def test_anything_else_is_named_and_refused(obj: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(obj)
    assert lost_by_resolving(obj) is None
