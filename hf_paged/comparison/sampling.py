"""Running a slow arm on a part of its work, without favouring anybody, and saying how sure the rate is.

The unit of work is what an arm runs at once: one request of the loop, one batch of the padded arm. Units are
taken at equal distances along their expected cost, from a seeded start, so that a sample has long and short
ones in proportion. The batches are always those of the whole workload: sampling batches does not change how
well they are packed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hf_paged.comparison.workloads import Request


@dataclass(frozen=True)
class Unit:
    """Requests run together, by index into the workload."""

    indices: tuple[int, ...]


def sample_units(
    units: Sequence[Unit], requests: Sequence[Request], limit: int | None, seed: int
) -> list[Unit]:
    """Units covering about `limit` requests (None: all), at least one, in their original order."""
    total = sum(len(u.indices) for u in units)
    if limit is None or limit >= total:
        return list(units)
    count = max(1, math.ceil(len(units) * limit / total))
    by_cost = sorted(range(len(units)), key=lambda i: _cost(units[i], requests))
    step = len(units) / count
    start = random.Random(f"units:{seed}").random() * step
    chosen = {by_cost[min(int(start + k * step), len(units) - 1)] for k in range(count)}
    return [units[i] for i in sorted(chosen)]


def _cost(unit: Unit, requests: Sequence[Request]) -> tuple[int, int]:
    longest_output = max(requests[i].max_new_tokens for i in unit.indices)
    return longest_output, sum(len(requests[i].prompt) for i in unit.indices)


def rate_error(tokens: Sequence[int], seconds: Sequence[float], num_units: int) -> float | None:
    """Relative standard error of `sum(tokens) / sum(seconds)` as an estimate for all `num_units` units.

    The textbook formula for a ratio of a simple random sample without replacement; units spread along their
    cost do better than that. 0.0 if all units were run, None if one unit alone was (nothing to estimate the
    spread from).
    """
    count = len(tokens)
    if count >= num_units:
        return 0.0
    if count < 2:
        return None
    rate = sum(tokens) / sum(seconds)
    mean_tokens = sum(tokens) / count
    residuals = sum((t - rate * s) ** 2 for t, s in zip(tokens, seconds, strict=True)) / (count - 1)
    return math.sqrt((1 - count / num_units) * residuals / count) / mean_tokens
