"""A/B comparison of generation on one model: the same requests and limits, interleaved and repeated.

`compare` runs it and `CompareReport` is what it found. Nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_paged.comparison.api import compare
    from hf_paged.comparison.report import CompareReport

__all__ = ["CompareReport", "compare"]


def __getattr__(name: str) -> Any:
    if name == "compare":
        from hf_paged.comparison.api import compare

        return compare
    if name == "CompareReport":
        from hf_paged.comparison.report import CompareReport

        return CompareReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
