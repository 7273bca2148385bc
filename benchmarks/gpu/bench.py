"""What every suite gets: the device, the clock of its budget, ceilings of the machine, and a place for rows."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.results import ResultFile, Row, line


@dataclass(frozen=True)
class Case:
    """One row to measure. `seconds` is about what it takes on an H200: it is not begun with less time left."""

    name: str
    measure: Callable[[], Row]
    seconds: float = 2.0


@dataclass
class Bench:
    """A run of one suite."""

    device: torch.device
    results: ResultFile
    budget_s: float
    tiny: bool = False
    only: str = ""  # rows whose names hold this
    #: Bytes and FLOP a second, as measured in this run: what shares are of.
    copy_rate: float | None = None
    matrix_rate: float | None = None
    failed: int = 0
    skipped: list[str] = field(default_factory=list)  # for want of time
    _started: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.perf_counter() - self._started)

    def run(self, cases: Iterable[Case]) -> None:
        """Measures the cases in order. One that raises is a row with its error; the others still run."""
        for case in cases:
            if self.only and self.only not in case.name and not case.name.startswith("ceiling"):
                continue
            if self.left_s < case.seconds:
                self.skipped.append(case.name)
                continue
            try:
                row = {"name": case.name, **case.measure()}
            except Exception as error:
                # A benchmark of many shapes: one that does not fit or compile is a result of its own.
                traceback.print_exc()
                row = {"name": case.name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
                self.failed += 1
            self.results.add(row)
            print(line(row), flush=True)
            self.free()

    def free(self) -> None:
        """Hands memory of the last row back: the next may need all of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def share_of_copy(self, bytes_per_second: float) -> float | None:
        return None if self.copy_rate is None else 100 * bytes_per_second / self.copy_rate

    def describe_device(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "interpreter"


def seconds_of(work: Callable[[], Any], device: torch.device, *, graph: bool = True) -> float:
    """Median seconds of `work` on the GPU with a cold L2, without the host's time to launch where `graph`.

    On a CPU (tiny shapes in the interpreter) it is the time of one call and means nothing.
    """
    work()
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    import triton.testing

    torch.cuda.synchronize()
    call = captured(work) if graph else work
    # It zeroes a buffer larger than L2 before each call.
    return 1e-3 * triton.testing.do_bench(call, warmup=20, rep=80, return_mode="median")


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()

    def replay(kept: Any = output) -> None:
        graph.replay()

    return replay
