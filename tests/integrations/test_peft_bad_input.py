"""What is wrong with adapters: a table of mistakes, each a clear error beside requests that it does not harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_paged
from hf_paged.integrations.peft_checkpoints import load_adapter, unload_adapter
from tests.helpers import left_pad, native_calls, random_prompts
from tests.integrations.peft_models import alone, config, peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = random_prompts([9, 4, 20, 33])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
LONG: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}


class Mistake(NamedTuple):
    make: Callable[[Any, Path], object]  # with the model and a folder for checkpoints
    message: str
    error: type[Exception] = hf_paged.InvalidRequestError


def checkpoint(
    folder: Path, family: str = "gpt2", spoil: Callable[[Path], object] | None = None, **options: Any
) -> Path:
    peft_model(family, {"default": config(family)}, **options).save_pretrained(folder)
    if spoil is not None:
        spoil(folder / "adapter_model.safetensors")
    return folder


def filled(value: float) -> Callable[[Path], None]:
    def spoil(weights: Path) -> None:
        tensors = load_file(weights)
        next(iter(tensors.values())).view(-1)[-1] = value
        save_file(tensors, weights)

    return spoil


def many(names: Any) -> Callable[[Any, Path], object]:
    return lambda model, _: hf_paged.generate_many(model, PROMPTS, adapters=names, **GREEDY)


def rows(names: Any) -> Callable[[Any, Path], object]:
    return lambda model, _: model.generate(**left_pad(PROMPTS), **GREEDY, adapter_names=names)


def submitted(name: Any) -> Callable[[Any, Path], object]:
    return lambda model, _: hf_paged.engine(model).submit(PROMPTS[0], adapter=name, **GREEDY)


def load(name: str = "new", **options: Any) -> Callable[[Any, Path], object]:
    return lambda model, folder: load_adapter(model, checkpoint(folder, **options), name)


def replace(**options: Any) -> Callable[[Any, Path], object]:
    return lambda model, folder: load_adapter(model, checkpoint(folder, **options), "b", replace=True)


MISTAKES = {
    "unknown adapter, one of many": Mistake(many(["a", "nobody", "b", "a"]), r"adapters\[1\].*'nobody' is not loaded"),
    "unknown adapter, submitted": Mistake(submitted("nobody"), "'nobody' is not loaded; loaded: 'a', 'b'"),
    "unknown adapter, by row": Mistake(rows(["a", "nobody", "b", "a"]), "nobody", ValueError),
    "no name at all": Mistake(submitted(7), "adapter 7: must be a name"),
    "too few adapters": Mistake(many(["a", "b"]), "2 adapters for 4 prompts"),
    "too many adapters": Mistake(many(["a"] * 5), "5 adapters for 4 prompts"),
    "too few rows": Mistake(rows(["a", "b"]), "4", ValueError),
    "too many rows": Mistake(rows(["a"] * 5), "4", ValueError),
    "another base model": Mistake(load(family="llama"), "cannot be loaded into this model"),
    "other shapes": Mistake(load(n_embd=64), "cannot be loaded into this model"),
    "more layers": Mistake(load(n_layer=3), "do not belong to this model"),
    "not a number": Mistake(load(spoil=filled(float("nan"))), "has values that are not numbers"),
    "infinite": Mistake(load(spoil=filled(float("inf"))), "has values that are not numbers"),
    "a pickle": Mistake(load(spoil=lambda w: w.rename(w.with_name("adapter_model.bin"))), "is a pickle, which runs"),
    "cut short": Mistake(load(spoil=lambda w: w.write_bytes(w.read_bytes()[:-9])), "not a safetensors file"),
    "a replacement of other shapes": Mistake(replace(n_embd=64), "cannot be loaded into this model"),
    "a replacement that is no number": Mistake(replace(spoil=filled(float("nan"))), "not numbers"),
    "a name that is there": Mistake(load("a"), "'a' is loaded already"),
    "a name of the base": Mistake(load("__base__"), "adapter name '__base__'"),
    "a path as a name": Mistake(load("../../a"), r"adapter name '../../a': must be 1 to 128 letters"),
    "a path without dots": Mistake(load("etc/a"), "adapter name 'etc/a'"),
    "a dotted name": Mistake(load("a.b"), "adapter name 'a.b'"),
    "a folder that is none": Mistake(lambda m, f: load_adapter(m, f / ".." / "x", "new"), "no adapter_config.json"),
    "unloading what is not there": Mistake(lambda m, _: unload_adapter(m, "nobody"), "'nobody' is not loaded"),
}  # fmt: skip


@pytest.mark.parametrize("bounded", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_said_and_harms_nobody(tmp_path: Path, kind: str, bounded: bool) -> None:
    mistake = MISTAKES[kind]
    model = peft_model("gpt2", {"a": config("gpt2"), "b": config("gpt2", r=8)})
    names = ["a", "__base__", "b"]
    hf_paged.enable(model, max_resident_adapters=1 if bounded else None)
    client = hf_paged.engine(model)
    running = [client.submit(PROMPTS[3], adapter=name, **LONG) for name in names]
    with pytest.raises(mistake.error, match=mistake.message) as caught:
        mistake.make(model, tmp_path)
    assert len(str(caught.value)) < 600
    tokens = [handle.result(60).token_ids for handle in running]
    assert sorted(model.peft_config) == ["a", "b"]
    assert model.active_adapters == ["a"]
    with native_calls(model):
        (after,) = hf_paged.generate_many(model, PROMPTS[:1], adapters="b", **GREEDY)
    hf_paged.disable(model)
    assert tokens == [alone(model, PROMPTS[3], name, **LONG) for name in names]
    assert after.token_ids == alone(model, PROMPTS[0], "b")


@pytest.mark.parametrize("bounded", [False, True])
def test_unloading_an_adapter_in_use_waits_for_its_requests(tmp_path: Path, bounded: bool) -> None:
    model = peft_model("gpt2", {"a": config("gpt2"), "b": config("gpt2", r=8)})
    expected = alone(model, PROMPTS[3], "b", **LONG)
    model.set_adapter("a")
    model.save_pretrained(tmp_path)
    model.delete_adapter("b")
    hf_paged.enable(model, max_resident_adapters=1 if bounded else None)
    load_adapter(model, tmp_path / "b", "b")
    client = hf_paged.engine(model)
    handle = client.submit(PROMPTS[3], adapter="b", **LONG)
    next(iter(handle))
    unload_adapter(model, "b")
    assert handle.done
    assert handle.result().token_ids == expected
    with pytest.raises(hf_paged.InvalidRequestError, match="'b' is not loaded"):
        client.submit(PROMPTS[0], adapter="b", **GREEDY)
    assert not any(".b." in name for name, _ in model.named_parameters())


def test_numbers_that_are_none_in_the_file_never_reach_the_model(tmp_path: Path) -> None:
    model = hf_paged.enable(peft_model("gpt2", {"a": config("gpt2")}))
    with pytest.raises(hf_paged.InvalidRequestError, match="not numbers"):
        load_adapter(model, checkpoint(tmp_path, spoil=filled(float("nan"))), "new")
    assert all(torch.isfinite(p).all() for p in model.parameters())
