"""What cannot be native runs on the original, with upstream's result, a reason, a count and one warning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_paged
from hf_paged.errors import FallbackError
from hf_paged.generation.fallback import HfPagedFallbackWarning
from hf_paged.step import StepInputs, active_step
from tests.helpers import assert_same_tokens, left_pad, make_model, native_calls, random_prompts

BATCH = left_pad(random_prompts([3, 7]))
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]


class Streamer:
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        self.seen.append(torch.empty(0))


@pytest.fixture
def model() -> Iterator[Any]:
    model = make_model("llama")
    hf_paged.enable(model, backend="reference", kv_cache_memory="1MiB")
    yield model
    hf_paged.disable(model)


def plain() -> Any:
    return make_model("llama")


def hooked() -> Any:
    """A model that may not be patched."""
    model = plain()
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)
    return model


def seeded(model: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(**({"max_new_tokens": 4} | kwargs))


CASES: dict[str, dict[str, Any]] = {
    "beam_search": {**BATCH, "num_beams": 5},  # more than may run at once
    "assisted_decoding": {"input_ids": IDS[1:], "assistant_model": hooked()},
    "processors": {**BATCH, "guidance_scale": 1.5, "do_sample": True},
    "use_cache": {**BATCH, "use_cache": False},
    "cache_implementation": {**BATCH, "cache_implementation": "static"},
    "attention_mask": {"input_ids": IDS.flip(-1), "attention_mask": MASK.flip(-1)},
    "position_ids": {**BATCH, "position_ids": torch.arange(7).expand(2, -1)},
    "input_ids": {"input_ids": IDS[1:].int()},
    "custom_generate": {**BATCH, "custom_generate": lambda model, input_ids, **kwargs: input_ids + 1},
    "kv_budget": {**BATCH, "max_new_tokens": 5000, "eos_token_id": list(range(100))},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", CASES)
def test_a_fallback_gives_upstreams_result_and_is_counted(code: str, model: Any) -> None:
    if code == "beam_search":
        hf_paged.disable(model)
        hf_paged.enable(model, backend="reference", kv_cache_memory="1MiB", max_num_seqs=4)
    expected = seeded(plain(), **CASES[code])
    assert_same_tokens(seeded(model, **CASES[code]), expected)
    stats = hf_paged.stats(model)
    assert stats.fallback_calls == {code: 1}
    assert stats.native_calls == 0


def test_a_streamer_sees_what_it_always_saw(model: Any) -> None:
    ours, theirs = Streamer(), Streamer()
    with pytest.warns(HfPagedFallbackWarning, match="use_cache"):
        seeded(model, input_ids=IDS[1:], streamer=ours, use_cache=False)
    seeded(plain(), input_ids=IDS[1:], streamer=theirs, use_cache=False)
    assert [x.tolist() for x in ours.seen] == [x.tolist() for x in theirs.seen]


def test_arguments_by_position_are_seen(model: Any) -> None:
    streamer = Streamer()
    config = model.generation_config
    config.max_new_tokens = 2
    with native_calls(model):
        model.generate(IDS[1:], config, None, None, None, None, None, streamer)
    assert len(streamer.seen) == 4


def test_each_reason_warns_once_and_points_at_the_caller(model: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.generate(**BATCH, max_new_tokens=2, cache_implementation="static")
            model.generate(**BATCH, max_new_tokens=2, use_cache=False)
    ours = [w for w in caught if w.category is HfPagedFallbackWarning]
    assert ["cache_implementation" in str(w.message) for w in ours] == [True, False]
    assert {w.filename for w in ours} == {__file__}
    assert hf_paged.stats(model).fallback_calls == {"cache_implementation": 3, "use_cache": 3}


def test_a_native_call_warns_nothing(model: Any) -> None:
    with warnings.catch_warnings(), native_calls(model):
        warnings.simplefilter("error")
        model.generate(**BATCH, max_new_tokens=2)


def test_error_mode_names_all_reasons_and_runs_nothing() -> None:
    model = make_model("llama")
    with hf_paged.enabled(model, backend="reference", fallback="error"):
        streamer = Streamer()
        torch.manual_seed(3)
        state = torch.get_rng_state()
        with pytest.raises(FallbackError) as caught:
            model.generate(IDS[1:], max_new_tokens=3, do_sample=True, use_cache=False, streamer=streamer)
        assert [r.code for r in caught.value.reasons] == ["use_cache"]
        assert [x.numel() for x in streamer.seen] == [IDS.shape[1], 0], (
            "the prompt, and the end: nobody shall wait"
        )
        with pytest.raises(FallbackError, match="beam_search"):
            model.generate(**BATCH, max_new_tokens=3, num_beams=300, do_sample=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert hf_paged.stats(model).fallback_calls == {}
        with native_calls(model):
            model.generate(**BATCH, max_new_tokens=3)


def test_upstreams_own_errors_come_before_ours() -> None:
    model = make_model("llama")
    with hf_paged.enabled(model, backend="reference", fallback="error"):
        with pytest.raises(ValueError, match="model_kwargs"):
            model.generate(**BATCH, max_new_tokns=3)
        with pytest.raises(ValueError, match="model_kwargs"):
            hf_paged.explain(model, **BATCH, max_new_tokns=3)


def test_the_switch_in_the_environment_is_silent(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_PAGED_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_tokens(seeded(model, **BATCH), seeded(plain(), **BATCH))
    assert hf_paged.stats(model).fallback_calls == {"disabled": 1}


def test_a_generate_somebody_set_on_the_instance_stays_in_charge() -> None:
    model = make_model("llama")
    model.generate = lambda *args, **kwargs: "theirs"
    with hf_paged.enabled(model, backend="reference", fallback="silent"):
        assert model.generate(**BATCH) == "theirs"
        assert hf_paged.stats(model).fallback_calls == {"foreign_generate": 1}
    assert model.generate() == "theirs"


def test_an_overridden_loop_stays_in_charge() -> None:
    class Mine(LlamaForCausalLM):
        def _sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids * 0

    model = Mine(make_model("llama").config).eval()
    with hf_paged.enabled(model, backend="reference", fallback="silent"):
        assert not model.generate(**BATCH, max_new_tokens=2).any()
        assert hf_paged.stats(model).fallback_calls == {"decoding_overridden": 1}


def test_a_call_from_within_a_step_falls_back(model: Any) -> None:
    inside = StepInputs(object(), IDS, IDS, IDS, None, "reference", lambda layer: (IDS, IDS))  # type: ignore[arg-type]
    expected = seeded(plain(), **BATCH)
    with active_step(inside), pytest.warns(HfPagedFallbackWarning, match="nested"):
        assert_same_tokens(seeded(model, **BATCH), expected)


def test_explaining_leaves_no_trace(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    streamer = Streamer()
    torch.manual_seed(1)
    state, stats = torch.get_rng_state(), hf_paged.stats(model)
    names = set(model.__dict__)
    logging.getLogger("transformers").propagate = True
    # No mask and pad equal to EOS: upstream warns about it, once a process.
    arguments = {"input_ids": IDS, "pad_token_id": 1, "do_sample": True, "max_new_tokens": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = hf_paged.explain(model, **arguments, streamer=streamer, use_cache=False)
    assert [r.code for r in explanation.reasons] == ["use_cache"]
    with pytest.raises(ValueError, match="beam search"):
        hf_paged.explain(model, **arguments | {"do_sample": False}, streamer=streamer, num_beams=2)
    assert not caplog.records
    assert not explanation
    assert "use_cache" in str(explanation)
    assert hf_paged.explain(model, **arguments)
    assert streamer.seen == []
    assert torch.equal(torch.get_rng_state(), state)
    assert hf_paged.stats(model).to_dict() | {"kv_blocks_total": 0} == stats.to_dict() | {
        "kv_blocks_total": 0
    }
    assert set(model.__dict__) == names


def test_custom_generate_runs_natively_on_enabled_and_plain_models(model: Any) -> None:
    expected = seeded(plain(), **BATCH, do_sample=True)
    with native_calls(model):
        actual = seeded(model, **BATCH, do_sample=True, custom_generate=hf_paged.generate)
    assert_same_tokens(actual, expected)
    assert hf_paged.explain(model, **BATCH, custom_generate=hf_paged.generate).native
    other = make_model("llama")
    assert_same_tokens(seeded(other, **BATCH, do_sample=True, custom_generate=hf_paged.generate), expected)
    assert not hf_paged.is_enabled(other)


def test_custom_generate_runs_beams_too(model: Any) -> None:
    expected = seeded(plain(), **BATCH, num_beams=3)
    with native_calls(model):
        actual = seeded(model, **BATCH, num_beams=3, custom_generate=hf_paged.generate)
    assert_same_tokens(actual, expected)
