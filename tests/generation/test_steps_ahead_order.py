"""Steps ahead of the device: what is launched and waited for when, who has to wait, and what failures take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine.device_sampling import ChosenTokens
from hf_paged.engine.model_runner import ModelRunner
from hf_paged.errors import RequestCancelledError, WeightsChangedError
from tests.generation.ahead_runs import GREEDY, Watched, enabled, engine_of, switched
from tests.helpers import assert_same_tokens, make_model, random_prompts


def test_a_step_is_launched_before_the_tokens_of_the_last_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switched(monkeypatch, True)
    watched = Watched(monkeypatch)
    with enabled(make_model("llama")) as model:
        model.generate(torch.tensor(random_prompts([5])), **GREEDY | {"max_new_tokens": 4})
    assert watched.events == ["launch", "launch", "wait", "launch", "wait", "launch", "wait", "wait"]


def test_the_end_of_a_text_costs_one_step_that_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    switched(monkeypatch, True)
    watched = Watched(monkeypatch)
    with enabled(make_model("llama")) as model:
        ids = torch.tensor(random_prompts([5]))
        end = model.generate(ids, **GREEDY)[0, 7].item()
        watched.events.clear()
        hf_paged.reset_stats(model)
        row = model.generate(ids, **GREEDY | {"eos_token_id": end})[0, 5:].tolist()
        assert row.index(end) == len(row) - 1
        assert watched.events.count("launch") == len(row) + 1
        assert watched.events.count("wait") == len(row) + 1  # when idle nothing is in flight
        assert hf_paged.stats(model).steps == len(row)


def test_parts_of_a_prompt_are_no_further_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    switched(monkeypatch, True)
    watched = Watched(monkeypatch)
    with enabled(make_model("llama"), max_num_seqs=4, max_num_batched_tokens=4) as model:
        model.generate(torch.tensor(random_prompts([18])), **GREEDY | {"max_new_tokens": 2})
    assert watched.events == ["launch", *["launch", "wait"] * 5, "wait"]


def test_a_cancelled_request_leaves_nothing_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    switched(monkeypatch, True)
    watched = Watched(monkeypatch)
    with enabled(make_model("llama")) as model:
        client = hf_paged.engine(model)
        handle = client.submit(random_prompts([5])[0], **GREEDY | {"max_new_tokens": 100})
        next(iter(handle))
        handle.cancel()
        with pytest.raises(RequestCancelledError):
            handle.result(timeout=60)
        engine_of(model).drain()
        assert engine_of(model)._loop.runtime.ahead.flight is None
        assert watched.events.count("wait") == watched.events.count("launch")
        assert hf_paged.stats(model).kv_blocks_used == 0


def test_a_request_that_wants_the_host_keeps_all_in_step_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switched(monkeypatch, True)
    prompts = random_prompts([4, 5])
    with enabled(make_model("llama")) as model:
        client = hf_paged.engine(model)
        long = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
        expected = client.submit(prompts[0], **long).result().token_ids
        hf_paged.reset_stats(model)
        before = hf_paged.stats(model).steps_ahead
        hosted = client.submit(prompts[1], no_repeat_ngram_size=2, **long | {"max_new_tokens": 80})
        plain = client.submit(prompts[0], **long)
        assert plain.result().token_ids == expected
        assert len(hosted.result().token_ids) == 80
        assert hf_paged.stats(model).steps_ahead - before <= 1
        client.submit(prompts[0], **long).result()
        assert hf_paged.stats(model).steps_ahead - before > 50


def test_weights_that_change_fail_who_runs_and_nobody_later(monkeypatch: pytest.MonkeyPatch) -> None:
    switched(monkeypatch, True)
    model, plain = make_model("llama"), make_model("llama")
    with enabled(model):
        client = hf_paged.engine(model)
        options = GREEDY | {"max_new_tokens": 100}
        handles = [client.submit(p, **options) for p in random_prompts([4, 9, 6])]
        next(iter(handles[0]))
        with torch.no_grad():
            for one in (model, plain):
                one.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)
        for handle in handles:
            with pytest.raises(WeightsChangedError):
                handle.result(timeout=60)
        ids = torch.tensor(random_prompts([7]))
        assert_same_tokens(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


def _broken_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: int) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(10**6))

    def broken(*args: Any) -> Any:
        if next(calls) == after:
            raise RuntimeError("device on fire")
        return original(*args)

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("where", [(ModelRunner, "forward"), (ChosenTokens, "wait")], ids=["launch", "wait"])
def test_a_step_that_fails_takes_its_own_calls_only(
    monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    switched(monkeypatch, True)
    model, prompt = make_model("llama"), random_prompts([5])[0]
    with enabled(model):
        client = hf_paged.engine(model)
        expected = client.submit(prompt, **GREEDY).result().token_ids
        _broken_once(monkeypatch, *where, after=4)
        handle = client.submit(prompt, **GREEDY)
        with pytest.raises(RuntimeError, match="device on fire"):
            handle.result(timeout=60)
        # What came before the step that failed is there; in the air was one more.
        assert handle.partial().token_ids == expected[:4]
        assert client.trouble() is not None
        assert client.submit(prompt, **GREEDY).result().token_ids == expected
        assert client.trouble() is None


def test_a_row_without_numbers_fails_its_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    switched(monkeypatch, True)
    forward = ModelRunner.forward

    def spoiled(runner: Any, model: Any, inputs: Any, ambient: Any) -> torch.Tensor:
        logits = forward(runner, model, inputs, ambient)
        logits[inputs.position_ids[0, inputs.logits_indices] == 12] = float("nan")
        return logits

    prompts = random_prompts([10, 3])
    options = GREEDY | {"do_sample": True, "max_new_tokens": 6, "seed": 5}
    with enabled(make_model("llama")) as model:
        client = hf_paged.engine(model)
        expected = [client.submit(p, **options).result().token_ids for p in prompts]
        monkeypatch.setattr(ModelRunner, "forward", spoiled)
        handles = [client.submit(p, **options) for p in prompts]
        with pytest.raises(RuntimeError, match=r"inf.*nan"):
            handles[0].result(timeout=60)
        assert handles[0].partial().token_ids == expected[0][:3]
        assert handles[1].result(timeout=60).token_ids == expected[1]


def test_a_backend_without_a_device_of_its_own_is_not_ahead() -> None:
    with enabled(make_model("llama"), backend="cpu") as model:
        model.generate(torch.tensor(random_prompts([5])), **GREEDY)
        assert engine_of(model)._loop.runtime.ahead is None
