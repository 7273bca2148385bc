"""Weights that change between calls, and while requests run: never an answer from keys and values of old ones.

Merging, scaling and switching of adapters: `tests/integrations/test_peft.py`.
"""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import hf_paged
from hf_paged.engine import registry
from hf_paged.errors import EngineStateError
from tests.helpers import FAMILIES, assert_same_tokens, left_pad, make_model, native_calls, random_prompts

SHARED = random_prompts([40])[0]
INPUTS = left_pad([[*SHARED, 5], [*SHARED, 6]])
LONG = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None}
DEADLINE_S = 60


def _optimizer(model: nn.Module, **options: Any) -> None:
    model.train()
    torch.manual_seed(0)  # dropout
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.05, **options).step()
    model.zero_grad()
    model.eval()


def _projection(model: Any) -> nn.Module:
    """A layer whose weight decides over keys and values."""
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    attention = layers[0].attn if hasattr(layers[0], "attn") else layers[0].self_attn
    return attention.c_attn if hasattr(attention, "c_attn") else attention.k_proj


def _other_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.roll(1, 0) if value.ndim > 1 else value for name, value in model.state_dict().items()}


def _inference_weight(model: nn.Module) -> None:
    with torch.inference_mode():
        weight = _projection(model).weight.detach() * -1.5
    _projection(model).weight = nn.Parameter(weight, requires_grad=False)


def _inference_edit(model: nn.Module) -> None:
    _inference_weight(model)
    model.generate(**INPUTS, max_new_tokens=2)
    with torch.inference_mode():
        _projection(model).weight.mul_(-0.5)


def _activation(model: Any) -> None:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    setattr(layers[0].mlp, "act" if hasattr(layers[0].mlp, "act") else "act_fn", nn.Tanh())


def _norm_epsilon(model: Any) -> None:
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 30.0)


CHANGES: dict[str, Any] = {
    "AdamW": lambda m: _optimizer(m),
    "fused AdamW": lambda m: _optimizer(m, fused=True),
    "foreach AdamW": lambda m: _optimizer(m, foreach=True),
    ".data.copy_": lambda m: _projection(m).weight.data.copy_(_projection(m).weight.data * -1.5),
    ".data =": lambda m: setattr(_projection(m).weight, "data", _projection(m).weight.data * -1.5),
    "another parameter": lambda m: setattr(
        _projection(m), "weight", nn.Parameter(_projection(m).weight.detach() * -1.5)
    ),
    "load_state_dict": lambda m: m.load_state_dict(_other_state(m)),
    "load_state_dict, assign": lambda m: m.load_state_dict(_other_state(m), assign=True),
    ".to(dtype)": lambda m: m.to(torch.bfloat16),
    ".to(dtype) and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "weight of inference mode": _inference_weight,
    "edit of a weight of inference mode": _inference_edit,
    "another activation": _activation,
    "another epsilon": _norm_epsilon,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_between_calls_leaves_no_stale_prefix(family: str) -> None:
    for name, change in CHANGES.items():
        model, plain = make_model(family), make_model(family)
        # One kernel throughout: in bfloat16 another one rounds differently.
        options = {"block_size": 4, "kv_cache_memory": "4MiB", "backend": "reference"}
        hf_paged.enable(model, **options)
        before = model.generate(**INPUTS, max_new_tokens=12, do_sample=False)
        model.generate(**INPUTS, max_new_tokens=12, do_sample=False)
        assert hf_paged.stats(model).prefix_hit_tokens, "nothing was cached: this would prove nothing"
        change(model)
        change(plain)
        with native_calls(model):
            after = model.generate(**INPUTS, max_new_tokens=12, do_sample=False)
        if plain.dtype is torch.float32:
            assert_same_tokens(after, plain.generate(**INPUTS, max_new_tokens=12, do_sample=False))
        fresh = hf_paged.enable(copy.deepcopy(model), **options)
        assert_same_tokens(after, fresh.generate(**INPUTS, max_new_tokens=12, do_sample=False))
        if "and back" not in name and plain.dtype is torch.float32:
            assert not torch.equal(after, before), f"{name} changes nothing: this would prove nothing"
        hf_paged.disable(model)
        hf_paged.disable(fresh)


ROTARY_CHANGES: dict[str, Any] = {
    "frequencies edited": lambda m: m.model.rotary_emb.inv_freq.mul_(0.1),
    "other frequencies": lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 0.1),
    "scaled rotation": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 2.0),
    "scaled attention": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.0),
}


@pytest.mark.parametrize("name", ROTARY_CHANGES)
def test_what_is_no_weight_leaves_no_stale_prefix_either(name: str) -> None:
    model, plain = make_model("llama"), make_model("llama")
    hf_paged.enable(model, block_size=4, kv_cache_memory="4MiB")
    kwargs = INPUTS | {"max_new_tokens": 12, "do_sample": False}
    before = [model.generate(**kwargs) for _ in range(2)][1]
    assert hf_paged.stats(model).prefix_hit_tokens
    for one in (model, plain):
        ROTARY_CHANGES[name](one)
    with native_calls(model):
        after = model.generate(**kwargs)
    assert_same_tokens(after, plain.generate(**kwargs))
    assert not torch.equal(after, before), f"{name} changes nothing: this would prove nothing"


def test_a_growing_rope_keeps_its_prefixes() -> None:
    """Its frequencies are other ones after a long forward, and again after a short one."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_model("llama", rope_parameters=rope)
    hf_paged.enable(model, block_size=4, kv_cache_memory="4MiB")
    model.generate(**INPUTS, max_new_tokens=2)
    hits = hf_paged.stats(model).prefix_hit_tokens
    model(torch.tensor(random_prompts([150])))
    model.generate(**INPUTS, max_new_tokens=2)
    assert hf_paged.stats(model).prefix_hit_tokens > hits


@pytest.fixture
def model() -> Iterator[Any]:
    model = make_model("llama")
    hf_paged.enable(model, block_size=4, kv_cache_memory="4MiB")
    yield model
    hf_paged.disable(model)


@pytest.mark.parametrize(
    "name", ["AdamW", "fused AdamW", ".data.copy_", "load_state_dict", "another parameter"]
)
def test_a_change_under_running_requests_fails_those_and_no_later_one(model: Any, name: str) -> None:
    plain = make_model("llama")
    client = hf_paged.engine(model)
    handles = [client.submit([*SHARED, i], **LONG) for i in range(5, 9)]
    slow = _slowed(model)
    next(iter(handles[0]))
    with torch.no_grad() if "AdamW" not in name else torch.enable_grad():
        CHANGES[name](model)
        CHANGES[name](plain)
    for handle in handles:
        with pytest.raises(hf_paged.WeightsChangedError, match="paused"):
            handle.result(timeout=DEADLINE_S)
    slow.remove()
    assert_same_tokens(
        model.generate(**INPUTS, max_new_tokens=12, do_sample=False),
        plain.generate(**INPUTS, max_new_tokens=12, do_sample=False),
    )
    assert hf_paged.stats(model).kv_blocks_used == 0


@pytest.mark.parametrize("way", ["generate", "submit", "many", "streamer"])
def test_a_call_held_back_by_a_pause_runs_with_the_weights_after_it(model: Any, way: str) -> None:
    """It was prepared before: what was cached, and the version it was given, are of the weights before."""
    plain = make_model("llama")
    options = {"max_new_tokens": 12, "do_sample": False}
    prompt = [*SHARED, 5]
    ids = torch.tensor([prompt])
    model.generate(ids, **options)
    results: list[Any] = []

    def run() -> None:
        if way == "submit":
            results.append(hf_paged.engine(model).submit(prompt, **options).result(DEADLINE_S).token_ids)
        elif way == "many":
            results.append(hf_paged.generate_many(model, [prompt], **options)[0].token_ids)
        else:
            streamer = _Silent() if way == "streamer" else None
            results.append(model.generate(ids, streamer=streamer, **options)[0, len(prompt) :].tolist())

    thread = threading.Thread(target=run)
    with hf_paged.paused(model):
        thread.start()
        crank = registry.get(model)._crank
        deadline = time.monotonic() + DEADLINE_S
        while not crank._idle._waiters and time.monotonic() < deadline:
            time.sleep(0.001)
        CHANGES[".data.copy_"](model)
        CHANGES[".data.copy_"](plain)
    thread.join(DEADLINE_S)
    wanted = plain.generate(ids, **options)
    assert_same_tokens(torch.tensor([prompt + results[0]]), wanted)


class _Silent:
    def put(self, value: Any) -> None:
        pass

    def end(self) -> None:
        pass


def _slowed(model: Any) -> Any:
    """Makes each forward take its time, so that requests are still running when the weights change."""
    embedding = model.get_input_embeddings()
    original = type(embedding).forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        time.sleep(0.003)
        return original(embedding, ids)

    embedding.forward = forward

    class Handle:
        def remove(self) -> None:
            del embedding.forward

    return Handle()


def test_a_call_held_back_by_a_pause_ends_when_the_model_is_disabled(model: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        with hf_paged.paused(model):
            held_back = pool.submit(lambda: model.generate(**INPUTS, max_new_tokens=4))
            time.sleep(0.5)
            hf_paged.disable(model)
        with pytest.raises(EngineStateError, match="disabled"):
            held_back.result(DEADLINE_S)


def test_training_another_model_disturbs_nobody(model: Any) -> None:
    other = make_model("llama", seed=1)
    wanted = make_model("llama").generate(torch.tensor([SHARED]), **LONG)[0, 40:].tolist()
    handle = hf_paged.engine(model).submit(SHARED, **LONG)
    next(iter(handle))
    for _ in range(3):
        _optimizer(other, fused=True)
    assert handle.result(timeout=DEADLINE_S).token_ids == wanted


def test_paused_lets_running_requests_end_first(model: Any) -> None:
    plain = make_model("llama")
    wanted = plain.generate(torch.tensor([SHARED]), **LONG)[0, 40:].tolist()
    handle = hf_paged.engine(model).submit(SHARED, **LONG)
    with hf_paged.paused(model):
        assert handle.done
        _optimizer(model, fused=True)
    _optimizer(plain, fused=True)
    assert handle.result().token_ids == wanted
    assert_same_tokens(
        model.generate(**INPUTS, max_new_tokens=12, do_sample=False),
        plain.generate(**INPUTS, max_new_tokens=12, do_sample=False),
    )


def test_nothing_of_the_model_is_held_when_nothing_runs(model: Any) -> None:
    model.generate(**INPUTS, max_new_tokens=2)
    assert registry.get(model)._loop.guard._watched is None
    gc.collect()
