"""No case where enabling makes `generate` slower or larger: a grid of batches, prompts and lengths.

Models {demo LLaMA, 5 M, 124M} × batch {1, 4, 16, 32} × equal prompts {16, 256} × new tokens {1, 16, 128}.
Speed: a plain model and an enabled copy of it generate in turn, from other prompts each time, so that no prefix is
cached; both have run before (what a first call costs is in `import_time.py`). Memory: apart, since a full garbage
collection goes before each measurement; the model is enabled anew for each, and has made a call of one token.
Targets: every median ratio of speed ≥ 0.95 of plain, peak memory of the process ≤ 1.05 of plain.
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
from hf_paged.comparison.arms import ArmContext, position_limit
from hf_paged.comparison.measure import PeakMemory
from hf_paged.comparison.models import build_random, load_model, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import Request

DEMO_LLAMA = Path(__file__).resolve().parent.parent / "examples" / "models" / "llama"
BATCHES, PROMPTS, NEW_TOKENS = (1, 4, 16, 32), (16, 256), (1, 16, 128)
MIN_SPEED, MAX_MEMORY = 0.95, 1.05
#: A case is repeated for so long, but not more often: a median of milliseconds needs many.
SECONDS, MOST_ROUNDS = 6.0, 60
#: Of pairs that take longer there is one to warm up, and one measurement of memory.
LONG_SECONDS = 3.0


def run_case(model: Any, twin: Any, batch: int, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Paired runs of one case, plain on `model` and enabled on `twin`."""
    rng = random.Random(f"{batch}:{prompt}:{new_tokens}")

    def arm(model: Any, requests: list[Request], *, paged: bool) -> PaddedArm:
        made = PaddedArm(ArmContext(model, requests), batch_size=batch, paged=paged)
        made.clocked = False  # no streamer on either side
        return made

    def requests() -> list[Request]:
        vocab = range(model.config.vocab_size)
        return [Request(tuple(rng.choices(vocab, k=prompt)), new_tokens) for _ in range(batch)]

    seconds, equal = [], True
    with plain_defaults(model, (), 0), plain_defaults(twin, (), 0):
        with hf_paged.enabled(twin):
            rounds = repeats
            for turn in range(-2, MOST_ROUNDS):
                if turn >= rounds:
                    break
                pair = [arm(model, own := requests(), paged=False), arm(twin, own, paged=True)]
                runs = [one.run(lambda count: None) for one in (pair if turn % 2 else reversed(pair))]
                base, ours = runs if turn % 2 else reversed(runs)
                equal &= base.outputs == ours.outputs
                took = base.seconds + ours.seconds
                if turn < 0 and not (
                    turn == -1 and took > LONG_SECONDS
                ):  # to warm up, once where that is long
                    rounds = max(repeats, min(MOST_ROUNDS, int(SECONDS / took)))
                    continue
                seconds.append((base.seconds, ours.seconds))
        arms = arm(model, own := requests(), paged=False), arm(model, own, paged=True)
        peaks = [
            [peak_bytes(one, model) for one in arms] for _ in range(1 if took > LONG_SECONDS else repeats)
        ]
    speeds = [base / ours for base, ours in seconds]
    memory = [ours / base for base, ours in peaks if base and ours]
    row: dict[str, Any] = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens}
    row |= {"pairs": len(speeds), "tokens_equal": equal}
    row |= {"speed": statistics.median(speeds), "speed_min": min(speeds), "speed_max": max(speeds)}
    row |= {"memory": statistics.median(memory) if memory else None}
    row |= {"plain_seconds": statistics.median(base for base, _ in seconds)}
    row["ok"] = row["speed"] >= MIN_SPEED and (row["memory"] is None or row["memory"] <= MAX_MEMORY)
    return row


def peak_bytes(arm: PaddedArm, model: Any) -> int | None:
    """The process's peak memory in a run. An enabled model has made its pool by then, in a call of one token."""
    with hf_paged.enabled(model) if arm.paged else contextlib.nullcontext():
        model.generate(
            torch.tensor([[0]]), attention_mask=torch.tensor([[1]]), max_new_tokens=1, do_sample=False
        )
        with PeakMemory(model.device) as peak:
            arm.run(lambda count: None)
    return peak.total_bytes


def load(name: str) -> Any:
    """A model of the grid."""
    return (
        load_model(str(DEMO_LLAMA)).model
        if name == "llama-demo"
        else build_random(name, parse_dtype("float32"))
    )


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The cases for the page of results: a line for each model, batch and length of prompts."""
    lines: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["batch"], row["prompt"]), {})[row["new_tokens"]] = row
    cells = []
    for key, cases in lines.items():
        speeds = [f"{cases[n]['speed']:.2f} ×" if n in cases else "–" for n in NEW_TOKENS]
        memory = [case["memory"] for case in cases.values() if case["memory"]]
        cells.append([*key, *speeds, f"{max(memory):.3f} ×" if memory else "–"])
    missed = sum(not row["ok"] for row in rows)
    differing = sum(not row["tokens_equal"] for row in rows)
    return {
        "about": "Enabled against plain `generate` (`benchmarks/never_slower.py`): speed for 1, 16 and 128 new tokens, "
        "medians of pairs, and the highest of the peak memories of the process. "
        f"{len(rows)} cases, {missed} below {MIN_SPEED} of the speed or above {MAX_MEMORY} of the memory; in "
        f"{differing} some token differs.",
        "head": ["model", "batch", "prompt", *(f"{n} new" for n in NEW_TOKENS), "memory"],
        "rows": cells,
    }


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
        model, twin = load(name), load(name)
        limit = position_limit(model)
        for batch, prompt, new_tokens in itertools.product(BATCHES, PROMPTS, NEW_TOKENS):
            if (name, batch, prompt, new_tokens) in done:
                continue
            case = f"{name} batch {batch:2d} prompt {prompt:3d} new {new_tokens:3d}"
            if limit is not None and prompt + new_tokens > limit:
                print(f"{case}: not run, the model has {limit} positions", flush=True)
                continue
            row = {"model": name, **run_case(model, twin, batch, prompt, new_tokens, arguments.repeats)}
            rows.append(row)
            memory = "" if row["memory"] is None else f", memory {row['memory']:.3f} ×"
            print(
                f"{case}: {row['speed']:.2f} × ({row['speed_min']:.2f}–{row['speed_max']:.2f}){memory}"
                f"{'' if row['tokens_equal'] else ', TOKENS DIFFER'}{'' if row['ok'] else '  MISSED'}",
                flush=True,
            )
            if arguments.json:
                write_json(arguments.json, {"environment": environment(), "rows": rows, "table": table(rows)})
    missed = sum(not r["ok"] for r in rows)
    print(f"{len(rows)} cases, {missed} missed")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
