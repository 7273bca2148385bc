"""Requests over many LoRA adapters: one continuous batch against what PEFT offers, and against the base model alone.

64 ragged requests (lengths "design") over 16 adapters of rank 16 on every linear of the blocks, chosen by Zipf's
law, on GPT-2 124M with random weights in float32. Arms:
  groups   PEFT: set_adapter, then that adapter's requests in padded batches, adapter after adapter
  mixed    PEFT: padded batches of neighbours with adapter_names
  paged    hf_paged.generate_many(adapters=[...])
  base     hf_paged.generate_many of the same requests on a model without adapters
PEFT's arms are tried once with each of --sizes; then all four run in turn, --repeats times, PEFT's at their best
size, on whole batches spread over the work that cover about --subset requests. Tokens are compared between arms.
Results are written to --json as they come, and --resume goes on from there.

    python benchmarks/adapters.py [--model gpt2-124m] [--requests 64] [--adapters 16] [--rank 16]
        [--repeats 3] [--subset 24] [--json FILE] [--resume] [--minutes M]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from transformers import GenerationConfig

import hf_paged
from hf_paged._env import environment
from hf_paged.comparison.arms import position_limit
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import write_json
from hf_paged.comparison.sampling import Unit, rate_error, sample_units
from hf_paged.comparison.workloads import Request, workload_from_lengths
from hf_paged.kernels import cpu_runtime

#: Ratio of speeds -> what issue and docs ask for.
TARGETS = {"paged / groups": 6.0, "paged / mixed": 3.0, "paged / base": 0.75}
MAX_MEMORY = 1.05  # of an adapter's file
Outputs = list[list[int]]


def build(name: str, adapters: int, rank: int) -> tuple[Any, float]:
    """A PeftModel with `adapters` LoRA adapters, and the process's growth per adapter over the size of its file."""
    linears = ["c_attn", "c_proj", "c_fc"] if "gpt" in name else "all-linear"
    config = peft.LoraConfig(
        r=rank,
        target_modules=linears,
        fan_in_fan_out="gpt2" in name,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(build_random(name, parse_dtype("float32")), config, adapter_name="a0").eval()
    process, before = psutil.Process(), 0
    for i in range(1, adapters):
        if i == 2:  # the second one still pays for what the process does only once
            before = process.memory_info().rss
        model.add_adapter(f"a{i}", config)
    grown = (process.memory_info().rss - before) / max(adapters - 2, 1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["a0"])
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
    return model, grown / size if adapters > 2 else float("nan")


def choose(requests: int, adapters: int, seed: int) -> list[str]:
    """An adapter a request, the k-th most wanted with weight 1 / k."""
    weights = [1 / (k + 1) for k in range(adapters)]
    return [f"a{k}" for k in random.Random(f"zipf:{seed}").choices(range(adapters), weights, k=requests)]


def padded(model: Any, requests: list[Request], names: list[str] | None) -> Outputs:
    """One padded batch on PEFT's `generate`, run to the longest limit; each row cut at its own."""
    longest = max(len(r.prompt) for r in requests)
    ids = torch.tensor([[0] * (longest - len(r.prompt)) + list(r.prompt) for r in requests])
    mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
    limit = max(r.max_new_tokens for r in requests)
    extra = {} if names is None else {"adapter_names": names}
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=0, **extra
    )
    return [
        row[longest : longest + r.max_new_tokens].tolist() for row, r in zip(output, requests, strict=True)
    ]


def group_batches(names: list[str], size: int) -> list[Unit]:
    """Batches of one adapter each, adapter after adapter."""
    batches = []
    for name in dict.fromkeys(names):
        own = [i for i, n in enumerate(names) if n == name]
        batches += [Unit(tuple(own[start : start + size])) for start in range(0, len(own), size)]
    return batches


def mixed_batches(names: list[str], size: int) -> list[Unit]:
    """Batches of neighbours, whatever their adapters."""
    places = range(len(names))
    return [Unit(tuple(places[start : start + size])) for start in places[::size]]


def run_peft(
    arm: str, model: Any, requests: list[Request], names: list[str], size: int, subset: int | None, seed: int
) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """One arm of PEFT with one batch size, on a sample of its batches: what was measured, and the tokens by request."""
    units = (group_batches if arm == "groups" else mixed_batches)(names, size)
    sample = sample_units(units, requests, subset, seed)
    tokens, seconds, outputs = [], [], {}
    for unit in sample:
        own = [requests[i] for i in unit.indices]
        start = time.perf_counter()
        if arm == "groups":
            model.set_adapter(names[unit.indices[0]])
            rows = padded(model, own, None)
        else:
            rows = padded(model, own, [names[i] for i in unit.indices])
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(map(len, rows)))
        outputs |= dict(zip(unit.indices, rows, strict=True))
    measured = {
        "size": size,
        "requests_run": len(outputs),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "relative_error": rate_error(tokens, seconds, len(units)),
        "seconds": sum(seconds),
    }
    return measured, outputs


def run_paged(model: Any, requests: list[Request], names: list[str] | None) -> Outputs:
    with hf_paged.enabled(model, fallback="error"):
        results = hf_paged.generate_many(
            model,
            [list(r.prompt) for r in requests],
            generation_config=[
                GenerationConfig(
                    max_new_tokens=r.max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
                )
                for r in requests
            ],
            adapters=names,
        )
    return [r.token_ids for r in results]


def agreement(tokens: Outputs, others: dict[int, list[int]]) -> float:
    """Share of requests whose tokens are the same. Padding and ties move a few in float32."""
    return sum(tokens[i] == other for i, other in others.items()) / len(others)


class Benchmark:
    """The arms on one load, and the results so far. `keep` is called after each run, so that a run may be cut short."""

    def __init__(
        self, arguments: argparse.Namespace, result: dict[str, Any], keep: Callable[[], None]
    ) -> None:
        self.arguments, self.result, self.keep = arguments, result, keep
        self.model, memory = build(arguments.model, arguments.adapters, arguments.rank)
        self.base = build_random(arguments.model, parse_dtype("float32"))
        workload = workload_from_lengths(
            "design",
            arguments.requests,
            vocab_size=self.base.config.vocab_size,
            max_positions=position_limit(self.base),
            seed=arguments.seed,
        )
        self.requests = list(workload.requests)
        self.names = choose(len(self.requests), arguments.adapters, arguments.seed)
        self.outputs: dict[str, dict[int, list[int]]] = {}
        self.deadline = time.monotonic() + 60 * arguments.minutes
        about = {"adapters": arguments.adapters, "rank": arguments.rank, "used": len(set(self.names))}
        result["workload"] = workload.describe() | about
        result.setdefault("memory_per_adapter", memory)
        result.setdefault("trials", {"mixed": [], "groups": []})
        result.setdefault("rounds", [])
        result.setdefault("same_requests", {})

    def warm_up(self) -> None:
        """Loads what is loaded once a process."""
        run_paged(self.model, self.requests[:4], self.names[:4])
        run_paged(self.base, self.requests[:4], None)
        cpu_runtime.wait_for_loading()
        run_paged(self.model, self.requests[:4], self.names[:4])
        cpu_runtime.wait_for_loading()

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def peft_arm(self, arm: str, size: int, subset: int | None) -> dict[str, Any]:
        measured, outputs = run_peft(
            arm, self.model, self.requests, self.names, size, subset, self.arguments.seed
        )
        self.outputs.setdefault(arm, {}).update(outputs)
        return measured

    def paged_arm(self, arm: str) -> dict[str, Any]:
        model, names = (self.model, self.names) if arm == "paged" else (self.base, None)
        start = time.perf_counter()
        outputs = run_paged(model, self.requests, names)
        seconds = time.perf_counter() - start
        self.outputs[arm] = dict(enumerate(outputs))
        tokens = sum(r.max_new_tokens for r in self.requests)
        return {"seconds": seconds, "tokens_per_second": tokens / seconds}

    def try_sizes(self) -> bool:
        """Each of PEFT's arms once with each batch size. Returns whether all have been tried."""
        for arm, tried in self.result["trials"].items():
            for size in map(int, self.arguments.sizes.split(",")):
                if any(one["size"] == size for one in tried):
                    continue
                if self.out_of_time():
                    return False
                tried.append(self.peft_arm(arm, size, self.arguments.trial_subset))
                print(
                    f"{arm} in batches of {size}: {tried[-1]['tokens_per_second']:.1f} tokens/s", flush=True
                )
                self.keep()
        return True

    def run_rounds(self) -> bool:
        """All four arms in turn, each round beginning with another one; PEFT's at their best size."""
        best = {
            arm: max(tried, key=lambda one: one["tokens_per_second"])["size"]
            for arm, tried in self.result["trials"].items()
        }
        arms = ["paged", "base", *best]
        for turn in range(len(self.result["rounds"]), self.arguments.repeats):
            if self.out_of_time():
                return False
            runs = {}
            for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
                if arm in best:
                    runs[arm] = self.peft_arm(arm, best[arm], self.arguments.subset or None)
                else:
                    runs[arm] = self.paged_arm(arm)
            self.result["rounds"].append(runs)
            ours = self.outputs["paged"]
            for arm in best:
                self.result["same_requests"][arm] = agreement(ours, self.outputs[arm])
            shown = (f"{arm} {run['tokens_per_second']:.1f}" for arm, run in runs.items())
            print("tokens/s: " + "  ".join(shown), flush=True)
            self.keep()
        return True

    def sum_up(self) -> None:
        """Ratios of each round, and their medians."""
        rounds = self.result["rounds"]
        self.result["ratios"] = {}
        for label in TARGETS:
            one, other = label.split(" / ")
            each = [r[one]["tokens_per_second"] / r[other]["tokens_per_second"] for r in rounds]
            self.result["ratios"][label] = {"median": statistics.median(each), "all": each}
        self.keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sizes", default="8,16,32")
    parser.add_argument("--subset", type=int, default=24, help="requests of PEFT's arms; 0 for all")
    parser.add_argument("--trial-subset", type=int, default=8, help="the same, to find the best size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on where --json ended")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so long")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    result: dict[str, Any] = {"environment": environment()}
    if arguments.resume and arguments.json and arguments.json.is_file():
        result = json.loads(arguments.json.read_text())

    def keep() -> None:
        if arguments.json:
            write_json(arguments.json, result)

    started = time.monotonic()
    bench = Benchmark(arguments, result, keep)
    bench.warm_up()
    print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
    if not (bench.try_sizes() and bench.run_rounds()):
        print("not finished: run again with --resume")
        raise SystemExit(2)
    bench.sum_up()
    missed = 0
    for label, target in TARGETS.items():
        ratio = result["ratios"][label]["median"]
        missed += ratio < target
        print(f"{label}: {ratio:.2f} (must be ≥ {target:g}){'' if ratio >= target else '  MISSED'}")
    print(f"requests with the same tokens: {result['same_requests']}")
    print(f"memory per adapter: {result['memory_per_adapter']:.2f} of its file (must be ≤ {MAX_MEMORY})")
    raise SystemExit(1 if missed or result["memory_per_adapter"] > MAX_MEMORY else 0)


if __name__ == "__main__":
    main()
