"""What a server needs of a submitted request: edits of its logits, raw log-probabilities, salts, news of trouble."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine import registry
from hf_paged.errors import RequestCancelledError
from tests.helpers import make_model, random_prompts

PROMPTS = random_prompts([3, 17, 1, 9])


@pytest.fixture
def model() -> Iterator[Any]:
    model = make_model("llama")
    hf_paged.enable(model, block_size=4, backend="reference", fallback="error", kv_cache_memory="4MiB")
    yield model
    hf_paged.disable(model)


def logits_of(prompt: list[int], ids: list[int]) -> torch.Tensor:
    """[1 + len(ids), vocab], the logits each of `ids` and the token after were chosen from."""
    with torch.no_grad():
        return make_model("llama")(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :]


def test_an_edit_sees_the_tokens_so_far_and_decides(model: Any) -> None:
    seen: list[list[int]] = []

    def only_even(generated: list[int], logits: torch.Tensor) -> None:
        seen.append(list(generated))
        logits[1::2] = -torch.inf

    client = hf_paged.engine(model)
    plain = [client.submit(prompt, max_new_tokens=6) for prompt in PROMPTS[1:]]
    ids = (
        client.submit(PROMPTS[0], max_new_tokens=6, logits_edit=only_even, eos_token_id=[127])
        .result()
        .token_ids
    )
    assert seen == [ids[:i] for i in range(6)]
    best = logits_of(PROMPTS[0], ids)[:-1, ::2].argmax(-1) * 2
    assert ids == best.tolist()
    for prompt, handle in zip(PROMPTS[1:], plain, strict=True):
        alone = make_model("llama").generate(torch.tensor([prompt]), max_new_tokens=6)
        assert handle.result().token_ids == alone[0, len(prompt) :].tolist()


def test_an_edit_that_raises_fails_its_request_only(model: Any) -> None:
    def broken(generated: list[int], logits: torch.Tensor) -> None:
        if len(generated) == 2:
            raise LookupError("broken")

    client = hf_paged.engine(model)
    good = client.submit(PROMPTS[1], max_new_tokens=8)
    bad = client.submit(PROMPTS[0], max_new_tokens=8, logits_edit=broken)
    with pytest.raises(LookupError):
        bad.result(30)
    assert len(bad.partial().token_ids) == 2
    assert len(good.result(30).token_ids) == 8


def test_raw_logprobs_are_those_of_the_model(model: Any) -> None:
    client = hf_paged.engine(model)
    options = {
        "max_new_tokens": 5,
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 5,
        "seed": 3,
        "logprobs": 7,
    }

    def bias(generated: list[int], logits: torch.Tensor) -> None:
        logits[9] += 5

    raw = client.submit(PROMPTS[1], **options, raw_logprobs=True, logits_edit=bias).result()
    expected = logits_of(PROMPTS[1], raw.token_ids)[:-1].log_softmax(-1)
    for entry, row in zip(raw.logprobs or [], expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(7).indices.tolist()
    processed = client.submit(PROMPTS[1], **options, logits_edit=bias).result()
    assert processed.token_ids == raw.token_ids
    assert processed.logprobs != raw.logprobs


def test_prefixes_are_shared_within_a_salt_only(model: Any) -> None:
    client = hf_paged.engine(model)

    def cached(salt: str) -> int:
        return client.submit(PROMPTS[1], max_new_tokens=1, cache_salt=salt).result().cached_length

    assert cached("") == 0
    assert cached("") == 16
    assert cached("a") == 0
    assert cached("a") == 16
    assert cached("b") == 0


def test_updates_come_in_lists_and_tell_the_end(model: Any) -> None:
    async def follow() -> tuple[list[int], list[int]]:
        handle = hf_paged.engine(model).submit(PROMPTS[1], max_new_tokens=20)
        lists = [tokens async for tokens in handle.updates()]
        assert all(lists)
        return [token for tokens in lists for token in tokens], (await handle).token_ids

    followed, whole = asyncio.run(follow())
    assert followed == whole


def test_no_token_is_missed_by_who_is_busy_when_it_comes(model: Any) -> None:
    client = hf_paged.engine(model)
    pauses = random.Random(0)

    async def follow(number: int) -> None:
        handle = client.submit(PROMPTS[number % len(PROMPTS)], max_new_tokens=40)
        followed: list[int] = []
        async for tokens in handle.updates():
            followed += tokens
            if pauses.random() < 0.7:
                await asyncio.sleep(pauses.choice([0, 0.001, 0.005]))
        assert followed == (await handle).token_ids

    async def main() -> None:
        async with asyncio.timeout(60):
            for _ in range(4):
                await asyncio.gather(*map(follow, range(48)))

    asyncio.run(main())


def test_who_never_waits_leaves_others_their_turn(model: Any) -> None:
    async def main() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        beside = asyncio.ensure_future(other())
        async for _token in hf_paged.engine(model).submit(PROMPTS[0], max_new_tokens=60):
            time.sleep(0.005)  # more tokens come meanwhile
        beside.cancel()
        return turns

    assert asyncio.run(main()) >= 5


def test_updates_that_are_left_early_leave_no_watcher(model: Any) -> None:
    async def follow() -> None:
        handle = hf_paged.engine(model).submit(PROMPTS[1], max_new_tokens=100)
        updates = handle.updates()
        await anext(updates)
        await updates.aclose()
        assert handle._watchers == []
        handle.cancel()
        with pytest.raises(RequestCancelledError):
            await handle
        assert handle._enders == []
        assert handle.partial().finish_reason == "cancelled"

    asyncio.run(follow())


def test_a_failed_step_is_trouble_until_one_succeeds(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = hf_paged.engine(model)
    assert client.trouble() is None

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(type(model.model.layers[0].mlp), "forward", broken)
        with pytest.raises(RuntimeError):
            client.submit(PROMPTS[0], max_new_tokens=2).result(30)
        assert "RuntimeError" in (client.trouble() or "")
    client.submit(PROMPTS[0], max_new_tokens=2).result(30)
    assert client.trouble() is None


def test_nobody_waits_for_ever_when_the_bookkeeping_breaks(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = hf_paged.engine(model)
    loop = registry.get(model)._loop  # type: ignore[union-attr]
    handles = [client.submit(prompt, max_new_tokens=100) for prompt in PROMPTS]
    next(iter(handles[0]))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(loop.runtime.scheduler, "schedule", broken)
        patched.setattr(loop.runtime.scheduler, "remove", broken)
        for handle in handles:
            with pytest.raises(RuntimeError, match="broken"):
                handle.result(30)
    # What is broken was thrown away: the next request finds a working engine.
    assert len(client.submit(PROMPTS[0], max_new_tokens=3).result(30).token_ids) == 3
    assert client.trouble() is None


def test_a_request_for_which_no_runtime_can_be_made_ends(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = hf_paged.engine(model)
    loop = registry.get(model)._loop  # type: ignore[union-attr]
    client.submit(PROMPTS[0], max_new_tokens=1).result(30)
    ready, calls = loop.ready, []

    def fails_in_the_engine() -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("no room")
        return ready()

    monkeypatch.setattr(loop, "ready", fails_in_the_engine)
    for _ in range(4):
        try:
            client.submit(PROMPTS[0], max_new_tokens=1).result(10)
        except MemoryError:
            break
    else:
        raise AssertionError("it never failed")


def test_trouble_of_a_disabled_model() -> None:
    model = make_model("gpt2")
    hf_paged.enable(model)
    client = hf_paged.engine(model)
    assert client.max_length == model.config.n_positions
    hf_paged.disable(model)
    assert "not enabled" in (client.trouble() or "")
