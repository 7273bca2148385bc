"""Measures hf_paged on a GPU, row by row, the most important first.

    python -m benchmarks.gpu --suite kernels    decode and prefill attention, row-wise kernels
    python -m benchmarks.gpu --suite step       whole models: milliseconds a decode step against the roofline, host time
    python -m benchmarks.gpu --suite offline    ShareGPT lengths beside `generate` and `generate_batch`
    python -m benchmarks.gpu --suite adapters   1, 8 and 64 LoRA adapters in one batch

Rows go to benchmarks/results/<gpu>-<date>.json (or --json) as they come; a run stops by itself after --budget-s
and keeps what it has. Without a GPU, --tiny runs tiny shapes in Triton's interpreter: that the code works, no more.
Exit code: 0, 1 where a row failed, 2 for arguments that cannot be.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench, Case

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("kernels", "step", "offline", "adapters")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--budget-s", type=float, default=460.0, help="seconds after which no row is begun")
    parser.add_argument("--json", type=Path, help="the results file; rows are appended to what it holds")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.budget_s <= 0:
        parser.error(f"--budget-s {options.budget_s}: must be above 0")
    if options.tiny and options.json is None:
        parser.error("--tiny: its figures mean nothing; name a file for them with --json")
    # Both before Triton and transformers are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny --json FILE runs tiny shapes on the CPU")
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Runs the suite and prints its table."""
    import torch

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.results import ResultFile, default_path, tables
    from hf_paged._env import environment

    device = torch.device("cpu" if options.tiny else "cuda")
    path = options.json
    if path is None:
        path = default_path(ROOT, torch.cuda.get_device_name(device), datetime.date.today())
    try:
        results = ResultFile(path, options.suite, environment())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    bench = Bench(device, results, options.budget_s, options.tiny, options.only)
    bench.run(cases_of(options.suite)(bench))
    print(f"\n{bench.describe_device()}, suite {options.suite}\n\n{tables(results.rows)}\n")
    if bench.skipped:
        first = ", ".join(bench.skipped[:3])
        print(f"{len(bench.skipped)} rows not run within {options.budget_s:g} s: {first}, ...")
    print(f"{len(results.rows)} rows in {path}" + (f", {bench.failed} FAILED" if bench.failed else ""))
    return 1 if bench.failed else 0


def cases_of(suite: str) -> Callable[[Bench], Iterator[Case]]:
    """The cases of a suite, the machine's ceilings first."""
    import importlib

    from benchmarks.gpu import ceilings

    module = importlib.import_module(f"benchmarks.gpu.{suite}_suite")

    def cases(bench: Bench) -> Iterator[Case]:
        yield from ceilings.cases(bench)
        yield from module.cases(bench)

    return cases


if __name__ == "__main__":
    raise SystemExit(main())
