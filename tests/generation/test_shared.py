"""Preparations that requests share: made once for equal ones, and anew as soon as anything they depend on changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import utils as upstream

import hf_paged
from hf_paged.generation import shared, single
from tests.helpers import make_model

PROMPT = [5, 6, 7]


@pytest.fixture
def model() -> Iterator[Any]:
    made = make_model("llama")
    made.generation_config.eos_token_id = None
    with hf_paged.enabled(made):
        yield made


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What upstream has prepared for requests."""
    made: list[Any] = []
    original = single.prepare

    def prepare(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(single, "prepare", prepare)
    return made


def submit(model: Any, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    result = hf_paged.engine(model).submit(prompt, **{"max_new_tokens": 4, **options}).result(60)
    wanted = model.generate(torch.tensor([prompt]), **{"max_new_tokens": 4, "do_sample": False, **options})
    if not options.get("do_sample"):
        assert result.token_ids == wanted[0, len(prompt) :].tolist()
    return result.token_ids


def test_requests_of_equal_options_are_prepared_once(model: Any, prepared: list[Any]) -> None:
    for prompt in ([5], [5, 6, 7], [9] * 20):
        for limit in (1, 6):
            assert len(submit(model, prompt, max_new_tokens=limit, repetition_penalty=1.3)) == limit
    assert len(prepared) == 1


def test_so_are_those_of_equal_configs(model: Any, prepared: list[Any]) -> None:
    for limit in (2, 5):
        config = GenerationConfig(max_new_tokens=limit, repetition_penalty=1.3, eos_token_id=[400, 401])
        handle = hf_paged.engine(model).submit(PROMPT, config)
        assert len(handle.result(60).token_ids) == limit
    assert len(prepared) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.generation_config, "repetition_penalty", 1.9),
        lambda m: setattr(m.generation_config, "eos_token_id", [3, 4]),
        lambda m: setattr(m, "generation_config", GenerationConfig(no_repeat_ngram_size=1)),
        lambda m: setattr(m.generation_config, "of_mine", [object()]),
        lambda m: setattr(m.config, "of_mine", 1),
        lambda m: m.config.of_mine_too.append(4),
        lambda m: setattr(m, "config", copy.deepcopy(m.config)),
    ],
)
def test_what_changed_between_two_requests_counts(model: Any, prepared: list[Any], change: Any) -> None:
    model.config.of_mine_too = [3]
    submit(model)
    change(model)
    submit(model)
    assert len(prepared) == 2


@pytest.mark.parametrize(
    "options",
    [
        [{"do_sample": 1}, {"do_sample": True}],
        [{"eos_token_id": [3]}, {"eos_token_id": [3, 4]}],
        [{"eos_token_id": 3}, {"eos_token_id": [3]}],
        [{"temperature": 0.5, "do_sample": True}, {"temperature": 0.6, "do_sample": True}],
    ],
)
def test_other_options_are_prepared_anew(model: Any, prepared: list[Any], options: Any) -> None:
    for one in options:
        submit(model, **one)
    assert len(prepared) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[4]]},
        {"eos_token_id": torch.tensor([3])},
        {"min_new_tokens": 3},
        {"num_beams": 2},
        {"max_length": 9},
        {"eos_token_id": -1},  # upstream warns of it each time
    ],
)
def test_what_belongs_to_a_request_or_is_warned_of_is_prepared_each_time(
    model: Any, prepared: list[Any], options: Any
) -> None:
    for _ in range(2):
        submit(model, **options)
    assert len(prepared) == 2


def test_a_length_in_the_models_config_is_warned_of_each_time(
    model: Any, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(upstream.logger, "warning", lambda text, *a: said.append(text))
    model.generation_config.max_length = 50
    for _ in range(2):
        hf_paged.engine(model).submit(PROMPT, max_new_tokens=2).result(60)
    assert len(prepared) == len([text for text in said if "will take precedence" in text]) == 2


@pytest.mark.parametrize("least", [{"min_length": 9}, {"min_new_tokens": 9}])
def test_a_least_length_out_of_reach_is_warned_of_each_time(
    model: Any, prepared: list[Any], least: dict[str, int]
) -> None:
    for limit in (20, 2, 2):
        config = GenerationConfig(**least, max_new_tokens=limit)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            hf_paged.engine(model).submit(PROMPT, config).result(60)
        assert any("Unfeasible" in str(w.message) for w in said) == (limit == 2)


def test_what_was_changed_while_a_request_was_prepared_is_not_shared(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, own = single.prepare, model.generation_config

    def disturbed(*args: Any) -> Any:
        own.repetition_penalty = 1.9  # as by another thread
        return original(*args)

    wanted = submit(model, max_new_tokens=20)
    shared._entries.clear()
    with monkeypatch.context() as patched:
        patched.setattr(single, "prepare", disturbed)
        assert hf_paged.engine(model).submit(PROMPT, max_new_tokens=20).result(60).token_ids != wanted
    own.repetition_penalty = None
    assert submit(model, max_new_tokens=20) == wanted


@pytest.mark.parametrize(("says_so", "times"), [(True, 2), (False, 1)])
def test_a_pad_token_that_upstream_chooses_is_shared_where_it_does_not_say_so(
    model: Any, prepared: list[Any], monkeypatch: pytest.MonkeyPatch, says_so: bool, times: int
) -> None:
    monkeypatch.setattr(shared, "_NAMES_PADS", says_so)
    model.generation_config.pad_token_id = None
    for _ in range(2):
        submit(model, eos_token_id=3)
    assert len(prepared) == times


@pytest.mark.parametrize("on_class", [True, False])
def test_a_replaced_method_of_upstreams_is_called_each_time(
    model: Any, prepared: list[Any], monkeypatch: pytest.MonkeyPatch, on_class: bool
) -> None:
    submit(model)
    original = type(model)._get_stopping_criteria
    calls: list[str] = []

    def criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("called")
        return original(self, *args, **kwargs)

    if on_class:
        monkeypatch.setattr(type(model), "_get_stopping_criteria", criteria, raising=False)
    else:
        monkeypatch.setitem(vars(model), "_get_stopping_criteria", lambda *a, **k: criteria(model, *a, **k))
    for _ in range(2):
        hf_paged.engine(model).submit(PROMPT, max_new_tokens=2).result(60)
    assert len(calls) == 2


def test_what_is_made_in_inference_mode_stays_there(model: Any, prepared: list[Any]) -> None:
    for _ in range(2):
        with torch.inference_mode():
            hf_paged.engine(model).submit(PROMPT, max_new_tokens=2, eos_token_id=3).result(60)
    hf_paged.engine(model).submit(PROMPT, max_new_tokens=2, eos_token_id=3).result(60)
    assert [p.config._eos_token_tensor.is_inference() for p in prepared] == [True, False]


def test_reasons_to_fall_back_are_looked_for_each_time(model: Any, prepared: list[Any]) -> None:
    submit(model)
    model.register_forward_hook(lambda *a: None)
    with pytest.raises(hf_paged.FallbackError, match="hook"):
        hf_paged.engine(model).submit(PROMPT, max_new_tokens=4)


def test_requests_share_nothing_that_changes(model: Any, prepared: list[Any]) -> None:
    client = hf_paged.engine(model)
    handles = [client.submit(PROMPT, max_new_tokens=limit, repetition_penalty=1.3) for limit in (20, 30, 20)]
    assert [len(h.result(60).token_ids) for h in handles] == [20, 30, 20]
    specs = [h._call.sampling for h in handles]  # type: ignore[union-attr]
    for name in ("criteria", "processors", "prompt_ids"):
        assert len({id(getattr(spec, name)) for spec in specs}) == 3
    assert len(prepared) == 1


def test_no_more_than_so_many_are_remembered(model: Any) -> None:
    engine = hf_paged.engine(model)._engine
    for i in range(shared._MOST * 2):
        kept = shared.preparations_of(model, engine, None, {"top_k": i + 1, "max_new_tokens": i + 1})
        assert kept is shared.preparations_of(model, engine, None, {"top_k": i + 1, "max_new_tokens": 1})
    assert len(shared._entries[engine]) <= shared._MOST
