"""The lines of `hf-paged bench`: what is measured, and the ratios the project holds itself to on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Target:
    """hf_paged's tokens/s over those of arm `against`: at least `must`; `aim` is what it should reach."""

    against: str
    must: float
    aim: float | None = None


@dataclass(frozen=True)
class BenchLine:
    """One comparison of a suite. `paged_arm` is the arm whose ratios are judged."""

    key: str
    title: str
    shape: str
    dtype: str
    num_requests: int
    targets: tuple[Target, ...]
    paged_arm: str = "hf_paged"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        return (*(t.against for t in self.targets), self.paged_arm)


_FULL = (
    BenchLine(
        "gpt2-5m-fp32",
        "GPT-2, 4 × 256, 5 M, fp32",
        "gpt2-5m",
        "float32",
        256,
        (Target("loop", 10), Target("padded", 6), Target("generate_batch", 2.5)),
        options={"loop_subset": 64, "padded_subset": 128, "calibration_subset": 64},
    ),
    BenchLine(
        "gpt2-124m-one-prompt",
        "GPT-2 124M, fp32, one prompt alone",
        "gpt2-124m",
        "float32",
        1,
        (Target("loop", 1.1),),
        paged_arm="hf_paged_loop",
        options={"repeats": 5},
    ),
    BenchLine(
        "gpt2-124m-bf16",
        "GPT-2 124M, bf16",
        "gpt2-124m",
        "bfloat16",
        128,
        (Target("loop", 9, 12),),
        options={"loop_subset": 16},
    ),
    BenchLine(
        "gpt2-124m-fp32",
        "GPT-2 124M, fp32",
        "gpt2-124m",
        "float32",
        128,
        (Target("loop", 6, 8), Target("padded", 5.5, 7), Target("generate_batch", 2.2, 3)),
        # Its arms are slow (a token costs transformers' loop 30 ms), so only settings that can win are searched:
        # - Order "prompt" alone. Outputs are drawn independently of prompts, so a batch's longest output is no
        #   longer in this order than in "dataset", while prompts of one length need no padding.
        # - Pools of 32 and 64 requests. A step of 16 rows takes four fifths of the time of one of 32.
        # All three batch sizes are tried, on whole batches. tests/comparison/test_bench.py adds up what it takes.
        options={
            "loop_subset": 16,
            "padded_subset": 32,
            "padded_sizes": (8, 16, 32),
            "padded_orders": ("prompt",),
            "pool_rows": (32, 64),
            "calibration_subset": 32,
        },
    ),
)

#: What makes a line short: fewer requests, no search for the best settings, one run where runs are long.
_SHORT: dict[str, dict[str, Any]] = {
    "gpt2-5m-fp32": {
        "num_requests": 96,
        "options": {
            "loop_subset": 16,
            "padded_subset": 32,
            "padded_sizes": (8, 16),
            "calibration_subset": 32,
        },
    },
    "gpt2-124m-one-prompt": {"options": {"repeats": 3}},
    "gpt2-124m-bf16": {"num_requests": 48, "options": {"repeats": 1, "loop_subset": 6}},
    "gpt2-124m-fp32": {
        "num_requests": 32,
        "options": {
            "repeats": 1,
            "loop_subset": 6,
            "padded_subset": 16,
            "padded_sizes": (16,),
            "padded_orders": ("prompt",),
            "pool_rows": (32,),
        },
    },
}

SUITES: dict[str, tuple[BenchLine, ...]] = {
    "quick": tuple(replace(line, **_SHORT[line.key]) for line in _FULL),
    "full": _FULL,
}
