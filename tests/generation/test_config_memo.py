"""Merged generation configs that are remembered: equal to upstream's, and never those of another call."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import configuration_utils

import hf_paged
from hf_paged.generation.quiet import quiet
from hf_paged.generation.view import make_view
from tests.helpers import make_model

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def model() -> Any:
    return make_model("llama")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry each time upstream makes a generation config to merge into."""
    made: list[str] = []
    original = GenerationConfig.to_dict

    def to_dict(self: Any) -> Any:
        made.append("merge")
        return original(self)

    monkeypatch.setattr(GenerationConfig, "to_dict", to_dict)
    return made


def merged(model: Any, config: GenerationConfig | None = None, **kwargs: Any) -> tuple[dict[str, Any], dict]:
    ours, left = make_view(model, lambda *a, **k: None)._prepare_generation_config(config, **kwargs)
    theirs, wanted = type(model)._prepare_generation_config(model, config, **kwargs)
    assert vars(ours) == vars(theirs)
    assert list(map(type, vars(ours).values())) == list(map(type, vars(theirs).values()))
    assert left.keys() == wanted.keys()
    assert all(left[name] is wanted[name] for name in left)
    return vars(ours), left


def test_equal_calls_are_merged_once_and_as_upstream_does(model: Any, calls: list[str]) -> None:
    for _ in range(3):
        merged(model, input_ids=IDS, max_new_tokens=7, do_sample=True, temperature=0.5)
    assert len(calls) == 1 + 3  # upstream's own three are for comparison


def test_calls_of_other_lengths_are_merged_once_too(model: Any, calls: list[str]) -> None:
    for limit in (7, 8, 1):
        assert merged(model, input_ids=IDS, max_new_tokens=limit)[0]["max_new_tokens"] == limit
    assert len(calls) == 1 + 3


@pytest.mark.parametrize("limit", [0, -1, True, None])
def test_limits_that_are_no_positive_numbers_are_upstreams_business(model: Any, limit: Any) -> None:
    def outcome(generator: Any) -> Any:
        try:
            return vars(generator(None, max_new_tokens=limit)[0])
        except ValueError as error:
            return str(error)

    view = make_view(model, lambda *a, **k: None)
    view._prepare_generation_config(None, max_new_tokens=5)
    ours = outcome(view._prepare_generation_config)
    theirs = outcome(functools.partial(type(model)._prepare_generation_config, model))
    assert ours == theirs
    if isinstance(ours, dict):
        assert type(ours["max_new_tokens"]) is type(limit)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.generation_config, "max_length", 33),
        lambda m: setattr(m.generation_config, "eos_token_id", [3, 4]),
        lambda m: m.generation_config.eos_token_id.append(9),
        lambda m: setattr(m, "generation_config", GenerationConfig(top_k=3)),
        lambda m: setattr(m.generation_config, "of_mine", 1),
        lambda m: setattr(m.generation_config, "use_cache", 0),
        lambda m: setattr(m.config, "vocab_size", 7),
        lambda m: setattr(m, "config", copy.deepcopy(m.config)),
    ],
)
def test_what_changed_between_two_calls_counts(model: Any, calls: list[str], change: Any) -> None:
    model.generation_config.eos_token_id = [1, 2]
    merged(model, input_ids=IDS, max_new_tokens=7)
    calls.clear()
    change(model)
    merged(model, input_ids=IDS, max_new_tokens=7)
    assert len(calls) == 2


def test_true_and_one_are_not_equal(model: Any) -> None:
    assert merged(model, num_return_sequences=1)[0]["num_return_sequences"] is not True
    assert merged(model, num_return_sequences=True)[0]["num_return_sequences"] is True


def test_a_generation_option_on_the_model_config_still_raises(model: Any) -> None:
    merged(model, max_new_tokens=3)
    model.config.temperature = 0.3
    with pytest.raises(ValueError, match="modified the pretrained model configuration"):
        merged(model, max_new_tokens=3)


def test_nobody_shares_lists_or_a_config_with_anybody(model: Any) -> None:
    model.generation_config.eos_token_id = [1, 2]
    first = merged(model, max_new_tokens=3)[0]
    second = merged(model, max_new_tokens=3)[0]
    second["eos_token_id"].append(77)
    second["max_length"] = 1
    third = merged(model, max_new_tokens=3)[0]
    assert first["eos_token_id"] == third["eos_token_id"] == model.generation_config.eos_token_id == [1, 2]


def test_what_upstream_warns_of_is_left_to_it(
    model: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda *a, **k: said.append(str(a)))
    monkeypatch.setattr(configuration_utils.logger, "warning_once", lambda *a, **k: said.append(str(a)))
    view = make_view(model, lambda *a, **k: None)
    counts = []
    for _ in range(3):
        said.clear()
        view._prepare_generation_config(None, do_sample=False, temperature=0.3, max_new_tokens=2)
        counts.append(len(said))
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_a_silenced_call_is_not_remembered(model: Any, calls: list[str]) -> None:
    with quiet():
        merged(model, max_new_tokens=7)
    merged(model, max_new_tokens=7)
    assert len(calls) == 4


def test_objects_among_the_options_are_merged_each_time(model: Any, calls: list[str]) -> None:
    for words in ([[4]], [[5]]):
        assert merged(model, bad_words_ids=words, max_new_tokens=2)[0]["bad_words_ids"] == words
    assert len(calls) == 4


def test_generate_follows_a_changed_generation_config(model: Any) -> None:
    with hf_paged.enabled(model):
        model.generation_config.max_new_tokens = 3
        model.generation_config.eos_token_id = None
        assert model.generate(IDS).shape[1] == 6
        model.generation_config.max_new_tokens = 5
        assert model.generate(IDS).shape[1] == 8
