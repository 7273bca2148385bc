"""Adapters that change, and calls from many threads: each request has the adapters, and the weights, of its moment."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import peft
import pytest
import torch

import hf_paged
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


def test_threads_with_adapter_names_of_their_own() -> None:
    model = two()
    choices = [["a", "b", "a", "b"], ["b", "__base__", "b", "a"], None, ["__base__"] * 4]
    inputs = left_pad(PROMPTS) | GREEDY
    expected = [model.generate(**inputs, **({"adapter_names": c} if c else {})) for c in choices]
    hf_paged.enable(model)
    outputs: list[Any] = [None] * 12
    gate = threading.Barrier(len(outputs))

    def work(i: int) -> None:
        names = choices[i % 4]
        gate.wait()
        outputs[i] = model.generate(**inputs, **({"adapter_names": names} if names else {}))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(outputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(outputs[i], expected[i % 4]) for i in range(len(outputs)))
    assert hf_paged.stats(model).fallback_calls == {}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tuner", ["lora", "dora", "ia3"])
def test_an_adapter_in_training_serves_its_current_weights(tuner: str, fused: bool) -> None:
    model = peft_model("llama", {"a": config("llama", tuner), "b": config("llama", tuner)})
    hf_paged.enable(model)
    trained = [p for name, p in model.named_parameters() if ".a" in name and p.requires_grad]
    assert trained
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=fused)
    inputs = left_pad([PROMPTS[3], PROMPTS[2]])
    seen = set()
    frozen = [r.token_ids for r in hf_paged.generate_many(model, PROMPTS, adapters="b", **GREEDY)]
    for _ in range(4):
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with native_calls(model):
            served = model.generate(**inputs, **GREEDY)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_PAGED_DISABLE", "1")
            assert torch.equal(served, model.generate(**inputs, **GREEDY))
        seen.add(tuple(served.flatten().tolist()))
    assert len(seen) > 1, "the training changed nothing"
    assert [r.token_ids for r in hf_paged.generate_many(model, PROMPTS, adapters="b", **GREEDY)] == frozen


def test_adapters_that_come_and_go_while_enabled() -> None:
    model = make_model("gpt2")
    hf_paged.enable(model)
    base = model.generate(**left_pad(PROMPTS), **GREEDY)
    for _ in range(3):  # the ids of dropped layers are used again
        wrapped = peft.get_peft_model(model, config("gpt2")).eval()
        with native_calls(model):
            tuned = wrapped.generate(**left_pad(PROMPTS), **GREEDY)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_PAGED_DISABLE", "1")
            assert torch.equal(tuned, wrapped.generate(**left_pad(PROMPTS), **GREEDY))
        assert not torch.equal(tuned, base)
        wrapped.unload()
        del wrapped
        gc.collect()
        with native_calls(model):
            assert torch.equal(model.generate(**left_pad(PROMPTS), **GREEDY), base)


def test_merge_and_unload_while_enabled() -> None:
    reference = two().merge_and_unload(adapter_names=["a"])
    model = hf_paged.enable(two())
    merged = model.merge_and_unload(adapter_names=["a"])
    with native_calls(merged):
        output = merged.generate(**left_pad(PROMPTS), **GREEDY)
    assert torch.equal(output, reference.generate(**left_pad(PROMPTS), **GREEDY))


def test_a_dropped_peft_model_is_collected() -> None:
    model = two()
    hf_paged.enable(model)
    hf_paged.generate_many(model, PROMPTS, adapters=["a", "b", "a", "__base__"], **GREEDY)
    parts = [weakref.ref(m) for m in model.modules()]
    del model
    gc.collect()
    assert all(part() is None for part in parts)


def test_saved_and_copied_models_are_plain(tmp_path: Any) -> None:
    model = two()
    expected = alone(model, PROMPTS[0], "b")
    hf_paged.enable(model)
    hf_paged.generate_many(model, PROMPTS[:1], adapters="b", **GREEDY)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model("gpt2"), tmp_path / "b", adapter_name="b").eval()
    assert alone(loaded, PROMPTS[0], "b") == expected
    torch.save(model, tmp_path / "model.pt")
    copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not hf_paged.is_enabled(copied)
    assert alone(copied, PROMPTS[0], "b") == expected


def _edit(model: Any, name: str) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.mul_(-2.0)


def test_an_edit_of_an_adapter_that_nobody_runs_with_harms_nobody() -> None:
    plain = two()
    long = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    expected = alone(plain, PROMPTS[0], "a", **long)
    before = alone(plain, PROMPTS[3], "b")
    _edit(plain, "b")
    edited = alone(plain, PROMPTS[3], "b")
    assert edited != before, "the edit changes nothing: this would prove nothing"
    model = hf_paged.enable(two(), block_size=4)
    client = hf_paged.engine(model)
    for _ in range(2):
        assert client.submit(PROMPTS[3], adapter="b", **GREEDY).result(60).token_ids == before
    hits = hf_paged.stats(model).prefix_hit_tokens
    assert hits, "nothing was cached: this would prove nothing"
    running = client.submit(PROMPTS[0], adapter="a", **long)
    next(iter(running))
    _edit(model, "b")
    assert client.submit(PROMPTS[3], adapter="b", **GREEDY).result(60).token_ids == edited
    assert hf_paged.stats(model).prefix_hit_tokens == hits
    assert running.result(60).token_ids == expected


def test_an_edit_of_an_adapter_fails_its_own_requests_only() -> None:
    plain = two()
    long = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None}
    expected = {name: alone(plain, PROMPTS[0], name, **long) for name in ("a", "__base__")}
    model = hf_paged.enable(two(), block_size=4)
    client = hf_paged.engine(model)
    names = ("a", "b", "__base__")
    handles = {name: client.submit(PROMPTS[0], adapter=name, **long) for name in names}
    # Each step takes its time from now on, so that all still run when the adapter changes.
    embedding = model.get_input_embeddings()
    original = type(embedding).forward
    embedding.forward = lambda ids: time.sleep(0.003) or original(embedding, ids)
    next(iter(handles["b"]))
    _edit(model, "b")
    with pytest.raises(hf_paged.WeightsChangedError, match="paused"):
        handles["b"].result(60)
    assert {name: handles[name].result(60).token_ids for name in expected} == expected


@pytest.mark.parametrize("pool", [None, 80_000])
def test_adapters_survive_preemption(pool: int | None) -> None:
    model = two()
    prompts = random_prompts([10, 7, 12, 5, 9, 11], seed=2)
    names = ["a", "b", "__base__", "b", "a", "__base__"]
    options: dict[str, Any] = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
    expected = [alone(model, p, n, **options) for p, n in zip(prompts, names, strict=True)]
    hf_paged.enable(model, kv_cache_memory=pool, block_size=4)
    results = hf_paged.generate_many(model, prompts, adapters=names, **options)
    assert [r.token_ids for r in results] == expected
    assert bool(hf_paged.stats(model).preemptions) == (pool is not None)


def test_sampled_requests_do_not_depend_on_who_else_runs() -> None:
    model = hf_paged.enable(two())
    client = hf_paged.engine(model)
    options = {"max_new_tokens": 10, "do_sample": True, "top_k": 0, "seed": 11}
    single = client.submit(PROMPTS[1], adapter="b", **options).result(60).token_ids
    others = [client.submit(p, adapter=n, **GREEDY) for p in PROMPTS for n in ("a", "b", "__base__")]
    assert client.submit(PROMPTS[1], adapter="b", **options).result(60).token_ids == single
    for other in others:
        other.result(60)
