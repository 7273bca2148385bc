"""Every tuner of PEFT in every family: greedy and seeded tokens are PEFT's own, by the path that the document names."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_paged
from tests.helpers import EOS, FAMILIES, ROOT, left_pad, make_model, native_calls, random_prompts
from tests.integrations.peft_models import (
    ADAPTER_NAMES,
    LORA,
    NOT_BY_TOKEN,
    OTHERS,
    PROMPT_LEARNING,
    RARE,
    alone,
    config,
    peft_model,
    supported,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = random_prompts([9, 4, 20, 33, 7, 5])
NAMES = ["a", "__base__", "b", "a", "b", "__base__"]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "top_k": 20}
#: Rows of `docs/adapters.md`: | `tuner` | path |
_ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \|[^|]*\| (grouped|by adapter|`\w+`)[^|]* \|")


def documented() -> dict[str, str]:
    """Tuner -> what the document says of it: a path of `Explanation.adapters` or the code of a fallback."""
    lines = (ROOT / "docs" / "adapters.md").read_text().splitlines()
    return {
        name: match[2].strip("`")
        for line in lines
        if (match := _ROW.match(line))
        for name in re.findall(r"`(\w+)`", match[1])
    }


def cells(tuners: list[str]) -> list[tuple[str, str]]:
    return [(family, tuner) for family in FAMILIES for tuner in tuners if supported(family, tuner)]


def tokens_of(output: torch.Tensor, width: int = 33) -> list[list[int]]:
    """New tokens of each row up to its end of sequence."""
    rows = output[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def two(family: str, tuner: str) -> Any:
    if tuner == "adamss":
        pytest.importorskip("sklearn")
    # PEFT trains one AdaLoRA at a time.
    second = {"inference_mode": True} if tuner == "adalora" else {}
    strength = (
        2.0
        if tuner in ("loha", "boft", "orthogonal", "c3a", "deft", "vblora", "mica", "adamss", "tinylora")
        else 0.3
    )
    configs = {"a": config(family, tuner), "b": config(family, tuner, **second)}
    return peft_model(family, configs, strength=strength)


@contextmanager
def plain() -> Iterator[None]:
    """Calls inside run on the original `generate()`, of an enabled model too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_PAGED_DISABLE", "1")
        yield


def seeded(model: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model.generate(**left_pad(PROMPTS), **SAMPLED, **options)


def check(family: str, tuner: str) -> None:
    model = two(family, tuner)
    expected = [alone(model, prompt, name) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    assert alone(model, PROMPTS[0], "a") != alone(model, PROMPTS[0], "b"), "the adapters change nothing"
    model.set_adapter("a")
    greedy, sampled = model.generate(**left_pad(PROMPTS), **GREEDY), seeded(model)
    if tuner in ADAPTER_NAMES:
        mixed = seeded(model, adapter_names=NAMES)
        assert tokens_of(model.generate(**left_pad(PROMPTS), **GREEDY, adapter_names=NAMES)) == expected

    hf_paged.enable(model, fallback="error")
    explained = hf_paged.explain(model, **left_pad(PROMPTS), **GREEDY)
    assert explained.native
    assert explained.adapters == {"a": documented()[tuner], "b": documented()[tuner]}
    with native_calls(model, 2):
        assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), greedy)
        assert torch.equal(seeded(model), sampled)
    with native_calls(model, len(PROMPTS)):
        results = hf_paged.generate_many(model, PROMPTS, adapters=NAMES, **GREEDY)
    assert [r.token_ids for r in results] == expected
    with native_calls(model, 2):
        assert tokens_of(model.generate(**left_pad(PROMPTS), **GREEDY, adapter_names=NAMES)) == expected
        rows = seeded(model, adapter_names=NAMES)
    if tuner in ADAPTER_NAMES:
        assert torch.equal(rows, mixed)
    hf_paged.disable(model)
    assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), greedy)


def check_changed_weights(family: str, tuner: str) -> None:
    """Weights changed without a trace are served at the next call, and no prefix of the old ones."""
    model = hf_paged.enable(two(family, tuner), fallback="error")
    prompts = [PROMPTS[3], PROMPTS[2]]

    def served() -> list[list[int]]:
        results = hf_paged.generate_many(model, [*prompts, *prompts], adapters="a", **GREEDY)
        return [r.token_ids for r in results[2:]]

    before = served()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "a" in name.split(".") and parameter.is_floating_point():
            size = 6 * parameter.data.abs().mean().clamp(min=0.1)
            parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    with plain():
        expected = [alone(model, prompt, "a") for prompt in prompts]
    assert served() == expected
    assert expected != before, "the change changes nothing"


@pytest.mark.parametrize("family, tuner", cells([*LORA, *OTHERS]))
def test_every_common_tuner(family: str, tuner: str) -> None:
    check(family, tuner)


def test_some_rare_tuners(parity_seed: int) -> None:
    """A part of the table that rotates; all of it below."""
    possible = [cell for cell in cells(RARE) if cell[1] != "adamss"]
    for family, tuner in random.Random(f"rare:{parity_seed}").sample(possible, 8):
        check(family, tuner)


@pytest.mark.slow
@pytest.mark.parametrize("family, tuner", cells(RARE))
def test_every_rare_tuner(family: str, tuner: str) -> None:
    check(family, tuner)


@pytest.mark.slow
@pytest.mark.parametrize("family, tuner", cells([*LORA, *OTHERS, *RARE]))
def test_changed_weights_of_every_tuner(family: str, tuner: str) -> None:
    check_changed_weights(family, tuner)


@pytest.mark.parametrize("family, tuner", cells(NOT_BY_TOKEN))
def test_tuners_that_mix_tokens_are_a_named_fallback(family: str, tuner: str) -> None:
    model = two(family, tuner)
    greedy = model.generate(**left_pad(PROMPTS), **GREEDY)
    names = ["a", "b", "__base__", "b", "a", "a"]
    expected = [alone(model, p, n) for p, n in zip(PROMPTS, names, strict=True)]
    model.set_adapter("a")
    hf_paged.enable(model, fallback="silent")
    explained = hf_paged.explain(model, **left_pad(PROMPTS), **GREEDY)
    assert [r.code for r in explained.reasons] == ["adapter_kind"] == [documented()[tuner]]
    assert explained.adapters == {"a": "original", "b": "original"}
    assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), greedy)
    results = hf_paged.generate_many(model, PROMPTS, adapters=names, **GREEDY)
    assert [r.token_ids for r in results] == expected
    assert hf_paged.stats(model).fallback_calls == {"adapter_kind": 1 + len(PROMPTS)}
    with pytest.raises(hf_paged.FallbackError, match="adapter_kind"):
        hf_paged.engine(model).submit(PROMPTS[0], adapter="a", **GREEDY)


@pytest.mark.parametrize("tuner", PROMPT_LEARNING)
@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens_are_a_named_fallback(family: str, tuner: str) -> None:
    model = peft_model(family, {"default": config(family, tuner)})
    expected = model.generate(**left_pad(PROMPTS), **GREEDY)
    hf_paged.enable(model, fallback="silent")
    assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), expected)
    assert hf_paged.stats(model).fallback_calls == {documented()[tuner]: 1}


def test_a_kind_that_nobody_knows_is_a_named_fallback() -> None:
    """A forward of somebody else's in an adapter layer may look at anything."""
    from peft.tuners.lora import Linear

    class Own(Linear):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(x - x.mean(dim=1, keepdim=True), *args, **kwargs)

    model = two("llama", "lora")
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = Own
    expected = model.generate(**left_pad(PROMPTS), **GREEDY)
    hf_paged.enable(model, fallback="silent")
    assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), expected)
    assert hf_paged.stats(model).fallback_calls == {"adapter_kind": 1}
    assert "Own is not known" in str(hf_paged.explain(model, **left_pad(PROMPTS)))


@pytest.mark.parametrize("kind", ["adaption_prompt", "shadow"])
def test_tuners_that_replace_blocks_are_refused(kind: str) -> None:
    import peft

    settings: Any = (
        peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
        if kind == "adaption_prompt"
        else peft.ShadowConfig(r=4, shadow_num_hidden_layers=1, task_type="CAUSAL_LM")
    )
    model = peft.get_peft_model(make_model("llama"), settings).eval()
    before = model.generate(**left_pad(PROMPTS), **GREEDY)
    with pytest.raises(hf_paged.UnsupportedModelError, match=r"Adaption|Shadow"):
        hf_paged.enable(model)
    assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), before)


@pytest.mark.parametrize(
    "kind, code",
    [("multitask", "prepare_inputs_replaced"), ("poly", "forward_hooks"), ("xlora", "forward_hooks")],
)
def test_tuners_that_want_more_than_a_name_are_a_named_fallback(tmp_path: Path, kind: str, code: str) -> None:
    import peft

    base, given, common = (
        make_model("llama", use_cache=kind != "xlora"),
        {"task_ids": torch.tensor([0, 1] * 3)},
        {"task_type": "CAUSAL_LM"},
    )
    settings: Any
    if kind == "multitask":
        settings = peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, **common)
    elif kind == "poly":
        targets = ["q_proj", "down_proj"]
        settings = peft.PolyConfig(
            target_modules=targets, r=4, n_tasks=2, n_skills=2, init_weights=False, **common
        )
    else:
        two("llama", "lora").save_pretrained(tmp_path)
        experts = {str(i): str(tmp_path / name) for i, name in enumerate("ab")}
        settings = peft.XLoraConfig(hidden_size=64, xlora_depth=1, adapters=experts, **common)
        given = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, settings).eval()
    before = model.generate(**left_pad(PROMPTS), **GREEDY, **given)
    hf_paged.enable(model, fallback="silent")
    assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY, **given), before)
    assert hf_paged.stats(model).fallback_calls == {code: 1}


def test_the_table_names_every_tuner_of_peft() -> None:
    """A tuner that a newer PEFT brings has to be looked at before the document says anything of it."""
    import peft

    tested = {*OTHERS, *RARE, *NOT_BY_TOKEN, *PROMPT_LEARNING}
    assert tested | set(LORA) <= set(documented())
    said = {name.lower() for name in re.findall(r"`(\w+)`", (ROOT / "docs" / "adapters.md").read_text())}
    aliases = {"prompt_tuning": "prompt", "prefix_tuning": "prefix"}
    for kind in peft.PeftType:
        name = kind.value.lower()
        assert aliases.get(name, name) in said, f"docs/adapters.md says nothing of {name}"
