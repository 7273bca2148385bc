"""Enabling changes one instance and nothing else, and disabling leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import hf_paged
from hf_paged.engine import registry
from tests.helpers import FAMILIES, PAD, left_pad, make_model, native_calls, random_prompts


def snapshot(model: nn.Module) -> dict:
    """Everything an instance has: attributes of each module, hooks, training flags."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state[name, key] = tuple((k, id(v)) for k, v in value.items())
            else:
                state[name, key] = id(value) if isinstance(value, nn.Module | torch.Tensor) else repr(value)
        state[name, "class"] = type(module)
    return state


def run(model, **options):
    kwargs = left_pad(random_prompts([5, 17, 9]), PAD) | {"max_new_tokens": 8, "do_sample": False} | options
    return model.generate(**kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_disable_leaves_the_model_as_it_was(family):
    model = make_model(family)
    expected = run(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before, threads = snapshot(model), threading.active_count()
    hf_paged.enable(model)
    with native_calls(model):
        run(model)
    hf_paged.disable(model)
    assert snapshot(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(run(model), expected)
    assert threading.active_count() == threads
    assert "generate" not in vars(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_class_is_untouched(family):
    model, other = make_model(family), make_model(family, seed=1)
    before, expected = snapshot(other), run(other)
    with hf_paged.enabled(model):
        run(model)
        assert snapshot(other) == before
        assert torch.equal(run(other), expected)
        assert not hf_paged.is_enabled(other)


def test_enable_twice_is_one_enable_and_other_options_are_refused():
    model = make_model("gpt2")
    before = snapshot(model)
    assert hf_paged.enable(model, block_size=8) is model
    once = snapshot(model)
    assert hf_paged.enable(model, hf_paged.PagedConfig(block_size=8)) is model
    assert snapshot(model) == once
    with pytest.raises(hf_paged.ConfigError, match="block_size"):
        hf_paged.enable(model, block_size=32)
    hf_paged.disable(model)
    assert snapshot(model) == before
    assert hf_paged.disable(model) is model


@pytest.mark.parametrize(
    "bad", [{"block_size": 0}, {"nonsense": 1}, {"kv_cache_memory": "3 bananas"}, {"backend": "x"}]
)
def test_failing_enable_leaves_nothing(bad):
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(hf_paged.ConfigError, match=next(iter(bad))):
        hf_paged.enable(model, **bad)
    assert snapshot(model) == before
    assert not hf_paged.is_enabled(model)


def test_enable_that_fails_half_way_leaves_nothing(monkeypatch):
    model = make_model("llama")
    before = snapshot(model)

    def fail(*_args, **_kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(registry, "put", fail)
    with pytest.raises(RuntimeError, match="broken"):
        hf_paged.enable(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2), "gpt2"])
def test_unsupported_things_are_refused_by_name(thing):
    with pytest.raises((hf_paged.UnsupportedModelError, TypeError), match=type(thing).__name__):
        hf_paged.enable(thing)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_backward_and_training_are_bit_for_bit_the_same(family):
    def train(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(3):
            ids = torch.tensor(random_prompts([12, 12], seed=step))
            torch.manual_seed(step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses), [p.detach() for p in model.parameters()]

    expected = train(make_model(family))
    model = make_model(family)
    with hf_paged.enabled(model):
        actual = train(model)
    assert torch.equal(expected[0], actual[0])
    assert all(torch.equal(a, b) for a, b in zip(expected[1], actual[1], strict=True))


def test_generate_after_training_steps_uses_the_new_weights():
    model = make_model("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    hf_paged.enable(model)
    run(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ids = torch.tensor(random_prompts([12]))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with native_calls(model):
        actual = run(model)
    hf_paged.disable(model)
    assert torch.equal(actual, run(model))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch_save": lambda m: torch.load(_saved(m), weights_only=False),
}


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_come_out_plain_and_working(family, way):
    model = make_model(family)
    plain = COPIES[way](model)
    hf_paged.enable(model)
    expected = run(model)
    twin = COPIES[way](model)
    assert not hf_paged.is_enabled(twin)
    assert "generate" not in vars(twin)
    assert {n: sorted(vars(m)) for n, m in twin.named_modules()} == {
        n: sorted(vars(m)) for n, m in plain.named_modules()
    }
    assert torch.equal(run(twin), expected)
    with native_calls(model):
        run(model)
    hf_paged.disable(model)


def test_save_pretrained_of_an_enabled_model(tmp_path):
    model = hf_paged.enable(make_model("llama"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again), run(model))
    hf_paged.disable(model)


def test_dropped_model_is_collected_with_its_pool():
    model = hf_paged.enable(make_model("gpt2"))
    run(model)
    model_ref, engine_ref = weakref.ref(model), weakref.ref(registry.get(model))
    del model
    gc.collect()
    assert model_ref() is None
    assert engine_ref() is None


def test_half_after_enable():
    model, plain = make_model("llama"), make_model("llama").bfloat16()
    hf_paged.enable(model)
    run(model)
    model.bfloat16()
    with native_calls(model):
        actual = run(model)
    assert actual.shape == run(plain).shape
    hf_paged.disable(model)


def test_resize_token_embeddings_after_enable():
    model = hf_paged.enable(make_model("gpt2"))
    run(model)
    model.resize_token_embeddings(140, mean_resizing=False)
    ids = torch.tensor([[135, 139, 5]])
    with native_calls(model):
        actual = model.generate(ids, max_new_tokens=6, do_sample=False)
    hf_paged.disable(model)
    assert torch.equal(actual, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_hook_present_before_enable_keeps_firing_on_plain_forwards_and_is_a_named_reason():
    model, seen = make_model("gpt2"), []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    hf_paged.enable(model, fallback="silent")
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert seen == [1]
    run(model)
    assert hf_paged.stats(model).native_calls == 0
    assert list(hf_paged.stats(model).fallback_calls)
    handle.remove()
    with native_calls(model):
        run(model)
    hf_paged.disable(model)


def test_forward_wrapped_after_enable_stays_after_disable():
    model = make_model("gpt2")
    hf_paged.enable(model, fallback="silent")
    attention = model.transformer.h[0].attn
    inner, calls = attention.forward, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    attention.forward = wrapper
    hf_paged.disable(model)
    assert attention.forward is wrapper
    expected = run(make_model("gpt2"))
    assert torch.equal(run(model), expected)
    assert calls


def test_device_map_and_prepared_models():
    from accelerate import Accelerator, dispatch_model

    model = dispatch_model(make_model("llama"), device_map={"": "cpu"}, force_hooks=True)
    expected = run(make_model("llama"))
    with hf_paged.enabled(model), native_calls(model):
        assert torch.equal(run(model), expected)
    prepared = Accelerator(cpu=True).prepare(make_model("llama"))
    with hf_paged.enabled(prepared), native_calls(prepared):
        assert torch.equal(run(prepared), expected)


def test_linears_quantised_over_the_whole_batch_are_a_named_reason():
    """Dynamic int8 takes one input range over all rows of a product, so packing rows would change their tokens."""
    quantization = pytest.importorskip("torch.ao.quantization")
    plain = quantization.quantize_dynamic(make_model("llama"), {nn.Linear}, dtype=torch.qint8)
    expected = run(plain)
    hf_paged.enable(plain, fallback="silent")
    actual = run(plain)
    assert list(hf_paged.stats(plain).fallback_calls) == ["batch_dependent"]
    hf_paged.disable(plain)
    assert torch.equal(actual, expected)


def test_weight_only_quantised_linears_are_native():
    class Int8Linear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.scale = nn.Parameter(
                linear.weight.detach().abs().amax(1, keepdim=True) / 127, requires_grad=False
            )
            self.weight = nn.Parameter(
                (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight * self.scale).t()

    def quantised():
        model = make_model("llama")
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
        return model

    expected, model = run(quantised()), quantised()
    with hf_paged.enabled(model), native_calls(model):
        assert torch.equal(run(model), expected)


def test_trainer_evaluating_with_generate(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    rows = [{"input_ids": p, "labels": p} for p in random_prompts([6, 6, 6, 6])]

    def predict(model):
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=2,
            predict_with_generate=True,
            report_to=[],
            use_cpu=True,
        )
        trainer = Seq2SeqTrainer(model, arguments)
        return trainer.predict(rows, max_new_tokens=5, do_sample=False).predictions

    expected = predict(make_model("gpt2"))
    model = hf_paged.enable(make_model("gpt2"))
    with native_calls(model, 2):
        actual = predict(model)
    hf_paged.disable(model)
    assert (expected == actual).all()
