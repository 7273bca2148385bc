"""Choosing beams: steps in which nothing ends take a short way, to the very same beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine.beam_choice import Choosing
from tests.helpers import make_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
OPTIONS = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "do_sample": False}
FIELDS = ("sequences", "sequences_scores", "beam_indices")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each choice took the short way."""
    taken: list[bool] = []
    original = Choosing._is_plain

    def is_plain(self: Choosing, *args: Any) -> bool:
        taken.append(original(self, *args))
        return taken[-1]

    monkeypatch.setattr(Choosing, "_is_plain", is_plain)
    return taken


def beams(model: Any, **options: Any) -> Any:
    with hf_paged.enabled(model, fallback="error", backend="reference"):
        return model.generate(IDS, **{**OPTIONS, **options}, return_dict_in_generate=True, output_scores=True)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": None},
        {"eos_token_id": list(range(4, 128, 30))},
        {"eos_token_id": list(range(4, 128, 30)), "early_stopping": True, "length_penalty": 2.0},
        {"eos_token_id": [3], "early_stopping": "never", "repetition_penalty": 1.5},
        {"eos_token_id": list(range(3, 128, 40)), "length_penalty": -1.0},
    ],
)
def test_the_short_way_comes_to_the_same(
    short: list[bool], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model = make_model("llama")
    quick = beams(model, pad_token_id=0, **options)
    assert any(short)
    monkeypatch.setattr(Choosing, "_is_plain", lambda *args: False)
    whole = beams(model, pad_token_id=0, **options)
    for name in FIELDS:
        assert torch.equal(getattr(quick, name), getattr(whole, name))
    assert all(torch.equal(a, b) for a, b in zip(quick.scores, whole.scores, strict=True))


def test_all_steps_but_the_last_take_it_where_nothing_ends(short: list[bool]) -> None:
    beams(make_model("llama"), eos_token_id=None)
    assert (short[0], short[-1]) == (True, False)
    assert short.count(False) <= 2  # the last step of each prompt


def test_drawn_beams_are_left_to_upstream(short: list[bool]) -> None:
    plain, model = make_model("llama"), make_model("llama")
    options = {**OPTIONS, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0, "do_sample": True}
    with hf_paged.enabled(model, fallback="error", backend="reference"):
        for seed in range(5):
            torch.manual_seed(seed)
            wanted = plain.generate(IDS, **options)
            torch.manual_seed(seed)
            assert torch.equal(model.generate(IDS, **options), wanted)
    assert not any(short)


def test_equal_scores_are_left_to_upstream(short: list[bool]) -> None:
    model = make_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    wanted = model.generate(IDS, **OPTIONS, eos_token_id=None, pad_token_id=0)
    assert torch.equal(beams(model, eos_token_id=None, pad_token_id=0).sequences, wanted)
    assert not any(short)


@pytest.mark.parametrize(
    ("vocab_size", "options"),
    [
        (14, {"no_repeat_ngram_size": 1, "max_new_tokens": 20}),  # no token is left to go on with
        (14, {"no_repeat_ngram_size": 1, "max_new_tokens": 20, "length_penalty": 0.0}),
        (16, {"no_repeat_ngram_size": 1, "max_new_tokens": 20, "num_beams": 2, "early_stopping": True}),
        (128, {"length_penalty": -10.0}),  # scores below those of no beam at all
        (128, {"length_penalty": -1000.0, "early_stopping": "never"}),
        (128, {"length_penalty": -10.0, "eos_token_id": list(range(4, 128, 30))}),
    ],
)
def test_beams_that_come_to_no_end_are_those_upstream_returns(
    short: list[bool], vocab_size: int, options: dict[str, Any]
) -> None:
    plain, model = (make_model("llama", vocab_size=vocab_size) for _ in range(2))
    wanted = plain.generate(
        IDS,
        **{**OPTIONS, "eos_token_id": None, "pad_token_id": 0, **options},
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = beams(model, **{"eos_token_id": None, "pad_token_id": 0, **options})
    assert any(short)
    assert float(wanted.sequences_scores.min()) <= -1e8
    for name in ("sequences", "beam_indices"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    # Sums of some 1e9 that cancel: what is left has the rounding of the whole.
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, rtol=1e-5, atol=1e-5)
