"""Peak memory of a piece of work, in the process that does it.

On a CPU it is the peak of the resident set over the resident set before, from the kernel's own high-water
mark (Linux, reset before each measurement) or, where that cannot be reset, from a thread that samples it.
Limits, either way: it is the whole process, so other threads' memory counts; memory the allocator kept from
earlier work is handed back before the start (`malloc_trim`), but what it does not hand back and reuses is not
seen, so small differences mean nothing. On CUDA it is what torch allocated at most, over what it had
allocated before.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

_SAMPLE_SECONDS = 0.01


class PeakMemory:
    """Context manager; afterwards `total_bytes` at the peak, `peak_bytes` over the start, and `method`.

    The numbers are None where they cannot be told.
    """

    def __init__(self, device: Any) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self.peak_bytes: int | None = None
        self.total_bytes: int | None = None
        self.method = "none"
        self._stop = threading.Event()
        self._sampled = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        release_unused(self._cuda)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self.method, self._base = "torch.cuda.max_memory_allocated", torch.cuda.memory_allocated()
            return self
        base = resident_bytes()
        if base is None:
            return self
        self._base = base
        if _reset_high_water():
            self.method = "VmHWM"
        else:
            self.method = "sampled resident set"
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.method == "none":
            return
        if self._cuda:
            peak = torch.cuda.max_memory_allocated()
        elif self._thread is None:
            peak = _status_bytes("VmHWM") or self._base
        else:
            self._stop.set()
            self._thread.join()
            peak = max(self._sampled, resident_bytes() or 0)
        self.total_bytes = peak
        self.peak_bytes = max(peak - self._base, 0)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sampled = max(self._sampled, resident_bytes() or 0)


def resident_bytes() -> int | None:
    """The resident set of this process, or None where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss


def release_unused(cuda: bool = False) -> None:
    """Collects garbage and hands unused memory back to the system, as far as the allocator can."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # Only glibc has it.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    high, now = _status_bytes("VmHWM"), resident_bytes()
    # Some sandboxes accept the write and do nothing.
    return high is not None and now is not None and high <= now + (8 << 20)


def _status_bytes(key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None
