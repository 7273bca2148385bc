"""One model at a time on the device: built when its first row needs it, gone before the next is built."""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import ModelShape, build


class Lent:
    """The model of a shape, built at the first use."""

    def __init__(self, bench: Bench, shape: ModelShape) -> None:
        self.name = shape.name
        self._bench, self._shape = bench, shape
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            dtype = torch.float32 if self._bench.tiny else torch.bfloat16
            self._model = build(self._shape, self._bench.device, dtype)
        return self._model

    def drop(self) -> None:
        self._model = None
        gc.collect()
        self._bench.free()


def engine_options(bench: Bench) -> dict[str, Any]:
    """Options of the enabled model: natively on the Triton kernels, or an error."""
    return {"backend": "triton", "fallback": "error"}
