"""A view is its model under another class: upstream prepares on it, and nothing of the model changes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, LlamaForCausalLM

from hf_paged.generation.view import DECODING_METHODS, HubDecodingMode, make_view, view_class
from tests.helpers import FAMILIES, make_model

IDS = torch.tensor([[5, 6, 7]])


class Recorder:
    """A decoder that keeps what it was given."""

    def __init__(self) -> None:
        self.method = ""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, method: str, /, *args: Any, **kwargs: Any) -> str:
        self.method, self.args, self.kwargs = method, args, kwargs
        return "decoded"


def generate(model: Any, recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    view = make_view(model, recorder)
    return type(view).generate(view, *args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_gets_what_upstreams_loop_would_get(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder, upstream = make_model(family), Recorder(), Recorder()
    assert generate(model, recorder, IDS, max_new_tokens=5, do_sample=True, top_p=0.5) == "decoded"

    def loop(self: Any, *args: Any, **kwargs: Any) -> str:
        return upstream("_sample", *args, **kwargs)

    loop.__module__ = "transformers"
    monkeypatch.setattr(GenerationMixin, "_sample", loop)
    model.generate(IDS, max_new_tokens=5, do_sample=True, top_p=0.5)
    assert recorder.method == "_sample"
    # The empty cache is left out, see `view._without_cache`.
    assert type(upstream.kwargs.pop("past_key_values")).__name__ == "DynamicCache"
    assert recorder.kwargs.keys() == upstream.kwargs.keys()
    assert [type(p) for p in recorder.kwargs["logits_processor"]] == [
        type(p) for p in upstream.kwargs["logits_processor"]
    ]
    assert recorder.kwargs["generation_config"].to_dict() == upstream.kwargs["generation_config"].to_dict()
    assert torch.equal(recorder.args[0], upstream.args[0])


@pytest.mark.parametrize(
    "kwargs, method",
    [
        ({}, "_sample"),
        ({"num_beams": 2}, "_beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "_assisted_decoding"),
    ],
)
def test_every_loop_is_routed(kwargs: dict[str, Any], method: str) -> None:
    recorder = Recorder()
    generate(make_model("llama"), recorder, IDS, max_new_tokens=2, **kwargs)
    assert recorder.method == method
    assert method in DECODING_METHODS


def test_a_mode_on_the_hub_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(HubDecodingMode, match="contrastive-search"):
        generate(make_model("llama"), Recorder(), IDS, penalty_alpha=0.6, top_k=4, trust_remote_code=True)


def test_the_view_is_the_model_under_another_class() -> None:
    model = make_model("llama")
    names = set(model.__dict__)
    view = make_view(model, Recorder())
    assert view.__dict__ is model.__dict__
    assert isinstance(view, LlamaForCausalLM)
    assert type(view).__name__ == "LlamaForCausalLM"
    assert type(view).__module__ == LlamaForCausalLM.__module__
    assert torch.equal(view(IDS).logits, model(IDS).logits)
    assert type(model) is LlamaForCausalLM
    assert set(model.__dict__) == names


def test_the_model_outlives_its_views_and_is_collected_after_them() -> None:
    model = make_model("llama")
    expected = model(IDS).logits
    view = make_view(model, Recorder())
    del view
    gc.collect()
    assert torch.equal(model(IDS).logits, expected)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_one_class_a_model_class() -> None:
    assert view_class(LlamaForCausalLM) is view_class(LlamaForCausalLM)


def test_no_subclass_hook_of_the_model_runs() -> None:
    seen: list[type] = []

    class Registering(LlamaForCausalLM):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            seen.append(cls)

    class Child(Registering):
        pass

    view_class(Child)
    assert seen == [Child]


def test_a_generate_overridden_by_the_users_class_is_respected() -> None:
    class Mine(LlamaForCausalLM):
        calls = 0

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().generate(*args, **(kwargs | {"max_new_tokens": 3}))

    model, recorder = Mine(make_model("llama").config), Recorder()
    generate(model, recorder, IDS, max_new_tokens=50)
    assert recorder.kwargs["generation_config"].max_new_tokens == 3
    assert model.calls == 1
