"""What goes wrong with adapters: said clearly, for that request only, and no block is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.integrations.peft_checkpoints import load_adapter, unload_adapter
from tests.helpers import left_pad, make_model, native_calls, random_prompts
from tests.integrations.peft_models import alone, config, peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = random_prompts([9, 4, 20, 33])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def two(family: str = "gpt2") -> Any:
    return peft_model(family, {"a": config(family), "b": config(family, r=8)})


def still_works(model: Any) -> None:
    with native_calls(model):
        (result,) = hf_paged.generate_many(model, PROMPTS[:1], adapters="a", **GREEDY)
    hf_paged.disable(model)
    assert result.token_ids == alone(model, PROMPTS[0], "a")


@pytest.mark.parametrize(
    "adapters, message",
    [
        (["a", "nobody", "a", "a"], r"adapters\[1\]: adapter 'nobody' is not loaded; loaded: 'a', 'b'"),
        ("nobody", "'nobody' is not loaded"),
        (["a", "b"], "2 adapters for 4 prompts"),
        (7, "adapters=7 for 4 prompts"),
        (["a", "b", 7, "a"], r"adapters\[2\]: adapter 7: must be a name"),
        (["a", "b", {}, "a"], r"adapters\[2\]"),
    ],
)
def test_generate_many_refuses_before_anything_runs(adapters: Any, message: str) -> None:
    model = hf_paged.enable(two())
    with pytest.raises(hf_paged.InvalidRequestError, match=message):
        hf_paged.generate_many(model, PROMPTS, adapters=adapters, **GREEDY)
    assert hf_paged.stats(model).requests == 0
    still_works(model)


def test_submit_refuses_unknown_names_and_models_without_adapters() -> None:
    model = hf_paged.enable(two())
    with pytest.raises(hf_paged.InvalidRequestError, match="'nobody' is not loaded"):
        hf_paged.engine(model).submit(PROMPTS[0], adapter="nobody", **GREEDY)
    still_works(model)
    plain = hf_paged.enable(make_model("gpt2"))
    with pytest.raises(hf_paged.InvalidRequestError, match="loaded: none"):
        hf_paged.engine(plain).submit(PROMPTS[0], adapter="a", **GREEDY)
    base = hf_paged.engine(plain).submit(PROMPTS[0], adapter="__base__", **GREEDY).result(60)
    assert base.token_ids == hf_paged.engine(plain).submit(PROMPTS[0], **GREEDY).result(60).token_ids


@pytest.mark.parametrize("inside", [False, True])
def test_adapter_names_of_the_wrong_length(inside: bool) -> None:
    model = hf_paged.enable(two())
    target = model.get_base_model() if inside else model
    with pytest.raises(ValueError, match="one name for each of the 4 prompts"):
        target.generate(**left_pad(PROMPTS), **GREEDY, adapter_names=["a", "b"])
    assert not any(m._forward_pre_hooks for m in model.modules()), "PEFT's hooks were left behind"
    still_works(model)


def test_names_only_the_engine_knows_never_get_lost_in_a_fallback() -> None:
    model = hf_paged.enable(two())
    names = ["a", "b", "a", "b"]
    with pytest.raises(hf_paged.FallbackError, match="adapter_names needs the engine"):
        model.get_base_model().generate(**left_pad(PROMPTS), **GREEDY, adapter_names=names, use_cache=False)
    still_works(model)


@pytest.mark.parametrize("inside", [False, True])
def test_beams_with_adapter_names(inside: bool) -> None:
    """`inside`: only the model within is enabled, and PEFT has named the adapter of each beam already."""
    model = two()
    options = left_pad(PROMPTS) | GREEDY | {"adapter_names": ["a", "b", "__base__", "a"], "num_beams": 2}
    expected = model.generate(**options)
    hf_paged.enable(model.get_base_model() if inside else model, fallback="error")
    with native_calls(model):
        assert torch.equal(model.generate(**options), expected)


def test_merged_adapters_cannot_be_chosen() -> None:
    model = hf_paged.enable(two())
    model.merge_adapter(["a"])
    with pytest.raises(hf_paged.InvalidRequestError, match="merged into the weights"):
        hf_paged.generate_many(model, PROMPTS, adapters="b", **GREEDY)
    model.unmerge_adapter()
    hf_paged.generate_many(model, PROMPTS, adapters="b", **GREEDY)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numbers_that_are_none_stay_with_their_adapter(backend: str) -> None:
    model = two("llama")
    expected = [alone(model, prompt, "a") for prompt in PROMPTS]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter.fill_(float("nan"))
    hf_paged.enable(model, backend=backend)
    results = hf_paged.generate_many(
        model, [p for p in PROMPTS for _ in "ab"], adapters=["a", "b"] * 4, **GREEDY
    )
    assert [r.token_ids for r in results[::2]] == expected


def test_an_adapter_removed_under_a_request_fails_that_request_alone() -> None:
    model = two()
    expected = alone(model, PROMPTS[3], "a", max_new_tokens=60)
    hf_paged.enable(model)
    client = hf_paged.engine(model)
    kept = client.submit(PROMPTS[3], adapter="a", max_new_tokens=60, do_sample=False)
    lost = client.submit(PROMPTS[3], adapter="b", max_new_tokens=90, do_sample=False, eos_token_id=None)
    next(iter(lost))
    model.delete_adapter("b")
    with pytest.raises(hf_paged.WeightsChangedError, match="adapter b was removed"):
        lost.result(60)
    assert kept.result(60).token_ids == expected


def saved(tmp_path: Path, family: str = "gpt2", **overrides: Any) -> Path:
    peft_model(family, {"default": config(family)}, **overrides).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a.b", "..", "__base__", "a\0", "x" * 200, "a\\b"])
def test_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(hf_paged.InvalidRequestError, match="adapter name"):
        load_adapter(two(), saved(tmp_path), name)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("holder", ["peft", "transformers"])
def test_load_serve_replace_unload(tmp_path: Path, holder: str, enabled: bool) -> None:
    folder = saved(tmp_path)
    reference = peft_model("gpt2", {"default": config("gpt2")})
    expected = alone(reference, PROMPTS[0], "default")
    model = two() if holder == "peft" else make_model("gpt2")
    if enabled:
        hf_paged.enable(model)
    load_adapter(model, folder, "new")
    hf_paged.enable(model)
    before = [
        r.token_ids
        for r in hf_paged.generate_many(model, PROMPTS[:1] * 2, adapters=["new", "__base__"], **GREEDY)
    ]
    assert before == [expected, alone(reference, PROMPTS[0], "__base__")]
    with pytest.raises(hf_paged.InvalidRequestError, match="loaded already"):
        load_adapter(model, folder, "new")
    load_adapter(model, folder, "new", replace=True)
    (after,) = hf_paged.generate_many(model, PROMPTS[:1], adapters="new", **GREEDY)
    assert after.token_ids == expected
    unload_adapter(model, "new")
    with pytest.raises(hf_paged.InvalidRequestError, match="'new' is not loaded"):
        hf_paged.generate_many(model, PROMPTS[:1], adapters="new", **GREEDY)
    with pytest.raises(hf_paged.InvalidRequestError, match="not loaded"):
        unload_adapter(model, "new")


def test_loading_waits_for_running_requests(tmp_path: Path) -> None:
    model = hf_paged.enable(two())
    handle = hf_paged.engine(model).submit(PROMPTS[0], adapter="a", max_new_tokens=60, do_sample=False)
    load_adapter(model, saved(tmp_path), "a", replace=True)
    assert handle.done
    assert handle.result().error is None


@pytest.mark.parametrize(
    "broken", ["pickle", "no weights", "no config", "not safetensors", "nan", "other shapes", "other model"]
)
def test_broken_checkpoints_leave_the_model_alone(tmp_path: Path, broken: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(
        tmp_path,
        "llama" if broken == "other model" else "gpt2",
        **({"n_embd": 64} if broken == "other shapes" else {}),
    )
    weights = folder / "adapter_model.safetensors"
    if broken in ("pickle", "no weights"):
        weights.rename(folder / "adapter_model.bin") if broken == "pickle" else weights.unlink()
    elif broken == "no config":
        (folder / "adapter_config.json").unlink()
    elif broken == "not safetensors":
        weights.write_bytes(b"no tensors here")
    elif broken == "nan":
        tensors = load_file(weights)
        next(iter(tensors.values())).fill_(float("nan"))
        save_file(tensors, weights)
    model = hf_paged.enable(two())
    with pytest.raises(
        hf_paged.InvalidRequestError, match="pickle" if broken == "pickle" else None
    ) as caught:
        load_adapter(model, folder, "new")
    assert "\n" not in str(caught.value)
    assert sorted(model.peft_config) == ["a", "b"]
    assert model.active_adapters == ["a"]
    still_works(model)


@pytest.mark.parametrize("names", ["a", 7, {"a": 1}])
def test_adapter_names_that_are_no_list(names: Any) -> None:
    model = hf_paged.enable(two())
    with pytest.raises(hf_paged.InvalidRequestError, match="must be a list"):
        model.get_base_model().generate(**left_pad(PROMPTS), **GREEDY, adapter_names=names)
    still_works(model)


def test_requests_that_need_the_original_run_it_with_their_adapter() -> None:
    """Contrastive processors and the like fall back; the adapter is entered for them and put back after."""
    model = two()
    options: dict[str, Any] = GREEDY | {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(40, 90))}
    names = ["a", "b", "__base__", "b"]
    expected = [alone(model, p, n, **options) for p, n in zip(PROMPTS, names, strict=True)]
    model.set_adapter("a")
    hf_paged.enable(model, fallback="silent")
    results = hf_paged.generate_many(model, PROMPTS, adapters=names, **options)
    assert [r.token_ids for r in results] == expected
    assert hf_paged.stats(model).fallback_calls
    assert model.active_adapters == ["a"]
    still_works(model)
