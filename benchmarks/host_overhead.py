"""Host time of a decode step: from the end of one forward to the start of the next.

That is the greedy sampling, the bookkeeping, the plan and the packed inputs of the next step, of a real run
of GPT-2 124M (vocabulary 50,257; random weights). Targets on two CPU cores: 0.5 ms a step at 1 sequence, 2 ms
at 64, 6 ms at 256.

    python benchmarks/host_overhead.py [--shape gpt2-124m] [--sequences 1,64,256] [--tokens 24] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from step_recorder import recorded_steps

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import Workload, workload_from_lengths
from hf_paged.kernels.cpu_runtime import wait_for_loading

TARGETS_MS = {1: 0.5, 64: 2.0, 256: 6.0}


def measure(model: Any, num_sequences: int, num_tokens: int) -> dict[str, Any]:
    """Host milliseconds a step with `num_sequences` running, in a run of `num_tokens` new tokens each."""
    work: Workload = workload_from_lengths(
        "alpaca",
        num_sequences,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
    )
    inputs = [list(r.prompt) for r in work.requests]
    with hf_paged.enabled(model, max_num_seqs=max(num_sequences, 1)):
        hf_paged.generate_many(model, inputs[:1], max_new_tokens=3, do_sample=False)
        wait_for_loading()  # kernels load beside the first steps of a process, which import_time.py measures
        with recorded_steps() as recording:
            hf_paged.generate_many(model, inputs, max_new_tokens=num_tokens, do_sample=False)
    gaps = [1e3 * g for g in recording.host_seconds(num_sequences)]
    if not gaps:
        raise SystemExit(f"no two steps in a row had {num_sequences} decodes: give more --tokens")
    target = TARGETS_MS.get(num_sequences)
    median = statistics.median(gaps)
    return {
        "sequences": num_sequences,
        "steps": len(gaps),
        "median_ms": median,
        "minimum_ms": min(gaps),
        "p90_ms": sorted(gaps)[int(0.9 * (len(gaps) - 1))],
        "target_ms": target,
        "ok": target is None or median <= target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2-124m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sequences", default="1,64,256")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each sequence")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = build_random(arguments.shape, parse_dtype(arguments.dtype))
    rows = []
    for count in map(int, arguments.sequences.split(",")):
        row = measure(model, count, arguments.tokens)
        rows.append(row)
        verdict = "ok" if row["ok"] else "ABOVE"
        wanted = "" if row["target_ms"] is None else f", target {row['target_ms']}: {verdict}"
        print(
            f"{count:4d} sequences: {row['median_ms']:.2f} ms a step (min {row['minimum_ms']:.2f}, "
            f"p90 {row['p90_ms']:.2f}, {row['steps']} steps){wanted}",
            flush=True,
        )
        if arguments.json:
            facts = {"shape": arguments.shape, "dtype": arguments.dtype, "environment": environment()}
            write_json(arguments.json, facts | {"rows": rows})


if __name__ == "__main__":
    main()
