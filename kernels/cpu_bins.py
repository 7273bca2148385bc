"""The one parallel loop of the CPU kernels: calls a compiled kernel for each bin, on numba's threads."""

from __future__ import annotations

import numpy as np
from numba import prange, types

from hf_paged.kernels.cpu_jit import entry
from hf_paged.kernels.cpu_memory import call_at

__all__ = ["compile_loop", "run_bins"]


@entry(parallel=True)
def run_bins(bins, address, arguments):
    """Runs `kernel(index, bins, arguments)`, which lies at `address`, for every index below `bins`."""
    for index in prange(bins):
        call_at(address, np.int64(index), bins, arguments)


def compile_loop() -> None:
    """Compiles `run_bins`, or loads it, without running it."""
    run_bins.compile((types.int64, types.int64, types.int64))
