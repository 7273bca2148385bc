"""What goes wrong in the middle: the right error for the right caller, memory back, and the next call works."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine import kv_cache, registry
from hf_paged.engine.kv_cache import KVCache
from hf_paged.errors import KVCacheOutOfMemory
from tests.helpers import assert_same_tokens, left_pad, make_model, native_calls, random_prompts

LONG = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
PROMPTS = random_prompts([9, 14, 5, 11])
WITHIN_S = 60


@pytest.fixture
def model() -> Iterator[Any]:
    model = hf_paged.enable(make_model("llama"), block_size=4, kv_cache_memory="4MiB", fallback="error")
    yield model
    hf_paged.disable(model)


def alone(prompt: list[int]) -> list[int]:
    return make_model("llama").generate(torch.tensor([prompt]), **LONG)[0, len(prompt) :].tolist()


def check_next_call(model: Any) -> None:
    assert hf_paged.stats(model).kv_blocks_used == 0
    with native_calls(model):
        output = model.generate(torch.tensor([PROMPTS[0]]), **LONG)
    assert output[0, len(PROMPTS[0]) :].tolist() == alone(PROMPTS[0])


def broken_after(
    model: Any, steps: int, error: BaseException, monkeypatch: pytest.MonkeyPatch, *, sequences: int = 1
) -> None:
    """The forward raises `error` once, when it has run so often with so many; steps before and after are whole."""
    model.generate(torch.tensor([[5]]), max_new_tokens=1)
    runner = registry.get(model)._loop.runtime.runner
    forward, count = runner.forward, [0]

    def run(*args: Any) -> Any:
        counts = len(args[1].metadata.seq_lens_list) >= sequences
        count[0] += counts
        if counts and count[0] == steps:
            raise error
        return forward(*args)

    monkeypatch.setattr(runner, "forward", run)


@pytest.mark.parametrize("error", [RuntimeError("device on fire"), torch.OutOfMemoryError("no memory")])
def test_a_forward_that_fails_fails_what_was_running(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    broken_after(model, 7, error, monkeypatch, sequences=len(PROMPTS))
    client = hf_paged.engine(model)
    handles = [client.submit(p, **LONG) for p in PROMPTS]
    for handle in handles:
        with pytest.raises(type(error), match=str(error)):
            handle.result(timeout=WITHIN_S)
        assert handle.partial().finish_reason == "error"
    check_next_call(model)


def test_a_pool_that_cannot_grow_preempts_and_every_answer_is_right(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = KVCache.grow

    def refused(self: KVCache, num_blocks: int) -> int:
        if num_blocks > 24:
            raise KVCacheOutOfMemory("the system refuses")
        return grow(self, min(num_blocks, 24))

    monkeypatch.setattr(KVCache, "grow", refused)
    handles = [hf_paged.engine(model).submit(p, **LONG) for p in PROMPTS]
    assert [h.result(timeout=WITHIN_S).token_ids for h in handles] == [alone(p) for p in PROMPTS]
    stats = hf_paged.stats(model)
    assert stats.preemptions
    assert stats.kv_blocks_total <= 24


def test_no_memory_at_all_is_an_error_of_the_call_and_the_next_one_works(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:

        def refused(self: Any, num_blocks: int) -> bool:
            raise MemoryError("the system refuses")

        broken.setattr(kv_cache._HostPool, "resize", refused)
        with pytest.raises(KVCacheOutOfMemory, match="0 blocks"):
            model.generate(torch.tensor([PROMPTS[0]]), **LONG)
    check_next_call(model)


def test_an_interrupt_of_one_caller_harms_no_other(model: Any) -> None:
    """Ctrl-C arrives in the main thread, which waits for its call while an engine thread turns."""
    started = threading.Event()

    def others() -> list[list[int]]:
        handles = [hf_paged.engine(model).submit(p, **LONG) for p in PROMPTS[1:]]
        next(iter(handles[0]))
        started.set()
        return [h.result(timeout=WITHIN_S).token_ids for h in handles]

    def interrupt() -> None:
        started.wait(WITHIN_S)
        time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # A process started in the background of a shell ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(2) as pool:
            results = pool.submit(others)
            with pytest.raises(KeyboardInterrupt):
                _generate_until_interrupted(model, lambda: pool.submit(interrupt))
            kept = results.result()
    finally:
        signal.signal(signal.SIGINT, before)
    assert kept == [alone(p) for p in PROMPTS[1:]]
    registry.get(model).drain()
    check_next_call(model)


def _generate_until_interrupted(model: Any, begun: Callable[[], object]) -> None:
    begun()
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        model.generate(torch.tensor([PROMPTS[0]]), **LONG)


def test_copies_made_while_requests_run_are_plain_and_right(model: Any) -> None:
    handles = [hf_paged.engine(model).submit(p, **LONG) for p in PROMPTS]
    next(iter(handles[0]))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not hf_paged.is_enabled(twin)
        batch = left_pad(PROMPTS)
        assert_same_tokens(twin.generate(**batch, **LONG), make_model("llama").generate(**batch, **LONG))
    assert [h.result(timeout=WITHIN_S).token_ids for h in handles] == [alone(p) for p in PROMPTS]
