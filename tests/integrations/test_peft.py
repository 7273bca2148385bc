"""PEFT adapters on an enabled model: the active one, per row, per request. `test_peft_table` has every tuner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hf_paged
from tests.helpers import EOS, FAMILIES, left_pad, make_model, native_calls, random_prompts
from tests.integrations.peft_models import alone, config, peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = random_prompts([9, 4, 20, 33, 7, 5])
NAMES = ["a", "__base__", "b", "a", "b", "__base__"]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def tokens_of(output: torch.Tensor, width: int) -> list[list[int]]:
    """New tokens of each row up to its end of sequence."""
    rows = output[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def two(family: str, tuner: str) -> Any:
    return peft_model(family, {"a": config(family, tuner), "b": config(family, tuner)})


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_names_as_peft_serves_them(family: str, sampled: bool) -> None:
    model = two(family, "lora")
    options = left_pad(PROMPTS) | {"max_new_tokens": 10, "do_sample": sampled, "top_k": 20}
    torch.manual_seed(3)
    expected = model.generate(**options, adapter_names=NAMES)
    hf_paged.enable(model)
    torch.manual_seed(3)
    with native_calls(model):
        actual = model.generate(**options, adapter_names=NAMES)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "where", ["peft model", "model inside", "model that PEFT came to later", "added by transformers"]
)
def test_adapter_names_however_the_model_was_enabled(where: str) -> None:
    expected = two("llama", "lora").generate(**left_pad(PROMPTS), **GREEDY, adapter_names=NAMES)
    if where == "model that PEFT came to later":
        base = hf_paged.enable(make_model("llama"))
        reference = two("llama", "lora")
        import peft

        model = peft.get_peft_model(base, config("llama"), adapter_name="a")
        model.add_adapter("b", config("llama"))
        model.load_state_dict(reference.state_dict())
        model.eval()
    else:
        model = two("llama", "lora")
        hf_paged.enable(model if where == "peft model" else model.get_base_model())
    target = model.get_base_model() if where == "added by transformers" else model
    with native_calls(model):
        actual = target.generate(**left_pad(PROMPTS), **GREEDY, adapter_names=NAMES)
    assert torch.equal(actual, expected)


def test_several_copies_of_each_row() -> None:
    """PEFT itself refuses `adapter_names` here."""
    model = hf_paged.enable(two("gpt2", "lora"))
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with native_calls(model):
        output = model.generate(**left_pad(PROMPTS), **options, adapter_names=NAMES)
    greedy = model.generate(**left_pad(PROMPTS), max_new_tokens=6, do_sample=False, adapter_names=NAMES)
    assert torch.equal(output, greedy.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_eight_adapters_of_many_ranks(family: str) -> None:
    ranks = [4, 8, 16, 16, 24, 32, 48, 64]
    configs = {
        f"r{i}": config(family, r=rank, lora_alpha=8, use_rslora=bool(i % 2)) for i, rank in enumerate(ranks)
    }
    model = peft_model(family, configs)
    names = ["__base__", *configs] * 2
    prompts = random_prompts([3 + 5 * i % 37 for i in range(len(names))], seed=4)
    expected = [alone(model, prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    hf_paged.enable(model)
    results = hf_paged.generate_many(model, prompts, adapters=names, **GREEDY)
    assert [r.token_ids for r in results] == expected
    assert hf_paged.stats(model).steps <= 2 + GREEDY["max_new_tokens"], "the adapters did not share steps"
    handles = [
        hf_paged.engine(model).submit(p, adapter=n, **GREEDY) for p, n in zip(prompts, names, strict=True)
    ]
    assert [handle.result(60).token_ids for handle in handles] == expected


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bfloat16_adapters_of_another_dtype(backend: str) -> None:
    """Adapters in float32 on a base in bfloat16, PEFT's default: close to PEFT's own logits."""
    model = peft_model("llama", {"a": config("llama"), "b": config("llama", r=8)}, dtype=torch.bfloat16)
    options = left_pad(PROMPTS) | {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    expected = model.generate(**options, adapter_names=NAMES).logits[0].float()
    hf_paged.enable(model, backend=backend)
    with native_calls(model):
        actual = model.generate(**options, adapter_names=NAMES).logits[0].float()
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def test_several_active_adapters_add_up() -> None:
    model = two("llama", "lora")
    model.base_model.set_adapter(["a", "b"])
    expected = model.generate(**left_pad(PROMPTS), **GREEDY)
    hf_paged.enable(model)
    with native_calls(model):
        assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), expected)
    model.set_adapter("a")
    results = hf_paged.generate_many(model, PROMPTS, adapters=[["a", "b"]] * len(PROMPTS), **GREEDY)
    assert [r.token_ids for r in results] == tokens_of(expected, 33)


#: What users do between calls. Each step must give what the same step gives on a model that is not enabled.
SWITCHES: dict[str, Any] = {
    "other adapter": lambda m: m.set_adapter("b"),
    "scaled up": lambda m: [x.scale_layer(3.0) for x in m.modules() if hasattr(x, "scale_layer")],
    "set scale": lambda m: [x.set_scale("b", 0.5) for x in m.modules() if hasattr(x, "set_scale")],
    "merged": lambda m: m.merge_adapter(),
    "unmerged": lambda m: m.unmerge_adapter(),
    "both": lambda m: m.base_model.set_adapter(["a", "b"]),
    "back": lambda m: m.set_adapter("a"),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "enabled": lambda m: m.base_model.enable_adapter_layers(),
    "weighted": lambda m: m.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", combination_type="linear"),
    "the weighted one": lambda m: m.set_adapter("c"),
    "deleted": lambda m: m.delete_adapter("c"),
    "trained": lambda m: m.base_model.model.get_parameter(_lora_b(m)).data.mul_(-2.0),
    "back to b": lambda m: m.set_adapter("b"),
}


def _lora_b(model: Any) -> str:
    named = model.base_model.model.named_parameters()
    return next(name for name, _ in named if "lora_B" in name and ".a." in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_never_those_of_another_state(family: str) -> None:
    plain, model = two(family, "lora"), two(family, "lora")
    hf_paged.enable(model)
    inputs = left_pad([PROMPTS[3], PROMPTS[3]])  # long enough for cached blocks, which the second row takes

    def same() -> None:
        assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))

    same()
    seen = []
    for switch in SWITCHES.values():
        switch(plain)
        switch(model)
        with native_calls(model):
            same()
        with model.disable_adapter(), plain.disable_adapter():
            if not any(vars(m).get("merged_adapters") for m in model.modules()):
                same()
        same()
        seen.append(tuple(model.generate(**inputs, **GREEDY)[0].tolist()))
    assert len(set(seen)) > len(SWITCHES) // 2, "the switches change too little to show anything"
    assert hf_paged.stats(model).prefix_hit_tokens


def test_what_another_adapter_does_leaves_prefixes_alone() -> None:
    model = hf_paged.enable(two("gpt2", "lora"))
    hf_paged.generate_many(model, [PROMPTS[3]], adapters="a", **GREEDY)
    hits = hf_paged.stats(model).prefix_hit_tokens
    model.add_adapter("new", config("gpt2", r=8))
    model.set_adapter("b")
    hf_paged.generate_many(model, [PROMPTS[3]], adapters="a", **GREEDY)
    assert hf_paged.stats(model).prefix_hit_tokens == hits + 32


def test_a_request_keeps_the_adapters_it_was_submitted_with() -> None:
    model = two("gpt2", "lora")
    expected = {name: alone(model, PROMPTS[3], name) for name in ("a", "b", "__base__")}
    hf_paged.enable(model)
    client = hf_paged.engine(model)
    model.set_adapter("a")
    handles = {"a": client.submit(PROMPTS[3], **GREEDY)}
    with model.disable_adapter():
        handles["__base__"] = client.submit(PROMPTS[3], **GREEDY)
    model.set_adapter("b")
    handles["b"] = client.submit(PROMPTS[3], **GREEDY)
    model.set_adapter("a")
    assert {name: handle.result(60).token_ids for name, handle in handles.items()} == expected


def test_the_model_itself_is_not_switched() -> None:
    model = hf_paged.enable(two("llama", "dora"))
    hf_paged.generate_many(model, PROMPTS, adapters=NAMES, **GREEDY)
    assert model.active_adapter == "a"
    layers = [m for m in model.modules() if hasattr(type(m), "adapter_layer_names")]
    assert all(layer.active_adapters == ["a"] and not layer.disable_adapters for layer in layers)
    twin = copy.deepcopy(model)
    assert not any("forward" in vars(m) for m in twin.modules())
    hf_paged.disable(model)
    assert not any("forward" in vars(m) or "_enable_peft_forward_hooks" in vars(m) for m in model.modules())
