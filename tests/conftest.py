"""What holds for every test: offline, a printed seed for the parity grids, GPU marks, no leaked blocks."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator

# Before transformers is imported: nothing here may wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Workers of pytest-xdist have a core each, from the start: torch and numba count their threads when they are loaded,
# and threads of two workers that wait for each other's cores take ten times as long. The kernels still see two.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker[2:]) % len(_cores)]})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "2")

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton decides when its kernels are defined, and transformers imports it: without a GPU they run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.helpers import check_engines  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-seed",
        type=int,
        default=None,
        help="seed that picks the sub-grid of the parity tests; by default today's date, so that it rotates",
    )
    parser.addoption(
        "--soak-requests", type=int, default=0, help="requests of the server's soak test; 0 skips it"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Set in the controller, so that pytest-xdist hands the same seed to all workers.
    if config.option.parity_seed is None:
        config.option.parity_seed = int(datetime.date.today().strftime("%Y%m%d"))


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.option.parity_seed
    return f"parity seed: {seed} (repeat with --parity-seed={seed})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def parity_seed(pytestconfig: pytest.Config) -> int:
    """Seed of this session's sub-grids, printed in the header."""
    return pytestconfig.option.parity_seed


@pytest.fixture(autouse=True)
def no_leaked_blocks() -> Iterator[None]:
    """After each test, every engine still alive is idle and its blocks add up."""
    yield
    # A session that never loaded the registry has no engine; importing it here would slow the pure tests.
    registry = sys.modules.get("hf_paged.engine.registry")
    if registry is not None:
        check_engines(registry.live_engines())
