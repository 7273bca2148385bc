"""Requests over many LoRA adapters: one continuous batch against what PEFT offers, and against the base model alone.

64 ragged requests (lengths "design") over 16 adapters of rank 16 on every linear of the blocks, chosen by Zipf's
law, on GPT-2 124M with random weights in float32. Arms:
  groups   PEFT: set_adapter, then that adapter's requests in padded batches, adapter after adapter
  mixed    PEFT: padded batches of neighbours with adapter_names
  paged    hf_paged.generate_many(adapters=[...])
  base     hf_paged.generate_many of the same requests on a model without adapters
PEFT's arms are tried once with each of --sizes; then all four run in turn, --repeats times, PEFT's at their best
size, on whole batches spread over the work that cover about --subset requests, other ones each time. Enabling is not
timed. Tokens are compared between arms.

    python benchmarks/adapters.py [--model gpt2-124m] [--requests 64] [--adapters 16] [--rank 16] [--sizes 8,16]
        [--repeats 3] [--subset 24] [--json FILE [--resume]] [--minutes M]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from rows import Rows, add_arguments
from transformers import GenerationConfig

import hf_paged
from hf_paged.comparison.arms import position_limit
from hf_paged.comparison.models import build_random, parse_dtype
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
) -> dict[str, Any]:
    """One arm of PEFT with one batch size, on a sample of its batches."""
    units = (group_batches if arm == "groups" else mixed_batches)(names, size)
    tokens, seconds, outputs = [], [], {}
    for unit in sample_units(units, requests, subset, seed):
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
    error = rate_error(tokens, seconds, len(units))
    return measured(sum(seconds), outputs) | {"relative_error": error}


def run_paged(model: Any, requests: list[Request], names: list[str] | None) -> dict[str, Any]:
    """One arm of ours, on all requests."""
    prompts = [list(r.prompt) for r in requests]
    limits = [
        GenerationConfig(max_new_tokens=r.max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        for r in requests
    ]
    with hf_paged.enabled(model, fallback="error"):
        start = time.perf_counter()
        results = hf_paged.generate_many(model, prompts, generation_config=limits, adapters=names)
        seconds = time.perf_counter() - start
    return measured(seconds, {i: result.token_ids for i, result in enumerate(results)})


def measured(seconds: float, outputs: dict[int, list[int]]) -> dict[str, Any]:
    """What is kept of a run: of the tokens, by request, a hash."""
    tokens = sum(map(len, outputs.values()))
    hashes = {str(i): hashlib.sha256(str(ids).encode()).hexdigest()[:12] for i, ids in outputs.items()}
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "outputs": hashes}


class Benchmark:
    """The arms on one load, and the rows that are there so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.sizes = [int(size) for size in arguments.sizes.split(",")]
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
        used = {"adapters": arguments.adapters, "rank": arguments.rank, "used": len(set(self.names))}
        about = {"kind": "adapters", "model": arguments.model, "workload": workload.describe() | used}
        self.rows = Rows(arguments, about | {"targets": TARGETS})
        self.rows.data.setdefault("memory_per_adapter", memory)

    def warm_up(self) -> None:
        """Loads what is loaded once a process."""
        for _ in range(2):
            run_paged(self.model, self.requests[:4], self.names[:4])
            run_paged(self.base, self.requests[:4], None)
            cpu_runtime.wait_for_loading()

    def run(self, arm: str, size: int, subset: int | None, seed: int) -> dict[str, Any]:
        if arm == "paged":
            return run_paged(self.model, self.requests, self.names)
        if arm == "base":
            return run_paged(self.base, self.requests, None)
        return run_peft(arm, self.model, self.requests, self.names, size, subset, seed)

    def best_size(self, arm: str) -> int:
        """The batch size with which an arm of PEFT was fastest on a few requests."""
        rates = {}
        for size in self.sizes:
            key = {"arm": arm, "size": size, "round": "trial"}
            run = partial(self.run, arm, size, self.arguments.trial_subset, self.arguments.seed)
            rates[size] = self.rows.get(key, run)["tokens_per_second"]
        return max(rates, key=lambda size: rates[size])

    def run_rounds(self) -> list[dict[str, dict[str, Any]]]:
        """All four arms in turn, each round beginning with another one; PEFT's at their best size."""
        sizes = {"paged": 0, "base": 0} | {arm: self.best_size(arm) for arm in ("groups", "mixed")}
        rounds = []
        for turn in range(self.arguments.repeats):
            order = [*sizes][turn % len(sizes) :] + [*sizes][: turn % len(sizes)]
            rounds.append({})
            for arm in order:
                subset, seed = self.arguments.subset or None, self.arguments.seed + turn
                run = partial(self.run, arm, sizes[arm], subset, seed)
                rounds[-1][arm] = self.rows.get({"arm": arm, "size": sizes[arm], "round": turn}, run)
        return rounds

    def sum_up(self, rounds: list[dict[str, dict[str, Any]]]) -> None:
        """Ratios of each round and their medians, and how many requests had the same tokens as ours."""
        data = self.rows.data
        data["ratios"] = {}
        for label in TARGETS:
            one, other = label.split(" / ")
            pairs = [r[one]["tokens_per_second"] / r[other]["tokens_per_second"] for r in rounds]
            data["ratios"][label] = {"median": statistics.median(pairs), "pairs": pairs}
        ours = rounds[0]["paged"]["outputs"]
        data["same_requests"] = {
            arm: same([r[arm]["outputs"] for r in rounds], ours) for arm in ("paged", "groups", "mixed")
        }
        data["table"] = table(data, rounds)
        self.rows.keep()


def same(runs: list[dict[str, str]], ours: dict[str, str]) -> dict[str, int]:
    """Of the requests of `runs`, those whose tokens are ours."""
    pairs = [(output, ours[i]) for run in runs for i, output in run.items()]
    return {"same": sum(a == b for a, b in pairs), "of": len(pairs)}


def table(data: dict[str, Any], rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What docs/benchmarks.md shows of it."""
    names = {
        "groups": "PEFT, `set_adapter`, one group after another",
        "mixed": "PEFT, mixed batch by `adapter_names`",
        "base": "hf_paged, base model alone",
        "paged": "hf_paged, all adapters in one batch",
    }
    lines = []
    for arm, name in names.items():
        runs = [r[arm] for r in rounds]
        rate = statistics.median(run["tokens_per_second"] for run in runs)
        ratio, least, verdict = data["ratios"].get(f"paged / {arm}"), "", ""
        if ratio:
            least = f"≥ {TARGETS[f'paged / {arm}']:g}"
            pairs = ratio["pairs"]
            verdict = f"{ratio['median']:.2f}× ({min(pairs):.2f}–{max(pairs):.2f})"
        covered = f"{min(len(run['outputs']) for run in runs)} of {data['workload']['num_requests']}"
        equal = data["same_requests"].get(arm)
        told = f"{equal['same']} of {equal['of']}" if equal and arm != "paged" else ""
        lines.append([name, runs[0]["size"] or "", f"{rate:.1f}", verdict, least, covered, told])
    work = data["workload"]
    about = (
        f"{work['num_requests']} requests ({work['name']}) over {work['adapters']} LoRA adapters of rank "
        f"{work['rank']} on every linear of the blocks, by Zipf's law, on {data['model']} in float32. An adapter takes "
        f"{data['memory_per_adapter']:.3f} times its file in memory. "
        + ("One round." if len(rounds) == 1 else f"Medians of {len(rounds)} rounds.")
    )
    head = ["arm", "batch", "tokens/s", "hf_paged over that", "must be", "requests run", "tokens as ours"]
    return {"about": about, "head": head, "rows": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sizes", default="8,16")
    parser.add_argument("--subset", type=int, default=24, help="requests of PEFT's arms; 0 for all")
    parser.add_argument("--trial-subset", type=int, default=8, help="the same, to find the best size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    bench = Benchmark(arguments)
    bench.warm_up()
    bench.sum_up(bench.run_rounds())
    data, missed = bench.rows.data, 0
    for label, target in TARGETS.items():
        ratio = data["ratios"][label]["median"]
        missed += ratio < target
        print(f"{label}: {ratio:.2f} (must be ≥ {target:g}){'' if ratio >= target else '  MISSED'}")
    print(f"requests with the same tokens: {data['same_requests']}")
    print(f"memory per adapter: {data['memory_per_adapter']:.3f} of its file (must be ≤ {MAX_MEMORY})")
    raise SystemExit(1 if missed or data["memory_per_adapter"] > MAX_MEMORY else 0)


if __name__ == "__main__":
    main()
