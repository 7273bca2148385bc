"""`submit` and its handle: progress unwaited, tokens as they come, from threads and event loops."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine import registry
from hf_paged.errors import FallbackError, InvalidRequestError, RequestCancelledError
from tests.helpers import make_model, random_prompts

PROMPTS = random_prompts([3, 17, 1, 9])
LONG = {"max_new_tokens": 110, "eos_token_id": None}


@pytest.fixture
def model() -> Iterator[Any]:
    model = make_model("llama")
    hf_paged.enable(model, block_size=4, backend="reference", fallback="silent", kv_cache_memory="4MiB")
    yield model
    hf_paged.disable(model)


def expected(prompt: list[int], **kwargs: Any) -> list[int]:
    output = make_model("llama").generate(torch.tensor([prompt]), **kwargs)
    return output[0, len(prompt) :].tolist()


def test_a_submitted_request_ends_without_anybody_waiting(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[0], max_new_tokens=5)
    deadline = time.monotonic() + 30
    while not handle.done and time.monotonic() < deadline:
        time.sleep(0.005)
    result = handle.result(timeout=0)
    assert result.token_ids == expected(PROMPTS[0], max_new_tokens=5)
    assert (result.finish_reason, result.prompt_length) == ("length", 3)


def test_each_iteration_gives_all_tokens(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[1], max_new_tokens=8)
    wanted = expected(PROMPTS[1], max_new_tokens=8)
    assert list(handle) == wanted
    assert list(handle) == wanted
    assert handle.result().token_ids == wanted


def test_tokens_come_while_others_are_still_to_come(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[1], **LONG)
    assert next(iter(handle)) == expected(PROMPTS[1], max_new_tokens=1)[0]
    assert not handle.done, "the first token came with the last"
    handle.cancel()


def test_async_iteration_and_await(model: Any) -> None:
    async def one(prompt: list[int]) -> tuple[list[int], Any]:
        handle = hf_paged.engine(model).submit(prompt, max_new_tokens=8)
        return [token async for token in handle], await handle

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(one, PROMPTS))

    for prompt, (tokens, result) in zip(PROMPTS, asyncio.run(all_of_them()), strict=True):
        assert tokens == result.token_ids == expected(prompt, max_new_tokens=8)


def test_a_closed_event_loop_disturbs_nobody(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[0], **LONG)
    loop = asyncio.new_event_loop()
    iterator = aiter(handle)
    loop.run_until_complete(anext(iterator))
    loop.close()
    assert len(handle.result().token_ids) == 110


def test_many_threads_may_follow_one_handle(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[2], max_new_tokens=20)
    seen: list[list[int]] = []
    threads = [threading.Thread(target=lambda: seen.append(list(handle))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [expected(PROMPTS[2], max_new_tokens=20)] * 4


def test_cancel_ends_the_request_and_gives_its_blocks_back(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[0], **LONG)
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result(timeout=30)
    with pytest.raises(RequestCancelledError):
        list(handle)
    handle.cancel()
    assert hf_paged.stats(model).kv_blocks_used == 0


def test_waiting_may_time_out(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[0], **LONG)
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.0)
    assert len(handle.result(timeout=60).token_ids) == 110


def test_a_seed_decides_alone(model: Any) -> None:
    client = hf_paged.engine(model)
    kwargs = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}

    def sample(seed: int | None) -> list[int]:
        return client.submit(PROMPTS[1], seed=seed, **kwargs).result().token_ids

    wanted = sample(5)
    state = torch.get_rng_state()
    others = [client.submit(p, seed=i, **kwargs) for i, p in enumerate(PROMPTS)]
    assert sample(5) == wanted
    assert torch.equal(torch.get_rng_state(), state), "a seeded request drew from the global generator"
    assert sample(6) != wanted
    for other in others:
        other.result()
    torch.manual_seed(0)
    unseeded = [sample(None), sample(None)]
    torch.manual_seed(0)
    assert [sample(None), sample(None)] == unseeded
    assert unseeded[0] != unseeded[1]


def test_logprobs_are_those_of_the_scores(model: Any) -> None:
    prompt = PROMPTS[1]
    result = hf_paged.engine(model).submit(prompt, max_new_tokens=4, logprobs=3).result()
    assert len(result.logprobs) == 4
    output = make_model("llama").generate(
        torch.tensor([prompt]), max_new_tokens=4, return_dict_in_generate=True, output_scores=True
    )
    for entry, token, scores in zip(result.logprobs, result.token_ids, output.scores, strict=True):
        reference = scores[0].log_softmax(-1)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(reference[token]), abs=1e-4)
        assert [t for t, _ in entry.top] == reference.topk(3).indices.tolist()


def test_what_is_not_native_is_refused(model: Any) -> None:
    with pytest.raises(FallbackError, match="use_cache") as caught:
        hf_paged.engine(model).submit(PROMPTS[0], use_cache=False)
    assert [reason.code for reason in caught.value.reasons] == ["use_cache"]


@pytest.mark.parametrize(
    "prompt, kwargs",
    [
        ([], {}),
        ([999], {}),
        ([5], {"adapter": "one"}),
        ([5], {"logprobs": -1}),
        ([5], {"logprobs": True}),
        ([5], {"max_new_tokens": -1}),
        ([5], {"attention_mask": [1]}),
    ],
)
def test_bad_requests_are_refused_at_once(prompt: list[int], kwargs: dict[str, Any], model: Any) -> None:
    with pytest.raises(InvalidRequestError):
        hf_paged.engine(model).submit(prompt, **kwargs)
    assert hf_paged.stats(model).requests == 0


def test_a_lower_priority_number_goes_first(model: Any) -> None:
    hf_paged.disable(model)
    hf_paged.enable(model, block_size=4, backend="reference", max_num_seqs=1)
    client = hf_paged.engine(model)
    order: list[str] = []
    first = client.submit(PROMPTS[0], **LONG)
    next(iter(first))
    handles = {"late": client.submit(PROMPTS[1], priority=5, max_new_tokens=2)}
    handles["early"] = client.submit(PROMPTS[2], priority=1, max_new_tokens=2)
    threads = [
        threading.Thread(target=lambda n=n, h=h: (h.result(), order.append(n))) for n, h in handles.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert handles["early"].result().metrics.queued < handles["late"].result().metrics.queued
    first.result()


@pytest.mark.parametrize("how", ["loop left", "handle dropped", "never looked at", "async loop left"])
def test_what_nobody_can_ask_for_any_more_gives_its_blocks_back(model: Any, how: str) -> None:
    engine, client = registry.get(model), hf_paged.engine(model)
    witness = client.submit(PROMPTS[3], **LONG)
    if how == "loop left":
        for _token in client.submit(PROMPTS[0], **LONG):
            break
    elif how == "handle dropped":
        handle = client.submit(PROMPTS[0], **LONG)
        next(iter(handle))
        del handle
    elif how == "never looked at":
        client.submit(PROMPTS[0], **LONG)
    else:
        asyncio.run(_first_of(client))
    dropped = next((c for c in engine._loop.calls if c is not witness._call), None)
    seen = 0 if dropped is None else dropped.sequences[0].num_generated
    while dropped is not None and not dropped.done.is_set():
        assert not witness.done, "the dropped request ran on to its end"
    if dropped is not None:
        assert isinstance(dropped.error, RequestCancelledError)
        assert not dropped.sequences[0].block_table
        assert dropped.sequences[0].num_generated - seen <= 1, "no more than the step that was running"
    assert witness.result(timeout=30).token_ids == expected(PROMPTS[3], **LONG)
    assert hf_paged.stats(model).generated_tokens < 2 * 110


async def _first_of(client: Any) -> None:
    async for _token in client.submit(PROMPTS[0], **LONG):
        break


def test_a_handle_awaited_by_a_task_nobody_holds_is_not_dropped(model: Any) -> None:
    results: list[Any] = []

    async def follow() -> None:
        results.append(await hf_paged.engine(model).submit(PROMPTS[0], **LONG))

    async def main() -> None:
        asyncio.get_running_loop().create_task(follow())
        for _ in range(3):
            await asyncio.sleep(0.01)
            gc.collect()
        while not results:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert results[0].token_ids == expected(PROMPTS[0], **LONG)


def test_who_waits_for_the_result_is_woken_by_the_end_alone(model: Any) -> None:
    handle = hf_paged.engine(model).submit(PROMPTS[0], **LONG)
    woken: list[int] = []
    original = handle._over.wait

    def wait(timeout: float | None = None) -> bool:
        came = original(timeout)
        woken.append(len(handle._tokens))
        return came

    handle._over.wait = wait  # type: ignore[method-assign]
    result = handle.result(timeout=60)
    assert len(result.token_ids) == 110
    assert woken in ([], [110])
