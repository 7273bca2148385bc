"""`generate_batch` and its manager on an enabled model: transformers' interface and types, our engine."""

from __future__ import annotations

import asyncio
import copy
import time
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

import hf_paged
from hf_paged.engine import registry
from hf_paged.generation.fallback import HfPagedFallbackWarning
from tests.helpers import EOS, FAMILIES, check_engines, demo_model, make_model, native_calls, random_prompts

LENGTHS = (5, 17, 3, 30, 9)
PROMPTS = random_prompts(LENGTHS)
#: So small that transformers' own needs little memory beside ours; without it, it takes most of the machine's.
SMALL = {"num_blocks": 32, "max_batch_tokens": 64}


def config(**options: Any) -> GenerationConfig:
    defaults: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": EOS}
    return GenerationConfig(**(defaults | options))


def small(**options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**(SMALL | options))


def greedy(model: Any, prompt: list[int], max_new_tokens: int = 8, eos: int | None = EOS) -> list[int]:
    """New tokens of the model's own `generate`, one prompt."""
    ids = torch.tensor([prompt])
    plain = type(model).generate.__get__(model)
    out = plain(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def model() -> Any:
    model = make_model("llama")
    hf_paged.enable(model)
    yield model
    hf_paged.disable(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_of_transformers_own(family: str) -> None:
    model = demo_model(family)
    prompts = random_prompts(LENGTHS, vocab_size=model.config.vocab_size)
    wanted = config(max_new_tokens=10, eos_token_id=model.generation_config.eos_token_id)
    expected = copy.deepcopy(model).generate_batch(
        prompts, generation_config=wanted, continuous_batching_config=small()
    )
    with hf_paged.enabled(model), native_calls(model, len(prompts)):
        got = model.generate_batch(prompts, generation_config=wanted, continuous_batching_config=small())
    assert list(got) == list(expected) == [f"req_{i}" for i in range(len(prompts))]
    for ours, theirs in zip(got.values(), expected.values(), strict=True):
        assert isinstance(ours, GenerationOutput)
        assert vars(ours).keys() == vars(theirs).keys()
        for name in ("request_id", "prompt_ids", "generated_tokens", "logprobs", "error", "status"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.is_finished()
        assert ours.created_time <= ours.lifespan[0] <= ours.lifespan[1]


def test_all_requests_share_a_batch(model: Any) -> None:
    outputs = model.generate_batch(PROMPTS * 4, generation_config=config())
    assert [o.generated_tokens for o in outputs.values()] == [greedy(model, p) for p in PROMPTS] * 4
    assert hf_paged.stats(model).peak_running > len(PROMPTS)


def test_without_prompts(model: Any) -> None:
    assert model.generate_batch([]) == {}


def test_the_models_own_config_and_a_limit_by_keyword(model: Any) -> None:
    model.generation_config.eos_token_id = None
    with native_calls(model, len(PROMPTS)):
        outputs = model.generate_batch(PROMPTS, max_new_tokens=5)
    assert [o.generated_tokens for o in outputs.values()] == [greedy(model, p, 5, None) for p in PROMPTS]
    assert model.generation_config.eos_token_id is None


def test_limits_and_eos_of_each_request(model: Any) -> None:
    stop_at = greedy(model, PROMPTS[1], 12, None)[4]
    with model.continuous_batching_context_manager(generation_config=config()) as manager:
        assert isinstance(manager, ContinuousBatchingManager)
        manager.add_request(PROMPTS[0], request_id="short", max_new_tokens=3, eos_token_id=-1)
        manager.add_request(PROMPTS[1], request_id="stops", max_new_tokens=12, eos_token_id=[stop_at, -1])
        manager.add_request(PROMPTS[2], request_id="usual")
        results = {}
        while len(results) < 3:
            result = manager.get_result(timeout=60)
            results[result.request_id] = result.generated_tokens
    assert results["short"] == greedy(model, PROMPTS[0], 3, None)
    assert results["stops"] == greedy(model, PROMPTS[1], 12, stop_at)
    assert results["stops"][-1] == stop_at
    assert results["usual"] == greedy(model, PROMPTS[2])


def test_num_return_sequences_and_a_seed(model: Any) -> None:
    wanted = config(do_sample=True, num_return_sequences=3, eos_token_id=-1)
    runs = [
        model.generate_batch(PROMPTS, generation_config=wanted, continuous_batching_config=small(seed=3))
        for _ in range(2)
    ]
    assert list(runs[0])[:4] == ["req_0__child#0", "req_0__child#1", "req_0", "req_1__child#0"]
    tokens = [[o.generated_tokens for o in run.values()] for run in runs]
    assert tokens[0] == tokens[1]
    assert len({tuple(t) for t in tokens[0][:3]}) > 1
    assert all(len(t) == 8 for t in tokens[0])


@pytest.mark.parametrize("seed", [None, 5])
def test_what_is_drawn_afterwards_is_what_it_is_with_transformers_own(model: Any, seed: int | None) -> None:
    if not hasattr(small(), "seed"):
        pytest.skip("this transformers has no seed for generate_batch, and sets none")
    plain = make_model("llama")
    drawn = []
    for target in (plain, model):
        torch.manual_seed(1)
        for _ in range(2):
            target.generate_batch(
                PROMPTS[:2], generation_config=config(), continuous_batching_config=small(seed=seed)
            )
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_logprobs_and_timestamps(model: Any) -> None:
    outputs = model.generate_batch(
        PROMPTS,
        generation_config=config(),
        continuous_batching_config=small(return_logprobs=True),
        record_timestamps=True,
    )
    for output in outputs.values():
        ids = torch.tensor([output.prompt_ids + output.generated_tokens])
        with torch.no_grad():
            expected = model(ids).logits[0].log_softmax(-1)
        places = range(len(output.prompt_ids) - 1, ids.shape[1] - 1)
        chosen = [expected[i, t] for i, t in zip(places, output.generated_tokens, strict=True)]
        torch.testing.assert_close(torch.tensor(output.logprobs), torch.stack(chosen), atol=1e-4, rtol=0)
        assert len(output.timestamps) == len(output.generated_tokens)
        assert output.timestamps == sorted(output.timestamps)


def test_streaming_gives_every_token_once(model: Any) -> None:
    wanted = config(eos_token_id=-1)
    with model.continuous_batching_context_manager(generation_config=wanted) as manager:
        request_id = manager.add_request(PROMPTS[0], streaming=True)
        outputs = list(manager.request_id_iter(request_id))
    expected = greedy(model, PROMPTS[0], 8, None)
    assert [o.generated_tokens for o in outputs] == [expected[: n + 1] for n in range(8)]
    assert [o.status for o in outputs] == [RequestStatus.DECODING] * 7 + [RequestStatus.FINISHED]


def test_a_handler_on_an_event_loop(model: Any) -> None:
    async def serve(manager: Any) -> list[int]:
        done: asyncio.Future[GenerationOutput] = asyncio.get_running_loop().create_future()
        manager.register_result_handler("mine", done.set_result)
        manager.add_request(PROMPTS[0], request_id="mine")
        return (await asyncio.wait_for(done, 60)).generated_tokens

    with model.continuous_batching_context_manager(generation_config=config()) as manager:
        assert asyncio.run(serve(manager)) == greedy(model, PROMPTS[0])


def test_a_wrong_request_fails_alone(model: Any) -> None:
    with model.continuous_batching_context_manager(generation_config=config()) as manager:
        ids = manager.add_requests([PROMPTS[0], [], [10**6], PROMPTS[1]])
        manager.add_request(PROMPTS[2], request_id="option", temperature=0.5)
        results = {r.request_id: r for r in (manager.get_result(timeout=60) for _ in range(5))}
    assert [results[i].status for i in ids] == [
        RequestStatus.FINISHED,
        RequestStatus.FAILED,
        RequestStatus.FAILED,
        RequestStatus.FINISHED,
    ]
    assert "empty" in results[ids[1]].error
    assert "1000000" in results[ids[2]].error
    assert "temperature" in results["option"].error
    assert results[ids[3]].generated_tokens == greedy(model, PROMPTS[1])


def test_options_of_single_requests(model: Any) -> None:
    wanted = config(do_sample=True, temperature=0.7, top_k=5, eos_token_id=-1)
    batching = small(per_request_processors=True)
    with model.continuous_batching_context_manager(
        generation_config=wanted, continuous_batching_config=batching
    ) as manager:
        manager.add_request(PROMPTS[0], top_k=1)
        tokens = manager.get_result(timeout=60).generated_tokens
    assert tokens == greedy(model, PROMPTS[0], 8, None)


def test_no_limit_ends_where_there_is_no_more_room() -> None:
    model = make_model("gpt2", n_positions=40)
    wanted = config(eos_token_id=-1)
    wanted.max_new_tokens = None
    with hf_paged.enabled(model):
        (output,) = model.generate_batch([PROMPTS[0]], generation_config=wanted).values()
    assert output.status is RequestStatus.FAILED
    assert "no end of sequence within the 36 tokens" in output.error
    assert output.generated_tokens == greedy(model, PROMPTS[0], 36, None)


def test_cancelling_and_stopping(model: Any) -> None:
    wanted = config(max_new_tokens=90, eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=wanted)
    manager.add_request(PROMPTS[0], request_id="never begun")
    manager.cancel_request("never begun")
    manager.start()
    assert manager.is_running()
    manager.add_request(PROMPTS[1], request_id="cancelled")
    manager.cancel_request("cancelled")
    manager.add_request(PROMPTS[2], request_id="whole")
    manager.stop(block=True, timeout=60)
    assert not manager.is_running()
    assert manager.add_request(PROMPTS[0]) is None
    whole = manager.get_result(timeout=1)
    assert whole.request_id == "whole"
    assert len(whole.generated_tokens) == 90
    assert manager.get_result(timeout=1) is None


def test_a_hard_stop_fails_what_runs(model: Any) -> None:
    manager = model.init_continuous_batching(generation_config=config(max_new_tokens=90, eos_token_id=-1))
    manager.start()
    manager.add_requests(PROMPTS * 8)
    manager.stop(hard_stop=True)
    results = [manager.get_result() for _ in range(len(PROMPTS) * 8)]
    assert any(r.status is RequestStatus.FAILED for r in results)
    check_engines([registry.get(model)])


def test_a_pause_lets_weights_change(model: Any) -> None:
    manager = model.init_continuous_batching(generation_config=config(eos_token_id=-1))
    manager.start()
    manager.add_request(PROMPTS[0])
    before = greedy(model, PROMPTS[0], 8, None)
    with manager.pause():
        assert manager.get_result(timeout=0).generated_tokens == before
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
        manager.add_request(PROMPTS[0])
        assert manager.get_result(timeout=0.1) is None
    assert manager.get_result(timeout=60).generated_tokens == greedy(model, PROMPTS[0], 8, None) != before
    manager.stop()


def test_a_manager_that_is_kept(model: Any) -> None:
    for start in (0, len(PROMPTS)):
        outputs = model.generate_batch(PROMPTS, generation_config=config(), persistent_manager=True)
        assert list(outputs) == [f"req_{i}" for i in range(start, start + len(PROMPTS))]
    model.destroy_cached_continuous_batching_manager()
    assert list(model.generate_batch(PROMPTS[:1], generation_config=config())) == ["req_0"]
    assert "_cached_continuous_batching_manager" not in vars(model)


@pytest.mark.parametrize(
    "options, code",
    [
        ({"num_beams": 2}, "beam_search"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"guidance_scale": 2.0}, "processors"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_we_cannot_do_is_transformers_own(model: Any, options: dict[str, Any], code: str) -> None:
    with pytest.warns(HfPagedFallbackWarning, match=code):
        manager = model.init_continuous_batching(config(**options), small())
    assert type(manager) is ContinuousBatchingManager
    assert hf_paged.stats(model).fallback_calls == {code: 1}
    hf_paged.disable(model)
    with hf_paged.enabled(model, fallback="error"), pytest.raises(hf_paged.FallbackError):
        model.init_continuous_batching(config(**options), small())


def test_it_is_in_eval_mode_as_with_transformers_own() -> None:
    model = make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    with hf_paged.enabled(model), native_calls(model, len(PROMPTS)):
        outputs = model.generate_batch(PROMPTS, generation_config=config())
        assert not model.training
        assert [o.generated_tokens for o in outputs.values()] == [greedy(model, p) for p in PROMPTS]


def test_disable_restores_the_model(model: Any) -> None:
    model.generate_batch(PROMPTS[:1], generation_config=config(), persistent_manager=True)
    copied = copy.deepcopy(model)
    hf_paged.disable(model)
    for one in (model, copied):
        assert not any("continuous" in name for name in vars(one))


def test_disable_while_requests_run_fails_them(model: Any) -> None:
    manager = model.init_continuous_batching(generation_config=config(max_new_tokens=90, eos_token_id=-1))
    manager.start()
    manager.add_requests(PROMPTS)
    hf_paged.disable(model)
    deadline = time.monotonic() + 60
    results = []
    while len(results) < len(PROMPTS) and time.monotonic() < deadline:
        results += [r for r in [manager.get_result(timeout=1)] if r is not None]
    assert "disabled" in results[-1].error
