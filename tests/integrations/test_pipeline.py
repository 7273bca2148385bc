"""An enabled text-generation pipeline: upstream's results, object for object, from one stream of requests."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import StoppingCriteria, pipeline
from transformers.pipelines.pt_utils import KeyDataset, PipelineIterator

import hf_paged
from hf_paged.generation.fallback import HfPagedFallbackWarning
from hf_paged.integrations.request_stream import RequestStream
from tests.helpers import FAMILIES, check_engines, demo_model, demo_tokenizer, native_calls

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
TEXTS = ["The statement", "import os", "A", "If the class of an object is", "def f(x):\n    return"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.fixture(scope="module", params=FAMILIES)
def any_pipe(request: pytest.FixtureRequest) -> Any:
    return make_pipe(request.param)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipe("llama")


def make_pipe(family: str) -> Any:
    return pipeline("text-generation", model=demo_model(family), tokenizer=demo_tokenizer(family))


def both(pipe: Any, make_inputs: Any, calls: int, *, streamed: bool = True, **kwargs: Any) -> list[Any]:
    """The results of `pipe`, asserted equal to the untouched pipeline's and to come from `calls` native calls.

    Args:
        streamed: whether the calls shall be requests of a stream, else calls of `generate()`.
    """
    expected = list(pipe(make_inputs(), **kwargs))
    with hf_paged.enabled(pipe), native_calls(pipe, calls), pytest.MonkeyPatch.context() as patch:
        submitted: list[Any] = []
        submit = RequestStream._submit
        patch.setattr(RequestStream, "_submit", lambda self, p: submitted.append(p) or submit(self, p))
        got = list(pipe(make_inputs(), **kwargs))
    assert got == expected
    assert len(submitted) == (calls if streamed else 0)
    return got


class Source:
    """A generator that knows how many of its items were asked for."""

    def __init__(self, items: Any) -> None:
        self.items = items
        self.pulled = 0

    def __call__(self) -> Iterator[Any]:
        for item in self.items:
            self.pulled += 1
            yield item


def test_a_list_runs_as_one_stream(any_pipe: Any) -> None:
    with hf_paged.enabled(any_pipe):
        any_pipe(TEXTS * 4, **(GREEDY | {"max_new_tokens": 60, "eos_token_id": None}))  # long enough to meet
        assert hf_paged.stats(any_pipe).peak_running > 4
    both(any_pipe, lambda: TEXTS, len(TEXTS), **GREEDY)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 64])
def test_batch_size_changes_nothing(pipe: Any, batch_size: int | None) -> None:
    expected = pipe(TEXTS, **GREEDY)
    with hf_paged.enabled(pipe), native_calls(pipe, len(TEXTS)):
        assert pipe(TEXTS, batch_size=batch_size, **GREEDY) == expected


@pytest.mark.parametrize(
    "make_inputs",
    [
        pytest.param(lambda: KeyDataset(Dataset.from_dict({"text": TEXTS}), "text"), id="KeyDataset"),
        pytest.param(lambda: (text for text in TEXTS), id="generator"),
        pytest.param(lambda: CHATS, id="chats"),
        pytest.param(lambda: (chat for chat in CHATS), id="generator of chats"),
        pytest.param(lambda: [CHATS[0]], id="one chat in a list"),
    ],
)
def test_kinds_of_input(pipe: Any, make_inputs: Any) -> None:
    both(pipe, make_inputs, len(list(make_inputs())), **GREEDY)


@pytest.mark.parametrize("single", [TEXTS[0], CHATS[0]], ids=["string", "chat"])
def test_a_single_input_is_one_native_call(pipe: Any, single: Any) -> None:
    both(pipe, lambda: single, 1, streamed=False, **GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {"return_full_text": False},
        {"return_tensors": True},
        {"stop_sequence": "e"},
        {"repetition_penalty": 1.3, "min_new_tokens": 5},
        {"max_new_tokens": None, "max_length": 20},
        {"skip_special_tokens": False},
        {"prefix": "class of "},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(pipe: Any, options: dict[str, Any]) -> None:
    both(pipe, lambda: TEXTS, len(TEXTS), **(GREEDY | options))


def test_several_sequences_for_each_prompt(pipe: Any) -> None:
    sampled = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    with hf_paged.enabled(pipe), native_calls(pipe, len(TEXTS)):
        results = pipe(TEXTS, **sampled)
    assert [len(records) for records in results] == [3] * len(TEXTS)
    assert all(r["generated_text"].startswith(t) for t, rs in zip(TEXTS, results, strict=True) for r in rs)
    assert len({r["generated_text"] for r in results[0]}) > 1


def test_samples_repeat_after_a_seed_whatever_runs_together(pipe: Any) -> None:
    results = []
    for max_num_seqs in (1, 64):
        with hf_paged.enabled(pipe, max_num_seqs=max_num_seqs):
            torch.manual_seed(7)
            results.append(pipe(TEXTS * 3, max_new_tokens=8, do_sample=True))
    assert results[0] == results[1]
    assert results[0][: len(TEXTS)] != results[0][len(TEXTS) : 2 * len(TEXTS)]


def test_sampling_follows_the_models_distribution_options(pipe: Any) -> None:
    # With top_k=1 a sample is the greedy token, whatever is drawn.
    expected = pipe(TEXTS, **GREEDY)
    with hf_paged.enabled(pipe), native_calls(pipe, len(TEXTS)):
        assert pipe(TEXTS, max_new_tokens=12, do_sample=True, top_k=1) == expected


@pytest.mark.parametrize("options", [{"return_tensors": True}, {"max_new_tokens": None, "max_length": 24}])
def test_batches_whose_pads_can_be_seen_are_upstreams(pipe: Any, options: dict[str, Any]) -> None:
    # Five items in batches of two are three calls of generate.
    both(pipe, lambda: TEXTS, 3, streamed=False, batch_size=2, **(GREEDY | options))
    both(pipe, lambda: (text for text in TEXTS), 3, streamed=False, batch_size=2, **(GREEDY | options))


def test_what_cannot_be_native_goes_through_the_untouched_pipeline(pipe: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": False}
    expected = pipe(TEXTS, batch_size=2, **options)
    with hf_paged.enabled(pipe):
        with pytest.warns(HfPagedFallbackWarning, match="use_cache"):
            assert pipe(TEXTS, batch_size=2, **options) == expected
        stats = hf_paged.stats(pipe)
    assert (stats.native_calls, stats.fallback_calls) == (0, {"use_cache": 3})


class StopAfter(StoppingCriteria):
    """Keeps a state, so two requests must never share it at once."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), len(self.lengths) % 4 == 0)


def test_a_users_criterion_sees_one_request_at_a_time(pipe: Any) -> None:
    runs = []
    for enabled in (False, True):
        criterion = StopAfter()
        if enabled:
            hf_paged.enable(pipe, fallback="silent")
        runs.append((pipe(TEXTS, stopping_criteria=[criterion], **GREEDY), criterion.lengths))
    hf_paged.disable(pipe)
    assert runs[0] == runs[1]


def test_results_are_lazy_and_the_look_ahead_is_bounded(pipe: Any) -> None:
    source = Source(f"item {i}" for i in range(10_000))
    with hf_paged.enabled(pipe, max_num_seqs=8):
        results = pipe(source(), max_new_tokens=4, do_sample=False)
        assert isinstance(results, PipelineIterator)
        assert source.pulled <= 1  # upstream itself looks at the first item's type
        assert next(iter(results))[0]["generated_text"].startswith("item 0")
        assert source.pulled <= 17
        for _ in range(50):
            next(results)
        assert source.pulled <= 51 + 17
        assert 1 < hf_paged.stats(pipe).peak_running <= 8


def test_a_generator_goes_on_where_it_was(pipe: Any) -> None:
    expected = pipe(TEXTS, **GREEDY)
    with hf_paged.enabled(pipe):
        stream = pipe((text for text in TEXTS), **GREEDY)
        assert [next(iter(stream)), *stream] == expected


def test_a_dataset_keeps_its_length(pipe: Any) -> None:
    dataset = KeyDataset(Dataset.from_dict({"text": TEXTS}), "text")
    expected = [len(pipe(dataset, batch_size=size, **GREEDY)) for size in (1, 2)]
    with hf_paged.enabled(pipe):
        assert [len(pipe(dataset, batch_size=size, **GREEDY)) for size in (1, 2)] == expected
        results = pipe(dataset, **GREEDY)
        assert list(results) == list(results)  # and may be gone through twice


@pytest.mark.parametrize("bad", [None, 5, {"no": "chat"}], ids=repr)
def test_a_wrong_item_fails_in_its_turn(pipe: Any, bad: Any) -> None:
    items = ["one", "two", bad, "four"]

    def outcome() -> tuple[list[Any], type, str]:
        results, stream = [], iter(pipe((item for item in items), **GREEDY))
        with pytest.raises(Exception) as raised:  # noqa: PT012 - which of the items fails is the point
            for result in stream:
                results.append(result)
        return results, type(raised.value), str(raised.value)

    expected = outcome()
    assert len(expected[0]) == 2
    with hf_paged.enabled(pipe):
        assert outcome() == expected


@pytest.mark.parametrize("bad", [None, 5, [None], [TEXTS[0], 5]], ids=repr)
def test_wrong_inputs_are_upstreams_errors(pipe: Any, bad: Any) -> None:
    def outcome() -> tuple[type, str]:
        with pytest.raises(Exception) as raised:
            list(pipe(bad, **GREEDY))
        return type(raised.value), str(raised.value)

    expected = outcome()
    with hf_paged.enabled(pipe):
        assert outcome() == expected


def test_going_on_after_a_wrong_item(pipe: Any) -> None:
    dataset = KeyDataset([{"text": text} for text in ("one", None, "three")], "text")

    def outcomes() -> list[Any]:
        stream, found = iter(pipe(dataset, **GREEDY)), []
        while True:
            try:
                found.append(next(stream))
            except StopIteration:
                return found
            except Exception as error:
                found.append(type(error))

    expected = outcomes()
    assert len(expected) == 3
    with hf_paged.enabled(pipe), native_calls(pipe, 2):
        assert outcomes() == expected


def test_a_generator_that_raises(pipe: Any) -> None:
    def source() -> Iterator[str]:
        yield from TEXTS[:3]
        raise LookupError("the source broke")

    expected = pipe(TEXTS[:3], **GREEDY)
    with hf_paged.enabled(pipe):
        stream = iter(pipe(source(), **GREEDY))
        assert [next(stream) for _ in range(3)] == expected
        with pytest.raises(LookupError, match="the source broke"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_a_prompt_too_long_fails_alone(pipe: Any) -> None:
    gpt2 = make_pipe("gpt2")
    items = ["one", "word " * 2 * gpt2.model.config.n_positions, "three"]
    with hf_paged.enabled(gpt2, fallback="error"):
        stream = iter(gpt2((item for item in items), **GREEDY))
        assert next(stream) == gpt2("one", **GREEDY)
        with pytest.raises(IndexError):  # upstream's: no such position
            next(stream)
        assert next(stream) == gpt2("three", **GREEDY)
        assert hf_paged.stats(gpt2).native_calls == 3 + 2  # of the stream, and those it is compared with


@pytest.mark.parametrize("empty", [(lambda: []), (lambda: (x for x in []))], ids=["list", "generator"])
def test_nothing_in(pipe: Any, empty: Any) -> None:
    def outcome() -> Any:
        try:
            return list(pipe(empty(), **GREEDY))
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    with hf_paged.enabled(pipe):
        assert outcome() == expected


def test_a_consumer_that_stops_early_frees_what_runs(pipe: Any) -> None:
    from hf_paged.engine import registry

    with hf_paged.enabled(pipe, max_num_seqs=8):
        stream = pipe((f"item {i}" for i in itertools.count()), max_new_tokens=400, do_sample=False)
        next(iter(stream))
        assert hf_paged.stats(pipe).running > 0
        del stream
        check_engines([registry.get(pipe.model)])
        assert hf_paged.stats(pipe).kv_blocks_used == 0


def test_requests_run_while_the_consumer_is_busy(pipe: Any) -> None:
    with hf_paged.enabled(pipe):
        stream = iter(pipe((text for text in TEXTS), **GREEDY))
        next(stream)
        deadline = time.monotonic() + 60
        while hf_paged.stats(pipe).running and time.monotonic() < deadline:
            time.sleep(0.01)
        stats = hf_paged.stats(pipe)
        assert stats.running == 0
        assert stats.requests > 1
        list(stream)


def test_disable_in_the_middle_fails_what_runs(pipe: Any) -> None:
    hf_paged.enable(pipe, max_num_seqs=2)
    stream = iter(pipe((text for text in TEXTS), max_new_tokens=200, min_new_tokens=200, do_sample=False))
    next(stream)
    hf_paged.disable(pipe)
    with pytest.raises(hf_paged.EngineStateError):
        list(stream)


def test_disable_restores_the_pipeline(pipe: Any) -> None:
    before = dict(vars(pipe))
    hf_paged.enable(pipe)
    hf_paged.enable(pipe)
    assert "get_iterator" in vars(pipe)
    assert hf_paged.is_enabled(pipe)
    hf_paged.disable(pipe)
    assert vars(pipe) == before


def test_the_model_first_and_the_pipeline_later(pipe: Any) -> None:
    hf_paged.enable(pipe.model)
    assert "get_iterator" not in vars(pipe)
    with hf_paged.enabled(pipe), native_calls(pipe, len(TEXTS)):
        pipe(TEXTS, **GREEDY)
    assert "get_iterator" not in vars(pipe)
    assert hf_paged.is_enabled(pipe.model)
    hf_paged.enable(pipe)
    hf_paged.disable(pipe.model)
    assert "get_iterator" not in vars(pipe)


def test_a_copy_is_plain_and_works(pipe: Any) -> None:
    expected = pipe(TEXTS, **GREEDY)
    with hf_paged.enabled(pipe):
        other = copy.deepcopy(pipe)
    assert not hf_paged.is_enabled(other)
    assert "get_iterator" not in vars(other)
    assert other(TEXTS, **GREEDY) == expected


def test_two_pipelines_on_one_model(pipe: Any) -> None:
    other = pipeline("text-generation", model=pipe.model, tokenizer=pipe.tokenizer)
    hf_paged.enable(pipe)
    hf_paged.enable(other)
    with native_calls(pipe, 2 * len(TEXTS)):
        assert pipe(TEXTS, **GREEDY) == other(TEXTS, **GREEDY)
    hf_paged.disable(other)
    assert "get_iterator" not in vars(pipe)


def test_disabled_by_the_environment(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipe(TEXTS[:2], **GREEDY)
    monkeypatch.setenv("HF_PAGED_DISABLE", "1")
    with hf_paged.enabled(pipe):
        assert pipe(TEXTS[:2], **GREEDY) == expected
        assert hf_paged.stats(pipe).native_calls == 0


def test_a_pipeline_around_a_peft_model(pipe: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(pipe.model), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    around = pipeline("text-generation", model=adapted.eval(), tokenizer=pipe.tokenizer)
    got = both(around, lambda: TEXTS, len(TEXTS), **GREEDY)
    assert got != pipe(TEXTS, **GREEDY)
