"""The GPU suite of the kernels, started without a GPU: its own check functions on tiny shapes, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import test_gpu_kernels as gpu_suite
from tests.kernels.triton_support import poison_new_tensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TINY = (4, 2, 16)


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch):
    poison_new_tensors(monkeypatch)


@pytest.mark.parametrize(
    "check, arguments",
    [
        (gpu_suite.check_decode, (TINY, torch.float32, [1, 33, 0], "window")),
        (gpu_suite.check_prefill, (TINY, torch.float16, [5, 17], [3, 0], "softcap-sinks")),
        (gpu_suite.check_quantised, (torch.int8, TINY, torch.float32, [1, 40], [3])),
        (gpu_suite.check_replay, (TINY, torch.float32, 70, [1, 0, 33, 65])),
        (gpu_suite.check_rope_store, (TINY, torch.float32, 18)),
        (gpu_suite.check_rows, (48, torch.float32, 3)),
        (gpu_suite.check_sampler, (2, 40, torch.float32)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_gpu_suite_starts_in_the_interpreter(check, arguments):
    check(*arguments)


def test_every_gpu_check_is_dry_run_or_needs_a_device():
    """A check that no test here calls would first run on the day a GPU is there."""
    checks = {name for name in vars(gpu_suite) if name.startswith("check_")}
    called = {
        mark.args[1][i][0].__name__
        for mark in test_gpu_suite_starts_in_the_interpreter.pytestmark
        for i in range(7)
    }
    # Bitwise equality is a claim about compiled kernels; test_triton_attention has the interpreter's own test of it.
    assert checks - called == {"check_batch_invariance"}
