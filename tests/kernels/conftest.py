"""One or two threads for a test of kernels; the Triton tests are left out, and the report says so, without Triton."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_triton_*.py"]


def pytest_terminal_summary(terminalreporter) -> None:
    if not HAS_TRITON:
        terminalreporter.write_line(
            "tests/kernels/test_triton_*.py not run: Triton is not installed", yellow=True
        )


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest, parity_seed: int) -> Iterator[None]:
    """One or two threads for each test, chosen by the seed: the workers of pytest-xdist have one core each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 + zlib.crc32(f"{request.node.nodeid}{parity_seed}".encode()) % 2)  # noqa: TID251
    yield
    torch.set_num_threads(before)  # noqa: TID251


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A user's, while the test runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)  # noqa: TID251
    yield request.param
    torch.set_default_dtype(before)  # noqa: TID251
