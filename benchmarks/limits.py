"""How far hf_paged is from what the machine can do, on the very steps of one run.

Three numbers, each against the one before it:

    engine     the run: tokens/s with scheduler, sampler and all
    forward    the same packed steps, the model's forward alone, run again one after another
    products   the matrix products of those steps alone, by the model's own weights, plus the bytes of KV that
    the
               attention must read at the read bandwidth measured here

Targets on two CPU cores: engine ≥ 85 % of forward; on GPT-2 124M, forward within 15 % of products + KV.

    python benchmarks/limits.py [--shape gpt2-124m,gpt2-5m] [--requests 64] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from step_recorder import Recording, Step, recorded_steps
from transformers.pytorch_utils import Conv1D

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.arm_paged import PagedArm
from hf_paged.comparison.arms import ArmContext
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import workload_from_lengths
from hf_paged.engine import registry

_BANDWIDTH_BYTES = 512 << 20


def run_engine(model: Any, arm: PagedArm) -> tuple[float, int, Recording]:
    """Seconds, output tokens and steps of one run; the model stays enabled."""
    with recorded_steps() as recording:
        run = arm.run(lambda count: None)
    return run.seconds, run.num_tokens, recording


def replay(recording: Recording) -> float:
    """Seconds of the recorded forwards, run again. What a backend computed once a step is computed again."""
    total = 0.0
    for step in recording.steps:
        runner, model, inputs, ambient = step.arguments
        inputs.metadata.plan.clear()
        started = time.perf_counter()
        runner.forward(model, inputs, ambient)
        total += time.perf_counter() - started
    return total


def product_seconds(model: Any, steps: list[Step]) -> float:
    """Seconds of the linear layers alone, step by step, called as modules with inputs of the right shape."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    widths = [m.weight.shape[0] if isinstance(m, Conv1D) else m.weight.shape[1] for m in layers]
    most = max(s.num_tokens for s in steps)
    dtype = model.dtype
    inputs = {w: torch.randn(1, most, w).to(dtype) for w in {*widths, head.weight.shape[1]}}
    total = 0.0
    with torch.inference_mode():
        for step in steps:
            started = time.perf_counter()
            for layer, width in zip(layers, widths, strict=True):
                layer(inputs[width][:, : step.num_tokens])
            head(inputs[head.weight.shape[1]][:, : step.num_logits])
            total += time.perf_counter() - started
    return total


def kv_bytes(model: Any, steps: list[Step]) -> int:
    """Bytes of keys and values which the steps' attention reads: each sequence's, once a layer and step."""
    layers = registry.get(model).patch.layer_geometry()
    per_token = sum(2 * g.num_kv_heads * g.head_dim * g.dtype.itemsize for g in layers)
    return per_token * sum(sum(s.seq_lens) for s in steps)


def read_bandwidth() -> float:
    """Bytes a second of a sum over memory much larger than the caches; the best of several."""
    data = torch.ones(_BANDWIDTH_BYTES // 4)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return _BANDWIDTH_BYTES / best


def measure(shape: str, dtype: str, num_requests: int, repeats: int) -> dict[str, Any]:
    """The three numbers for one shape: medians of interleaved runs."""
    model = build_random(shape, parse_dtype(dtype))
    work = workload_from_lengths(
        "design",
        num_requests,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
    )
    arm = PagedArm(ArmContext(model, work.requests))
    model.generation_config.eos_token_id = None
    engine, forward, inline, products = [], [], [], []
    # Enabled out here, the arm leaves it enabled, and the pool is still there when the steps are run again.
    with hf_paged.enabled(model, arm.config):
        arm.warm_up()
        for _ in range(repeats):
            hf_paged.invalidate(model)  # no run may find the last one's prompts
            seconds, tokens, recording = run_engine(model, arm)
            engine.append(seconds)
            inline.append(recording.forward_seconds)
            forward.append(replay(recording))
            products.append(product_seconds(model, recording.steps))
        size = kv_bytes(model, recording.steps)
    bandwidth = read_bandwidth()
    floor = [p + size / bandwidth for p in products]
    return {
        "shape": shape,
        "dtype": dtype,
        "requests": num_requests,
        "output_tokens": tokens,
        "steps": len(recording.steps),
        "engine_tokens_per_second": tokens / statistics.median(engine),
        "forward_tokens_per_second": tokens / statistics.median(forward),
        "floor_tokens_per_second": tokens / statistics.median(floor),
        "engine_of_forward": statistics.median(f / e for f, e in zip(forward, engine, strict=True)),
        "forward_share_inside_engine": statistics.median(f / e for f, e in zip(inline, engine, strict=True)),
        "forward_over_floor": statistics.median(f / p for f, p in zip(forward, floor, strict=True)),
        "kv_bytes_read": size,
        "read_bandwidth_bytes_per_second": bandwidth,
        "seconds": {"engine": engine, "forward": forward, "forward_inline": inline, "products": products},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2-5m,gpt2-124m")
    parser.add_argument("--dtype", default="float32", help="with commas for several")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shape.split(","):
        for dtype in arguments.dtype.split(","):
            row = measure(shape, dtype, arguments.requests, arguments.repeats)
            rows.append(row)
            print(
                f"{shape} {dtype}: engine {row['engine_tokens_per_second']:.1f} tokens/s = "
                f"{row['engine_of_forward']:.1%} of the bare forward ({row['forward_tokens_per_second']:.1f}); "
                f"forward takes {row['forward_over_floor']:.2f} × products + KV bytes "
                f"({row['floor_tokens_per_second']:.1f} tokens/s)",
                flush=True,
            )
            if arguments.json:
                write_json(arguments.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
