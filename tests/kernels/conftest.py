"""The Triton tests are left out, and the report says so, where Triton is not installed (it is only made for Linux)."""

from __future__ import annotations

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_triton_*.py"]


def pytest_terminal_summary(terminalreporter) -> None:
    if not HAS_TRITON:
        terminalreporter.write_line(
            "tests/kernels/test_triton_*.py not run: Triton is not installed", yellow=True
        )
