"""A text-generation pipeline over 64 ragged prompts, untouched, in padded batches, and enabled: whole calls, in turn.

GPT-2 with random weights and a tokenizer of one word a token, so that equal texts are equal tokens. Every arm is the
same call, `pipe(texts, max_new_tokens=96, eos_token_id=[...])`, and obeys the same stop rule: a prompt ends at the
first of some dozens of token ids. They are chosen beforehand from the model's own greedy texts, so that outputs have 24
to 96 tokens, evenly spread. "uniform" has prompts of 80 tokens and outputs of 60, which padding likes best.

    untouched      pipe(texts): transformers runs one prompt after another (batch_size=1 is the same)
    batch_size N   pipe(texts, batch_size=N): padded batches, each to its longest row
    hf_paged       pipe(texts) after hf_paged.enable(pipe); enabling is not timed

Each batch size runs once; then untouched, the best of them and hf_paged run in turn, each turn beginning with another.
Every run is a row of --json, written at once.

    python benchmarks/pipelines.py [--shape gpt2-124m] [--prompts 64] [--repeats 2] [--json FILE [--resume]]
        [--minutes M]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import time
from functools import partial
from typing import Any

from rows import Rows, add_arguments

import hf_paged
from hf_paged.comparison.lengths import Lengths
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.kernels import cpu_runtime

SHORTEST, LONGEST = 24, 96
SIZES = (4, 8, 16, 32)
#: Ratio -> least wanted, of the ragged workload.
TARGETS = {"untouched": 6.0, "best batch_size": 3.0}
PAD = 0


def word_tokenizer(vocab_size: int) -> Any:
    """Token i is the word "wi": any ids can be told from their text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token=f"w{PAD}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{PAD}", padding_side="left")


def make_prompts(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    source = random.Random(f"pipelines:{seed}")
    return [[source.randrange(1, vocab_size) for _ in range(length)] for length in lengths]


def stop_ids(model: Any, prompts: list[list[int]], seed: int) -> list[int]:
    """Token ids at which greedy texts of `prompts` first end, after 24 to 96 tokens, spread evenly where they can."""
    with hf_paged.enabled(model):
        results = hf_paged.generate_many(model, prompts, max_new_tokens=LONGEST, do_sample=False)
    texts = [list(result.token_ids) for result in results]
    wanted = [SHORTEST + round((LONGEST - SHORTEST) * (i + 0.5) / len(texts)) for i in range(len(texts))]
    random.Random(seed).shuffle(wanted)
    chosen: set[int] = set()
    taken = {
        token for text in texts for token in text[: SHORTEST - 1]
    }  # to end at these would cut a text short
    for text, length in zip(texts, wanted, strict=True):
        if chosen & set(text):
            continue
        for place in sorted(range(SHORTEST - 1, LONGEST), key=lambda place: abs(place - length + 1)):
            if text[place] not in taken and text[place] not in text[:place]:
                chosen.add(text[place])
                break
        taken |= set(text[: place + 1])
    return sorted(chosen)


class Bench:
    """A pipeline, the workloads and the rows that are there so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import pipeline

        self.model = build_random(arguments.shape, parse_dtype("float32"))
        vocab_size = self.model.config.vocab_size
        self.pipe = pipeline("text-generation", model=self.model, tokenizer=word_tokenizer(vocab_size))
        count, seed = arguments.prompts, arguments.seed
        lengths = Lengths(80, 0.8, 240).draw(count, random.Random(f"pipelines:{seed}"))
        ragged = make_prompts(lengths, vocab_size, seed)
        about = {"kind": "pipelines", "shape": arguments.shape, "dtype": "float32", "prompts": count}
        self.rows = Rows(arguments, about | {"seed": seed, "targets": TARGETS})
        ends = self.rows.data.setdefault("stop_ids", None) or stop_ids(self.model, ragged, seed)
        self.rows.data["stop_ids"] = ends
        self.workloads: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
            "ragged": (ragged, {"max_new_tokens": LONGEST, "eos_token_id": ends}),
            "uniform": (make_prompts([80] * count, vocab_size, seed + 1), {"max_new_tokens": 60}),
        }

    def row(self, workload: str, arm: str, turn: int) -> dict[str, Any]:
        """The row of this run, from the file if it is there."""
        return self.rows.get(
            {"workload": workload, "arm": arm, "round": turn}, partial(self.run, workload, arm)
        )

    def run(self, workload: str, arm: str) -> dict[str, Any]:
        """One whole call of the pipeline."""
        prompts, options = self.workloads[workload]
        texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
        options = options | {"do_sample": False, "pad_token_id": PAD, "return_full_text": False}
        if arm.startswith("batch_size"):
            options["batch_size"] = int(arm.split()[1])
        if arm != "hf_paged":
            return self.timed(texts, options)
        with hf_paged.enabled(self.pipe, fallback="error"):
            result = self.timed(texts, options)
            stats = hf_paged.stats(self.pipe)
        counts = {name: getattr(stats, name) for name in ("native_calls", "mean_running", "steps")}
        if stats.native_calls < len(texts):
            raise RuntimeError(f"{stats.native_calls} native calls for {len(texts)} prompts")
        return result | counts

    def timed(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        self.pipe(texts[:2], **(options | {"max_new_tokens": 4}))
        cpu_runtime.wait_for_loading()
        self.pipe(texts[:2], **(options | {"max_new_tokens": 4}))
        start = time.perf_counter()
        results = self.pipe(texts, **options)
        seconds = time.perf_counter() - start
        outputs = [records[0]["generated_text"] for records in results]
        lengths = [len(text.split()) for text in outputs]
        digests = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in outputs]
        return {"seconds": seconds, "tokens": sum(lengths), "lengths": lengths, "outputs": digests}


def compare(bench: Bench, workload: str, repeats: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Runs what is missing of a workload and says how the arms compare."""
    once = {f"batch_size {size}": bench.row(workload, f"batch_size {size}", 0) for size in sizes}
    best = min(once, key=lambda arm: once[arm]["seconds"])
    arms = {"untouched": "untouched", "best batch_size": best, "": "hf_paged"}
    ratios: dict[str, list[float]] = {name: [] for name in TARGETS}
    for turn in range(repeats):
        order = [*arms][turn % len(arms) :] + [*arms][: turn % len(arms)]
        rows = {name: bench.row(workload, arms[name], turn) for name in order}
        for name in ratios:
            ratios[name].append(rows[name]["seconds"] / rows[""]["seconds"])
    untouched = bench.row(workload, "untouched", 0)
    reference = untouched["outputs"]
    rows = [row for row in bench.rows.data["rows"] if row["workload"] == workload]
    equal = {row["arm"]: sum(a == b for a, b in zip(row["outputs"], reference, strict=True)) for row in rows}
    return {
        "best": best,
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "pairs": ratios,
        "equal": equal,
        "new_tokens": {
            "least": min(untouched["lengths"]),
            "mean": statistics.mean(untouched["lengths"]),
            "most": max(untouched["lengths"]),
        },
    }


def table(data: dict[str, Any]) -> dict[str, Any]:
    """What docs/benchmarks.md shows of it."""
    lines = []
    for workload, result in data["results"].items():
        arms: dict[str, list[dict[str, Any]]] = {}
        for row in data["rows"]:
            if row["workload"] == workload:
                arms.setdefault(row["arm"], []).append(row)
        ours = statistics.median(row["seconds"] for row in arms["hf_paged"])
        for arm, rows in arms.items():
            seconds = statistics.median(row["seconds"] for row in rows)
            name = {"untouched": "untouched", result["best"]: "best batch_size"}.get(arm)
            ratio = result["ratios"][name] if name else seconds / ours
            cells = [f"{seconds:.1f}", f"{rows[0]['tokens'] / seconds:.0f}"]
            cells += [
                f"{ratio:.2f}×" if arm != "hf_paged" else "",
                f"{result['equal'][arm]} of {data['prompts']}",
            ]
            lines.append([workload, arm, *cells, str(len(rows))])
    spread = "; ".join(
        f"{workload}: {tokens['least']} to {tokens['most']} new tokens a prompt, {tokens['mean']:.1f} in the mean"
        for workload, tokens in ((w, result["new_tokens"]) for w, result in data["results"].items())
    )
    about = (
        f"`pipe(texts)` over {data['prompts']} prompts on {data['shape']} in {data['dtype']}: seconds of the whole "
        f"call, the same stop rule in every arm. {spread[:1].upper()}{spread[1:]}. `batch_size 1` is `untouched`."
    )
    head = ["workload", "arm", "seconds", "tokens/s", "hf_paged over that", "texts as untouched", "runs"]
    return {"about": about, "head": head, "rows": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2-124m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--workloads", default="ragged,uniform")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    arguments = parser.parse_args()
    bench, missed = Bench(arguments), 0
    results = bench.rows.data.setdefault("results", {})
    for workload in arguments.workloads.split(","):
        sizes = tuple(map(int, arguments.sizes.split(",")))
        result = results[workload] = compare(bench, workload, arguments.repeats, sizes)
        bench.rows.data["table"] = table(bench.rows.data)
        bench.rows.keep()
        print(f"{workload}: {result['new_tokens']} new tokens a prompt")
        for name, ratio in result["ratios"].items():
            wanted = TARGETS[name] if workload == "ragged" else 0.0
            missed += ratio < wanted
            print(
                f"  over {name} ({result['best']}): {ratio:.2f}"
                + (f", at least {wanted:g}" if wanted else "")
            )
        print(f"  texts as untouched, of {arguments.prompts}: {result['equal']}")
        missed += result["equal"]["hf_paged"] != arguments.prompts
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
