"""Requests of every kind, as many threads make them of one model: what the traffic test and traffic.py have in common.

Kinds: greedy and sampled requests, batches, beams, processors built in and user-made, streamers, streamed tokens,
drafts, scores, a plain forward, cancelled and dropped requests, bad input. The model is trained while it serves, under
`paused`, so what is right for a request depends on when it ran: a result must be that of one of the weights' states.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import hf_paged

DEADLINE_S = 300
#: Ids from here on are drawn for prompts: those below are special ones of the small models.
_FIRST_ID = 3
_SHARED_TOKENS = 20


@dataclass
class Mix:
    """What requests look like.

    Args:
        vocab_size: token ids are below it.
        prompt_tokens: most tokens of a prompt's own; half of all prompts have a common part before it.
        new_tokens: least and most.
    """

    vocab_size: int
    prompt_tokens: int = 24
    new_tokens: tuple[int, int] = (1, 24)
    shared: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.shared = self.ids(random.Random("shared"), _SHARED_TOKENS)

    def ids(self, source: random.Random, count: int) -> list[int]:
        return [source.randrange(_FIRST_ID, self.vocab_size) for _ in range(count)]


class Job:
    """One request. `run` returns what can be compared: token ids, lists of them, or nothing."""

    def __init__(self, mix: Mix, seed: int) -> None:
        source = random.Random(seed)
        self.seed = seed
        self.mix = mix
        own = mix.ids(source, source.randint(1, mix.prompt_tokens))
        self.prompt = mix.shared + own if source.random() < 0.5 else own
        self.kind = source.choice(sorted(KINDS))
        self.options = {"max_new_tokens": source.randint(*mix.new_tokens), "do_sample": False}

    def run(self, model: Any) -> Any:
        return KINDS[self.kind](self, model)

    def generate(self, model: Any, **options: Any) -> Any:
        return model.generate(torch.tensor([self.prompt]), **(self.options | options))

    def submit(self, model: Any, **options: Any) -> Any:
        return hf_paged.engine(model).submit(self.prompt, **(self.options | options))


def jobs_of(mix: Mix, count: int, seed: int) -> list[Job]:
    return [Job(mix, seed * 100_000 + i) for i in range(count)]


def greedy(job: Job, model: Any) -> Any:
    return job.generate(model).tolist()


def batch(job: Job, model: Any) -> Any:
    """Ragged rows, left-padded, some of which end early."""
    prompts = [job.prompt, job.prompt[:3], [*job.prompt, 7]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ends = list(range(_FIRST_ID, job.mix.vocab_size, 25))
    output = model.generate(ids, attention_mask=mask, **job.options, eos_token_id=ends, pad_token_id=0)
    return output.tolist()


def beams(job: Job, model: Any) -> Any:
    return job.generate(model, num_beams=3, num_return_sequences=2).tolist()


def processors(job: Job, model: Any) -> Any:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    return job.generate(model, **options).tolist()


class _Odd(LogitsProcessor):
    """A user's own: even tokens lose, and it counts its steps."""

    def __init__(self) -> None:
        self.num_steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.num_steps += 1
        scores[:, ::2] -= 2.0
        return scores


def user_code(job: Job, model: Any) -> Any:
    own = _Odd()
    tokens = job.generate(model, logits_processor=LogitsProcessorList([own])).tolist()
    return tokens, own.num_steps


class Collecting(BaseStreamer):
    """Keeps what it is given: the prompt first, then a token a step."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def streamer(job: Job, model: Any) -> Any:
    collecting = Collecting()
    job.generate(model, streamer=collecting)
    return collecting.given, collecting.ended


def scores(job: Job, model: Any) -> Any:
    output = job.generate(model, output_logits=True, return_dict_in_generate=True)
    return output.sequences.tolist(), len(output.logits)


def drafts(job: Job, model: Any) -> Any:
    return job.generate(model, prompt_lookup_num_tokens=3).tolist()


def forward(job: Job, model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([job.prompt])).logits.argmax(-1).tolist()


def bad_input(job: Job, model: Any) -> Any:
    """Refused by upstream, by the request's own check, or at its first step."""
    wrong = [
        lambda: model.generate(torch.tensor([job.prompt]), max_new_tokens=0, max_length=None),
        lambda: hf_paged.engine(model).submit([job.mix.vocab_size], max_new_tokens=2),
        lambda: model.generate(torch.tensor([job.prompt]), logits_processor=LogitsProcessorList([None])),
    ]
    try:
        wrong[job.seed % len(wrong)]()
    except Exception as error:
        return type(error).__name__
    return "it was taken"


def sampled(job: Job, model: Any) -> Any:
    """By a seed of its own, so that nothing else decides."""
    return job.submit(model, do_sample=True, top_k=20, seed=job.seed).result(DEADLINE_S).token_ids


def streamed(job: Job, model: Any) -> Any:
    return list(job.submit(model))


def dropped(job: Job, model: Any) -> Any:
    """Its first token; the others are given up."""
    return next(iter(job.submit(model)))


def cancelled(job: Job, model: Any) -> Any:
    handle = job.submit(model, max_new_tokens=job.mix.new_tokens[1] * 2)
    handle.cancel()
    try:
        handle.result(DEADLINE_S)
    except hf_paged.RequestCancelledError:
        pass


KINDS: dict[str, Callable[[Job, Any], Any]] = {
    f.__name__: f
    for f in (
        greedy, batch, beams, processors, user_code, streamer, scores, drafts, forward, bad_input, sampled,
        streamed, dropped, cancelled,
    )
}  # fmt: skip


# --- weights ----------------------------------------------------------------------------------------------------------


def train(model: Any) -> None:
    """One step of SGD on a batch of its own; the same weights give the same ones after it."""
    ids = torch.arange(_FIRST_ID, _FIRST_ID + 32).view(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def restored_weights(model: Any) -> Iterator[None]:
    """Whatever is trained inside is undone."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(weights)


# --- running ----------------------------------------------------------------------------------------------------------


def alone(model: Any, jobs: Sequence[Job], states: int) -> list[list[Any]]:
    """What each job gives with nothing beside it and no prefix cache, in each state of the weights: [state][job]."""
    results = []
    with restored_weights(model), hf_paged.enabled(model, prefix_caching=False):
        for state in range(states):
            if state:
                train(model)
            results.append([job.run(model) for job in jobs])
    return results


def one_after_another(model: Any, jobs: Sequence[Job], states: int) -> tuple[float, list[Any]]:
    """Seconds, and the results; training steps come in between."""
    every = len(jobs) // states
    results = []
    start = time.perf_counter()
    for i, job in enumerate(jobs):
        if i and i % every == 0 and i // every < states:
            with hf_paged.paused(model):
                train(model)
        results.append(job.run(model))
    return time.perf_counter() - start, results


def at_once(model: Any, jobs: Sequence[Job], num_threads: int, states: int) -> tuple[float, list[Any]]:
    """Seconds, and the results, each job's own; training steps come when a part of the jobs is done.

    Raises:
        BaseException: the first that a job raised.
        TimeoutError: a thread hangs.
    """
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []
    num_done = [0] * num_threads
    begin = threading.Barrier(num_threads + 2)
    every = len(jobs) // states

    def work(thread: int) -> None:
        begin.wait()
        for i in range(thread, len(jobs), num_threads):
            try:
                results[i] = jobs[i].run(model)
            except BaseException as error:
                errors.append(error)
            num_done[thread] += 1

    def trainer() -> None:
        begin.wait()
        for state in range(1, states):
            while sum(num_done) < state * every:
                time.sleep(0.002)
            with hf_paged.paused(model):
                train(model)

    threads = [threading.Thread(target=work, args=(t,), daemon=True) for t in range(num_threads)]
    threads.append(threading.Thread(target=trainer, daemon=True))
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join(DEADLINE_S)
        if thread.is_alive():
            raise TimeoutError(f"a thread hangs; {sum(num_done)} of {len(jobs)} requests were done")
    if errors:
        raise errors[0]
    return time.perf_counter() - start, results


def differing(jobs: Sequence[Job], results: Sequence[Any], wanted: Sequence[Sequence[Any]]) -> list[int]:
    """The jobs whose result is that of no state of the weights.

    A plain forward is upstream's business: it is not held back by `paused`, so beside training it counts for nothing.
    """
    return [
        i
        for i, job in enumerate(jobs)
        if not (job.kind == "forward" and len(wanted) > 1)
        and not any(results[i] == state[i] for state in wanted)
    ]
