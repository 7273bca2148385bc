"""Many threads with requests of every kind at once: each gets what it gets alone, and nothing is left behind.

Kinds: greedy and sampled requests, batches, processors, streamed tokens, drafts, a plain forward, cancelled and dropped
requests, bad input, training steps under `paused`. The model is trained while it serves, so what is right for a
request depends on when it ran: a result must be that of one of the states the weights were in.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine import registry
from tests.helpers import assert_same_tokens, left_pad, make_model, random_prompts

SHARED = random_prompts([20], seed=99)[0]
NUM_STATES = 3  # of the weights: two training steps
DEADLINE_S = 120


def set_state(model: Any, state: int) -> None:
    """The weights after so many training steps: the same whenever they are made."""
    generator = torch.Generator().manual_seed(state)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02 * bool(state))


class Job:
    """One request: `run` on the served model, `alone` on a plain one. Both return what can be compared."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.seed = seed
        own = random_prompts([rng.randint(1, 24)], seed=seed)[0]
        self.prompt = SHARED + own if rng.random() < 0.5 else own
        self.kind = rng.choice(sorted(KINDS))
        self.options = {"max_new_tokens": rng.randint(1, 24), "do_sample": False}

    def run(self, model: Any) -> Any:
        return KINDS[self.kind](self, model)


def greedy(job: Job, model: Any) -> Any:
    return model.generate(torch.tensor([job.prompt]), **job.options)


def batch(job: Job, model: Any) -> Any:
    prompts = [job.prompt, job.prompt[:3], [*job.prompt, 7]]
    return model.generate(**left_pad(prompts), **job.options, eos_token_id=[1, 9, 30, 44])


def processors(job: Job, model: Any) -> Any:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    return model.generate(torch.tensor([job.prompt]), **job.options, **options)


def scores(job: Job, model: Any) -> Any:
    output = model.generate(
        torch.tensor([job.prompt]), **job.options, output_logits=True, return_dict_in_generate=True
    )
    return output.sequences


def drafts(job: Job, model: Any) -> Any:
    return model.generate(torch.tensor([job.prompt]), **job.options, prompt_lookup_num_tokens=3)


def forward(job: Job, model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([job.prompt])).logits.argmax(-1)


def bad_input(job: Job, model: Any) -> Any:
    with pytest.raises(Exception, match="max_new_tokens"):
        model.generate(torch.tensor([job.prompt]), max_new_tokens=0, max_length=None)
    return torch.zeros(1, 1)


def sampled(job: Job, model: Any) -> Any:
    """By a seed of its own: alone means on an enabled model with nothing beside."""
    options = job.options | {"do_sample": True, "top_k": 20}
    return torch.tensor(
        [hf_paged.engine(model).submit(job.prompt, seed=job.seed, **options).result(DEADLINE_S).token_ids]
    )


def streamed(job: Job, model: Any) -> Any:
    return torch.tensor([list(hf_paged.engine(model).submit(job.prompt, **job.options))])


def dropped(job: Job, model: Any) -> Any:
    """Its first token, the others are given up."""
    for token in hf_paged.engine(model).submit(job.prompt, **job.options):
        return torch.tensor([[token]])


def cancelled(job: Job, model: Any) -> Any:
    handle = hf_paged.engine(model).submit(job.prompt, **(job.options | {"max_new_tokens": 60}))
    handle.cancel()
    try:
        handle.result(DEADLINE_S)
    except hf_paged.RequestCancelledError:
        pass
    return torch.zeros(1, 1)


KINDS: dict[str, Callable[[Job, Any], Any]] = {
    f.__name__: f
    for f in (
        greedy, batch, processors, scores, drafts, forward, bad_input, sampled, streamed, dropped, cancelled
    )
}  # fmt: skip


@pytest.fixture
def served() -> Iterator[Any]:
    model = hf_paged.enable(make_model("llama"), block_size=4, kv_cache_memory="2MiB", fallback="error")
    yield model
    hf_paged.disable(model)


def wanted(jobs: list[Job], states: int) -> list[list[torch.Tensor]]:
    """What each job gives alone in each state of the weights, [state][job]."""
    model = hf_paged.enable(make_model("llama"), block_size=4, prefix_caching=False)
    results = []
    for state in range(states):
        set_state(model, state)
        results.append([job.run(model) for job in jobs])
    hf_paged.disable(model)
    return results


def run_traffic(model: Any, num_threads: int, per_thread: int, *, seed: int, states: int) -> None:
    jobs = [Job(seed * 10_000 + i) for i in range(num_threads * per_thread)]
    expected = wanted(jobs, states)
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []
    begin = threading.Barrier(num_threads + 1)

    def work(thread: int) -> None:
        begin.wait()
        for i in range(thread * per_thread, (thread + 1) * per_thread):
            try:
                results[i] = jobs[i].run(model)
            except BaseException as error:
                errors.append(error)

    def train() -> None:
        """Plain forwards are upstream's business: they are not held back, so they stop while weights change."""
        begin.wait()
        for state in range(1, states):
            with hf_paged.paused(model):
                set_state(model, state)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(num_threads)]
    threads.append(threading.Thread(target=train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    for i, job in enumerate(jobs):
        if job.kind == "forward" and states > 1:
            continue
        if not any(torch.equal(results[i], alone[i]) for alone in expected):
            assert_same_tokens(results[i], expected[-1][i])
    engine = registry.get(model)
    assert engine is not None
    engine.drain()  # what was dropped ends at a step boundary
    for thread in threading.enumerate():
        if thread.name.startswith("hf_paged-engine"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "the engine's thread stays"
    stats = hf_paged.stats(model)
    assert stats.fallback_calls == {}
    assert stats.kv_blocks_used == 0
    assert stats.peak_running > 1


@pytest.mark.parametrize("states", [1, NUM_STATES])
def test_every_result_is_that_of_the_request_alone(served: Any, states: int) -> None:
    run_traffic(served, 8, 6, seed=1, states=states)


@pytest.mark.slow
def test_32_threads_of_20_requests_ten_times(served: Any) -> None:
    for seed in range(10):
        run_traffic(served, 32, 20, seed=seed, states=1)
