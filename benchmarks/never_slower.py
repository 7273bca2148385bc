"""No case where enabling makes `generate` slower or larger: a grid of batches, prompts and lengths.

Models {demo LLaMA, 5 M, 124M} × batch {1, 4, 16, 32} × equal prompts {16, 256} × new tokens {1, 16, 128};
each case is plain and enabled `generate` in turn, the latter after a call of one token (what a first call costs is in
`import_time.py`). Targets: every median ratio of speed ≥ 0.95 of plain, peak memory of the process ≤ 1.05 of plain.
Rows are written as they come; --resume goes on where a run ended.

    python benchmarks/never_slower.py [--models llama-demo,gpt2-5m,gpt2-124m] [--repeats 3] [--json FILE]
    [--resume]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.api import plain_defaults
from hf_paged.comparison.arm_generate import PaddedArm
from hf_paged.comparison.arms import ArmContext, ArmRun, position_limit
from hf_paged.comparison.measure import PeakMemory
from hf_paged.comparison.models import build_random, load_model, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import Request

DEMO_LLAMA = Path(__file__).resolve().parent.parent / "examples" / "models" / "llama"
BATCHES, PROMPTS, NEW_TOKENS = (1, 4, 16, 32), (16, 256), (1, 16, 128)
MIN_SPEED, MAX_MEMORY = 0.95, 1.05
_SHORT_CASE_SECONDS = 0.5


def run_case(model: Any, batch: int, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Paired runs of one case. Short ones are repeated more: a median of milliseconds needs many."""
    rng = random.Random(f"{batch}:{prompt}:{new_tokens}")
    vocab = model.config.vocab_size
    requests = [Request(tuple(rng.choices(range(vocab), k=prompt)), new_tokens) for _ in range(batch)]
    context = ArmContext(model, requests)
    plain = PaddedArm(context, batch_size=batch)
    paged = PaddedArm(context, batch_size=batch, paged=True)
    plain.clocked = False  # no streamer on either side
    speeds, memory, seconds = [], [], []
    equal = True
    with plain_defaults(model, (), 0):
        plain.run(lambda count: None)
        first = paged.run(lambda count: None)
        rounds = repeats if first.seconds > _SHORT_CASE_SECONDS else 5 * repeats
        for turn in range(rounds):
            order = (plain, paged) if turn % 2 == 0 else (paged, plain)
            runs = {arm: measured(arm, model) for arm in order}
            (base, base_peak), (ours, our_peak) = runs[plain], runs[paged]
            speeds.append(base.seconds / ours.seconds)
            seconds.append((base.seconds, ours.seconds))
            if base_peak and our_peak:
                memory.append(our_peak / base_peak)
            equal &= base.outputs == ours.outputs
    row: dict[str, Any] = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens}
    row |= {"pairs": len(speeds), "tokens_equal": equal}
    row |= {"speed": statistics.median(speeds), "speed_min": min(speeds), "speed_max": max(speeds)}
    row |= {"memory": statistics.median(memory) if memory else None, "seconds": seconds}
    row["ok"] = row["speed"] >= MIN_SPEED and (row["memory"] is None or row["memory"] <= MAX_MEMORY)
    return row


def measured(arm: PaddedArm, model: Any) -> tuple[ArmRun, int | None]:
    """A run and the process's peak memory in it. An enabled model has made its pool by then, in a call of one token."""
    with hf_paged.enabled(model) if arm.paged else contextlib.nullcontext():
        model.generate(
            torch.tensor([[0]]), attention_mask=torch.tensor([[1]]), max_new_tokens=1, do_sample=False
        )
        with PeakMemory(model.device) as peak:
            run = arm.run(lambda count: None)
    return run, peak.total_bytes


def load(name: str) -> Any:
    """A model of the grid."""
    return (
        load_model(str(DEMO_LLAMA)).model
        if name == "llama-demo"
        else build_random(name, parse_dtype("float32"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-demo,gpt2-5m,gpt2-124m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.resume and arguments.json and arguments.json.is_file():
        rows = json.loads(arguments.json.read_text())["rows"]
    done = {(r["model"], r["batch"], r["prompt"], r["new_tokens"]) for r in rows}
    for name in arguments.models.split(","):
        model = load(name)
        limit = position_limit(model)
        for batch, prompt, new_tokens in itertools.product(BATCHES, PROMPTS, NEW_TOKENS):
            if (name, batch, prompt, new_tokens) in done:
                continue
            case = f"{name} batch {batch:2d} prompt {prompt:3d} new {new_tokens:3d}"
            if limit is not None and prompt + new_tokens > limit:
                print(f"{case}: not run, the model has {limit} positions", flush=True)
                continue
            row = {"model": name, **run_case(model, batch, prompt, new_tokens, arguments.repeats)}
            rows.append(row)
            memory = "" if row["memory"] is None else f", memory {row['memory']:.3f} ×"
            print(
                f"{case}: {row['speed']:.2f} × ({row['speed_min']:.2f}–{row['speed_max']:.2f}){memory}"
                f"{'' if row['tokens_equal'] else ', TOKENS DIFFER'}{'' if row['ok'] else '  MISSED'}",
                flush=True,
            )
            if arguments.json:
                write_json(arguments.json, {"environment": environment(), "rows": rows})
    missed = sum(not r["ok"] for r in rows)
    print(f"{len(rows)} cases, {missed} missed")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
