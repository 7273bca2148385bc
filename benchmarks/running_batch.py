"""How many sequences run at once in a fixed KV memory: padded batches, generate_batch and hf_paged. Counts, no times.

The memory is given in bytes and the model by its shape; together they say how many tokens of KV there is room for. The
engines then run for real, with room for that many tokens, on a small model: which requests run together depends on
their lengths and on the room, not on how wide a layer is. Random weights without EOS run each request to its length.

    padded           rows x (longest prompt + longest output of the batch) must fit, in the order of the requests, as if
                     outputs were known before they are there
    padded, outputs unknown
                     as a user must who does not know them: every row may go on to the model's last position
    generate_batch   transformers' own, pages of 256 tokens (its default); of 16 for comparison
    hf_paged         blocks of 16 tokens (the default)

Of a padded batch all rows are counted for as long as it runs; `wanted` counts only those that are not finished yet.

    python benchmarks/running_batch.py [--memory 256MiB] [--lengths sharegpt] [--requests 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.api import plain_defaults
from hf_paged.comparison.arm_continuous import ContinuousBatchingArm
from hf_paged.comparison.arm_paged import PagedArm
from hf_paged.comparison.arms import ArmContext
from hf_paged.comparison.models import RANDOM_SHAPES
from hf_paged.comparison.report import write_json
from hf_paged.comparison.timeline import kv_bytes_per_token
from hf_paged.comparison.workloads import Request, workload_from_lengths
from hf_paged.config import PagedConfig

_CARRIER = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 1024}
_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def shape_bytes_per_token(shape: str) -> int:
    """Bytes of keys and values of one token of a named shape in float32; no weights are made."""
    import transformers

    model_class, config_class, arguments = RANDOM_SHAPES[shape]
    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
    return kv_bytes_per_token(model)


def carrier() -> Any:
    """The small model on which requests are run."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**_CARRIER, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def padded(requests: Sequence[Request], slots: int, positions: int, *, known: bool) -> dict[str, float]:
    """Rows held and rows still wanted, means over the steps of all batches.

    Args:
        requests: in the order in which batches are filled.
        slots: tokens of room.
        positions: most tokens of a row: all rows go on until the longest output is done.
        known: whether a batch keeps room for its longest output, or for `positions`.
    """

    def fits(batch: Sequence[Request]) -> bool:
        width = max(len(r.prompt) for r in batch) + max(r.max_new_tokens for r in batch)
        return width <= positions and len(batch) * (width if known else positions) <= slots

    steps = held = wanted = 0
    batch: list[Request] = []
    for request in [*requests, None]:
        if request is not None and (not batch or fits([*batch, request])):
            batch.append(request)
            continue
        length = max(r.max_new_tokens for r in batch)
        steps += length
        held += length * len(batch)
        wanted += sum(r.max_new_tokens for r in batch)
        batch = [] if request is None else [request]
    return {"mean_running": held / steps, "mean_wanted": wanted / steps, "steps": steps}


def continuous(model: Any, requests: Sequence[Request], slots: int, page_size: int) -> dict[str, float]:
    """Requests in a step of transformers' continuous batching, mean over its steps."""
    arm = ContinuousBatchingArm(ArmContext(model, requests), pool_rows=len(requests))
    arm.pool = {
        "page_size": page_size,
        "num_blocks": slots // page_size,
        "max_batch_tokens": 2048,
        "max_requests_per_batch": len(requests),
    }
    with counted_steps() as sizes:
        run = arm.run(lambda count: None)
    assert run.num_tokens == sum(r.max_new_tokens for r in requests)
    return {"mean_running": sum(sizes) / len(sizes), "peak_running": max(sizes), "steps": len(sizes)}


@contextlib.contextmanager
def counted_steps() -> Iterator[list[int]]:
    """The number of requests of every step that transformers' schedulers plan while this is open."""
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler

    sizes: list[int] = []
    original = FIFOScheduler.schedule_batch

    def schedule_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        planned = original(self, *args, **kwargs)
        if planned[0]:
            sizes.append(len(planned[0]))
        return planned

    FIFOScheduler.schedule_batch = schedule_batch
    try:
        yield sizes
    finally:
        FIFOScheduler.schedule_batch = original


def paged(model: Any, requests: Sequence[Request], slots: int) -> dict[str, float]:
    """Sequences in a step of hf_paged, mean over its steps."""
    config = PagedConfig(kv_cache_memory=slots * kv_bytes_per_token(model))
    run = PagedArm(ArmContext(model, requests), config=config).run(lambda count: None)
    stats = run.extra["stats"]
    assert run.num_tokens == sum(r.max_new_tokens for r in requests)
    assert stats["native_calls"] == len(requests), stats
    assert stats["kv_blocks_total"] * config.block_size <= slots
    wanted = ("mean_running", "peak_running", "steps", "preemptions", "kv_waste", "kv_blocks_total")
    return {name: stats[name] for name in wanted}


def measure(shape: str, memory: int, lengths: str, num_requests: int, seed: int) -> dict[str, Any]:
    """All arms on the same requests in the same room."""
    per_token = shape_bytes_per_token(shape)
    slots = memory // per_token
    model = carrier()
    positions = _CARRIER["n_positions"]
    work = workload_from_lengths(
        lengths,
        num_requests,
        vocab_size=_CARRIER["vocab_size"],
        max_positions=positions,
        seed=seed,
    )
    requests = work.requests
    with plain_defaults(model, (), 0):
        arms = {
            "padded": padded(requests, slots, positions, known=True),
            "padded, outputs unknown": padded(requests, slots, positions, known=False),
            "generate_batch, pages of 256": continuous(model, requests, slots, 256),
            "generate_batch, pages of 16": continuous(model, requests, slots, 16),
            "hf_paged": paged(model, requests, slots),
        }
    ours = arms["hf_paged"]["mean_running"]
    for name, arm in arms.items():
        if name != "hf_paged":
            arm["hf_paged_over"] = ours / arm["mean_running"]
            if "mean_wanted" in arm:
                arm["hf_paged_over_wanted"] = ours / arm["mean_wanted"]
    return {
        "kind": "running_batch",
        "shape": shape,
        "dtype": "float32",
        "kv_memory_bytes": memory,
        "kv_bytes_per_token": per_token,
        "kv_tokens": slots,
        "workload": work.describe(),
        "arms": arms,
        "hf_paged": hf_paged.__version__,
        "environment": environment(),
    }


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
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = measure(arguments.shape, arguments.memory, arguments.lengths, arguments.requests, arguments.seed)
    print(f"room for {data['kv_tokens']} tokens of {arguments.shape} in {arguments.memory >> 20} MiB")
    for name, arm in data["arms"].items():
        ratio = f", hf_paged {arm['hf_paged_over']:.2f} times that" if "hf_paged_over" in arm else ""
        wanted = f" (still wanted: {arm['mean_wanted']:.2f})" if "mean_wanted" in arm else ""
        print(f"{name}: {arm['mean_running']:.2f} running at once{wanted}{ratio}")
    if arguments.json:
        write_json(arguments.json, data)


if __name__ == "__main__":
    main()
