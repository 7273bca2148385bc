"""How many sequences run at once in a fixed KV memory: padded batches, generate_batch and hf_paged. Counts, no times.

The memory is given in bytes and the model by its shape; together they say how many tokens of KV there is room for.
All requests are there from the beginning, in one order for all arms. What counts is the mean number of sequences
that run in a step, by one rule for all:

    a sequence runs in a step in which it gets one of the tokens it was asked for
    steps count while requests wait, be it to begin or to go on: the draining of what is left counts for nobody

Arms:

    padded           batches filled in order; rows x (longest prompt + longest output of the batch) must fit, which a
                     padded cache reserves. A row runs until it has its tokens, and is held until the longest has: the
                     mean of rows held is given too
    padded, outputs unknown
                     as a user must who does not know them: every row may go on to the model's last position
    generate_batch   transformers' own scheduler, cache manager and loop, pages of 256 tokens (its default) and, with
                     --pages-of-16, of 16 tokens; only the model's forward is left out
    hf_paged         its scheduler and block manager, blocks of 16 tokens (the default), no model; a test compares that
                     with the engine as it runs

Which requests run together depends on their lengths and on the room alone, and every request runs to its length, so
that nothing is lost by not computing tokens.

    python benchmarks/running_batch.py [--memory 256MiB] [--lengths sharegpt] [--requests 512] [--seeds 0,1,2]
        [--pages-of-16] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.api import plain_defaults
from hf_paged.comparison.arm_continuous import ContinuousBatchingArm
from hf_paged.comparison.arms import ArmContext
from hf_paged.comparison.models import RANDOM_SHAPES
from hf_paged.comparison.report import write_json
from hf_paged.comparison.timeline import kv_bytes_per_token
from hf_paged.comparison.workloads import Request, workload_from_lengths
from hf_paged.config import PagedConfig
from hf_paged.engine.block_manager import BlockManager
from hf_paged.engine.request import Call, FinishReason
from hf_paged.engine.scheduler import Scheduler

_POSITIONS = 1024
_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
#: arm -> least that hf_paged must run, times what it runs
TARGETS = {"padded": 5.0, "generate_batch, pages of 256": 1.3}
#: Tokens a step may compute, of both engines: hf_paged's default on a CPU.
_BATCH_TOKENS = 1024


def shape_bytes_per_token(shape: str) -> int:
    """Bytes of keys and values of one token of a named shape in float32; no weights are made."""
    import transformers

    model_class, config_class, arguments = RANDOM_SHAPES[shape]
    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
    return kv_bytes_per_token(model)


def padded(requests: Sequence[Request], slots: int, positions: int, *, known: bool) -> dict[str, float]:
    """Rows that run and rows that are held, means over the steps of all batches but the last.

    Args:
        requests: in the order in which batches are filled.
        slots: tokens of room.
        positions: most tokens of a row: all rows go on until the longest output is done.
        known: whether a batch keeps room for its longest output, or for `positions`.
    """

    def fits(batch: Sequence[Request]) -> bool:
        width = max(len(r.prompt) for r in batch) + max(r.max_new_tokens for r in batch)
        return width <= positions and len(batch) * (width if known else positions) <= slots

    batches: list[list[Request]] = []
    for request in requests:
        if batches and fits([*batches[-1], request]):
            batches[-1].append(request)
        else:
            batches.append([request])
    counted = batches[:-1]
    lengths = [max(r.max_new_tokens for r in batch) for batch in counted]
    steps = sum(lengths)
    return {
        "mean_running": sum(r.max_new_tokens for batch in counted for r in batch) / steps,
        "mean_held": sum(n * len(batch) for n, batch in zip(lengths, counted, strict=True)) / steps,
        "steps": steps,
    }


class Tally:
    """The tokens of each step in which requests wait, those that were stopped for want of room among them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.num_tokens = self.num_steps = 0  # of all steps

    def step(self, num_tokens: int, num_waiting: int) -> None:
        self.num_tokens += num_tokens
        self.num_steps += 1
        if num_waiting:
            self.sizes.append(num_tokens)

    def result(self) -> dict[str, float]:
        return {
            "mean_running": statistics.mean(self.sizes),
            "peak_running": max(self.sizes),
            "steps": len(self.sizes),
            "all_steps": self.num_steps,
        }


def continuous(requests: Sequence[Request], slots: int, page_size: int) -> dict[str, float]:
    """transformers' continuous batching over a model that computes nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=2, n_head=1, vocab_size=512, n_positions=_POSITIONS)
    model: Any = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None

    def forward(input_ids: torch.Tensor, **batch: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 1))

    model.forward = forward
    with plain_defaults(model, (), 0):
        arm = ContinuousBatchingArm(ArmContext(model, requests), pool_rows=len(requests))
        arm.pool = {
            "page_size": page_size,
            "num_blocks": slots // page_size,
            "max_batch_tokens": _BATCH_TOKENS,
            "max_requests_per_batch": len(requests),
        }
        tally = Tally()
        with counted_steps(tally):
            run = arm.run(lambda count: None)
    assert run.num_tokens == tally.num_tokens == sum(r.max_new_tokens for r in requests)
    return tally.result()


@contextlib.contextmanager
def counted_steps(tally: Tally) -> Iterator[None]:
    """Counts the steps that transformers' schedulers plan while this is open."""
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler

    original = FIFOScheduler.schedule_batch

    def schedule_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        planned = original(self, *args, **kwargs)
        if planned[0]:
            tally.step(sum(f.has_new_token for f in planned[0]), len(self.waiting_requests))
        return planned

    FIFOScheduler.schedule_batch = schedule_batch
    try:
        yield
    finally:
        FIFOScheduler.schedule_batch = original


def paged(requests: Sequence[Request], slots: int) -> dict[str, float]:
    """hf_paged's scheduler and block manager, with the engine's defaults, step by step as its loop asks them."""
    config = PagedConfig()
    manager = BlockManager(config.block_size, slots // config.block_size, lambda wanted: wanted)
    scheduler = Scheduler(manager, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=_BATCH_TOKENS)
    for request in requests:
        call = Call(sampling=None)
        call.add_row(list(request.prompt), request.max_new_tokens)
        scheduler.add(call)
    tally = Tally()
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None, "nothing can go on"
        scheduler.advance(plan)
        sampled = [plan.sequences[i] for i in plan.sample_indices]
        tally.step(len(sampled), len(scheduler.waiting))
        for seq in sampled:
            seq.token_ids.append(0)
            if seq.num_generated == seq.max_new_tokens:
                seq.finish_reason = FinishReason.LENGTH
        scheduler.remove(s for s in sampled if s.finish_reason is not None)
    assert tally.num_tokens == sum(r.max_new_tokens for r in requests)
    manager.check_integrity([])
    return tally.result() | {"preemptions": scheduler.num_preemptions}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All arms on the same requests in the same room, for each seed."""
    per_token = shape_bytes_per_token(arguments.shape)
    slots = arguments.memory // per_token
    rounds = []
    for seed in arguments.seeds:
        work = workload_from_lengths(
            arguments.lengths, arguments.requests, vocab_size=512, max_positions=_POSITIONS, seed=seed
        )
        arms = {
            "padded": padded(work.requests, slots, _POSITIONS, known=True),
            "padded, outputs unknown": padded(work.requests, slots, _POSITIONS, known=False),
            "generate_batch, pages of 256": continuous(work.requests, slots, 256),
            "hf_paged": paged(work.requests, slots),
        }
        if arguments.pages_of_16:
            arms["generate_batch, pages of 16"] = continuous(work.requests, slots, 16)
        ours = arms["hf_paged"]["mean_running"]
        for name, arm in arms.items():
            if name != "hf_paged":
                arm["hf_paged_over"] = ours / arm["mean_running"]
        rounds.append({"workload": work.describe(), "arms": arms})
        means = [f"{name} {arm['mean_running']:.2f}" for name, arm in arms.items()]
        print(f"seed {seed}: {', '.join(means)}", flush=True)
    names = [*rounds[0]["arms"]]
    data = {
        "kind": "running_batch",
        "shape": arguments.shape,
        "dtype": "float32",
        "kv_memory_bytes": arguments.memory,
        "kv_bytes_per_token": per_token,
        "kv_tokens": slots,
        "targets": TARGETS,
        "rounds": rounds,
        "arms": {name: _over_seeds([r["arms"][name] for r in rounds]) for name in names},
        "hf_paged": hf_paged.__version__,
        "environment": environment(),
    }
    return data | {"table": table(data)}


def _over_seeds(arms: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the seeds, and the least of the ratios."""
    result = {name: statistics.mean(arm[name] for arm in arms) for name in arms[0]}
    if "hf_paged_over" in result:
        result["least_hf_paged_over"] = min(arm["hf_paged_over"] for arm in arms)
    return result


def table(data: dict[str, Any]) -> dict[str, Any]:
    """What docs/benchmarks.md shows of it."""
    work = data["rounds"][0]["workload"]
    about = (
        f"Sequences running at once in {data['kv_memory_bytes'] >> 20} MiB of KV of {data['shape']} "
        f"({data['kv_tokens']} tokens), {work['num_requests']} requests of {work['name']} lengths, "
        f"{len(data['rounds'])} seeds. Counts of the schedulers, no model was run. A sequence runs in a step in which "
        "it gets a token it was asked for; steps count while requests wait."
    )
    rows = []
    for name, arm in data["arms"].items():
        held = f"{arm['mean_held']:.2f}" if "mean_held" in arm else ""
        over = least = ""
        if "hf_paged_over" in arm:
            over, least = f"{arm['hf_paged_over']:.2f}×", f"{arm['least_hf_paged_over']:.2f}×"
        rows.append([name, f"{arm['mean_running']:.2f}", held, over, least])
    head = ["", "running at once", "rows held", "hf_paged runs", "least of a seed"]
    return {"about": about, "head": head, "rows": rows}


def parse_memory(value: str) -> int:
    """ "256MiB" in bytes."""
    for unit, size in _UNITS.items():
        if value.endswith(unit) and value.removesuffix(unit).isdecimal():
            return int(value.removesuffix(unit)) * size
    raise argparse.ArgumentTypeError(f"{value!r}: must be like 256MiB or 2GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2-124m", choices=RANDOM_SHAPES)
    parser.add_argument("--memory", type=parse_memory, default=256 << 20)
    parser.add_argument("--lengths", default="sharegpt")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--pages-of-16", action="store_true", help="generate_batch with these pages too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = measure(arguments)
    print(f"{data['table']['about']}\n")
    missed = 0
    for name, arm in data["arms"].items():
        held = f" of {arm['mean_held']:.2f} rows held" if "mean_held" in arm else ""
        print(f"{name}: {arm['mean_running']:.2f} running at once{held}", end="")
        if "hf_paged_over" in arm:
            must, least = TARGETS.get(name), arm["least_hf_paged_over"]
            wanted = "" if must is None else f" (must be ≥ {must:g}){'' if least >= must else '  MISSED'}"
            missed += must is not None and least < must
            print(f", hf_paged {arm['hf_paged_over']:.2f} times that, at least {least:.2f}{wanted}", end="")
        print()
    if arguments.json:
        write_json(arguments.json, data)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
