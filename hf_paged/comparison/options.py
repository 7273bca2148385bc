"""How to compare: which arms, how often, on how much, with which settings to choose from."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_paged.comparison.arm_continuous import POOL_ROWS
from hf_paged.comparison.timing import DEFAULT_LIMITS, check_limits

ARMS = ("loop", "padded", "generate_batch", "hf_paged")
ALL_ARMS = (*ARMS, "padded_budget", "hf_paged_loop")


@dataclass(frozen=True)
class Options:
    """How to compare. Subsets are numbers of requests; None runs all."""

    arms: tuple[str, ...] = ARMS
    repeats: int = 3
    loop_subset: int | None = 32
    padded_subset: int | None = 64
    padded_sizes: tuple[int, ...] = (4, 8, 16, 32)
    padded_orders: tuple[str, ...] = ("dataset", "prompt")
    pool_rows: tuple[int, ...] = POOL_ROWS
    calibration_subset: int | None = 32
    #: Seconds, by "ttft", "tpot" and "e2e": what a request must keep to count as good.
    limits: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_LIMITS))
    #: Poisson arrivals: requests a second, or fractions of what hf_paged serves when all are there at once.
    rates: tuple[float, ...] = ()
    rate_fractions: tuple[float, ...] = ()
    rate_requests: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.arms:
            if name not in ALL_ARMS:
                raise ValueError(f"arm {name!r}: must be one of {', '.join(ALL_ARMS)}")
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms={self.arms!r}: must be at least one arm, each once")
        for name in ("repeats", "loop_subset", "padded_subset", "calibration_subset"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: must be at least 1")
        if not (self.padded_sizes and self.padded_orders and self.pool_rows):
            raise ValueError("padded_sizes, padded_orders and pool_rows must not be empty")
        check_limits(self.limits)
        for name in ("rates", "rate_fractions"):
            if not all(value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: each must be above 0")
        if self.rate_requests < 2:
            raise ValueError(f"rate_requests={self.rate_requests}: must be at least 2")
        if self.rate_fractions and not self.rates and "hf_paged" not in self.arms:
            raise ValueError("rate_fractions are of hf_paged's rate: name it among the arms, or give rates")
