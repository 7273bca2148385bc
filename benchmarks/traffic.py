"""Many threads with requests of every kind at once, against the same requests one after another; and a slow streamer.

Both arms run on the enabled model, with training steps under `paused` in between; every result must be what the
request gives alone, in one of the states the weights were in. Target: ≥ 4 times the requests a second. Then the time of
requests beside a caller whose streamer sleeps a second a token, over their time without it. Target: ≤ 1.1.

    python benchmarks/traffic.py [--threads 32] [--requests 20] [--new-tokens 8,48] [--states 2] [--model llama-tiny]
    [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import collections
import statistics
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from mixed_requests import Job, Mix, alone, at_once, differing, jobs_of, one_after_another, restored_weights
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json

MUST_BE_FASTER, MOST_SLOWER = 4.0, 1.1


class Sleeper(BaseStreamer):
    """Sleeps a second a token, until it is told to stop; then it ends its call by an exception."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.num_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.num_tokens += 1
        if self.stop.wait(1.0):
            raise InterruptedError("told to stop")

    def end(self) -> None:
        """Nothing to flush."""


def throughput(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    low, high = map(int, args.new_tokens.split(","))
    mix = Mix(model.config.vocab_size, new_tokens=(low, high))
    jobs = jobs_of(mix, args.threads * args.requests, args.seed)
    wanted = alone(model, jobs, args.states)
    rounds, wrong = [], 0
    for turn in range(args.repeats):
        seconds: dict[str, float] = {}
        for arm in ("one", "many") if turn % 2 == 0 else ("many", "one"):
            # Each arm starts with an engine of its own: no cached prefix, no memory.
            with restored_weights(model), hf_paged.enabled(model, fallback="error"):
                Job(mix, 0).submit(model).result()
                if arm == "one":
                    seconds[arm], results = one_after_another(model, jobs, args.states)
                else:
                    seconds[arm], results = at_once(model, jobs, args.threads, args.states)
            wrong += len(differing(jobs, results, wanted))
        rounds.append(seconds | {"ratio": seconds["one"] / seconds["many"]})
        print("  ".join(f"{name} {value:.2f}" for name, value in rounds[-1].items()), flush=True)
    return {
        "kinds": collections.Counter(job.kind for job in jobs),
        "rounds": rounds,
        "ratio": statistics.median(r["ratio"] for r in rounds),
        "different_results": wrong,
    }


def beside_a_sleeper(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Each request's seconds beside a sleeping streamer over its seconds without one, the median over the rounds."""
    mix = Mix(model.config.vocab_size)
    jobs = [job for job in jobs_of(mix, 400, args.seed + 1) if job.kind in ("greedy", "sampled", "streamed")][
        :48
    ]
    for job in jobs:
        job.options["max_new_tokens"] = 48
    taken: dict[str, list[list[float]]] = {"without": [], "beside": []}
    slept = 0
    with hf_paged.enabled(model, fallback="error", prefix_caching=False):
        timed(model, jobs)
        for turn in range(args.sleeper_repeats):
            for arm in ("without", "beside") if turn % 2 == 0 else ("beside", "without"):
                if arm == "without":
                    taken[arm].append(timed(model, jobs))
                    continue
                sleeper = Sleeper()
                caller = threading.Thread(target=sleep_in_generate, args=(model, sleeper))
                caller.start()
                while not sleeper.num_tokens:
                    time.sleep(0.01)
                taken[arm].append(timed(model, jobs))
                sleeper.stop.set()
                caller.join()
                slept += sleeper.num_tokens
    medians = {
        arm: [statistics.median(one) for one in zip(*runs, strict=True)] for arm, runs in taken.items()
    }
    ratios = [b / w for b, w in zip(medians["beside"], medians["without"], strict=True)]
    pairs = [sum(b) / sum(w) for b, w in zip(taken["beside"], taken["without"], strict=True)]
    return {
        "requests": len(jobs),
        "tokens_slept_on": slept,
        "ratio": statistics.median(pairs),
        "pairs": pairs,
        "median_request": statistics.median(ratios),
        "slowest_request": max(ratios),
    }


def timed(model: Any, jobs: list[Job], num_threads: int = 8) -> list[float]:
    """Seconds of each job, made by so many threads."""
    seconds = [0.0] * len(jobs)

    def work(thread: int) -> None:
        for i in range(thread, len(jobs), num_threads):
            start = time.perf_counter()
            jobs[i].run(model)
            seconds[i] = time.perf_counter() - start

    threads = [threading.Thread(target=work, args=(t,)) for t in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def sleep_in_generate(model: Any, sleeper: Sleeper) -> None:
    try:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=500, eos_token_id=None, streamer=sleeper)
    except InterruptedError:
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--requests", type=int, default=20, help="of each thread")
    parser.add_argument("--new-tokens", default="8,48", help="least and most of a request")
    parser.add_argument("--states", type=int, default=2, help="of the weights: training steps and one")
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sleeper-repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings(
        "ignore", module="transformers"
    )  # about the wrong and the short requests of the mix
    model = build_random(args.model, parse_dtype("float32"))
    result: dict[str, Any] = {
        "kind": "traffic",
        "options": {name: value for name, value in vars(args).items() if name != "json"},
        "environment": environment(),
        "throughput": throughput(model, args),
    }
    result["sleeper"] = beside_a_sleeper(model, args)
    many, slow = result["throughput"], result["sleeper"]
    print(
        f"{args.threads} threads of {args.requests} requests: {many['ratio']:.2f}× one after another (must be ≥ "
        f"{MUST_BE_FASTER:g}); {many['different_results']} results differ from the request alone\n"
        f"beside a streamer that sleeps: {slow['ratio']:.3f} times the time (must be ≤ {MOST_SLOWER:g}), median "
        f"request {slow['median_request']:.3f}, slowest {slow['slowest_request']:.3f}; "
        f"it slept on {slow['tokens_slept_on']} tokens"
    )
    if args.json:
        write_json(args.json, result)
    reached = many["ratio"] >= MUST_BE_FASTER and not many["different_results"]
    return 0 if reached and slow["ratio"] <= MOST_SLOWER else 1


if __name__ == "__main__":
    raise SystemExit(main())
