"""Named length distributions of prompts and outputs, drawn from a seed. No torch, no text.

A distribution is a lognormal clipped to [1, max], with its location solved so that the mean *after* clipping
is the published one. Draws are stratified (one from each of n equal slices of probability, in random order):
a sample of 32 requests has almost the mean of a sample of 10,000, so that a short benchmark is not about its
luck with the lengths.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from statistics import NormalDist

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Lengths:
    """Token counts of that `mean`: lognormal of shape `sigma`, clipped to [1, maximum]. `sigma` 0 is a
    constant."""

    mean: float
    sigma: float
    maximum: int

    def draw(self, count: int, rng: random.Random) -> list[int]:
        """`count` lengths, stratified, in random order."""
        if self.sigma == 0:
            return [round(self.mean)] * count
        location = self._location()
        lengths = []
        for i in range(count):
            quantile = min(max((i + rng.random()) / count, 1e-9), 1 - 1e-9)
            value = math.exp(location + self.sigma * _NORMAL.inv_cdf(quantile))
            lengths.append(min(max(round(value), 1), self.maximum))
        rng.shuffle(lengths)
        return lengths

    def scaled(self, factor: float) -> Lengths:
        """The same shape with mean and maximum times `factor`."""
        return replace(self, mean=self.mean * factor, maximum=max(round(self.maximum * factor), 1))

    def _location(self) -> float:
        """The `mu` for which E[min(X, maximum)] = mean; the expectation grows with mu: bisection finds it."""
        low, high = math.log(self.mean) - 4 * self.sigma - 4, math.log(self.maximum) + 4
        for _ in range(80):
            middle = (low + high) / 2
            if self._clipped_mean(middle) < self.mean:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def _clipped_mean(self, mu: float) -> float:
        distance = (math.log(self.maximum) - mu) / self.sigma
        below = math.exp(mu + self.sigma**2 / 2) * _NORMAL.cdf(distance - self.sigma)
        return below + self.maximum * (1 - _NORMAL.cdf(distance))


@dataclass(frozen=True)
class LengthDistribution:
    """Prompt and output lengths of a kind of traffic. They are drawn independently of each other."""

    name: str
    prompt: Lengths
    output: Lengths
    source: str

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """`count` pairs of (prompt tokens, output tokens), the same for the same seed."""
        rng = random.Random(f"{self.name}:{seed}")
        return list(zip(self.prompt.draw(count, rng), self.output.draw(count, rng), strict=True))

    def scaled(self, factor: float) -> LengthDistribution:
        """Prompts and outputs times `factor`; the same seed gives the same ranks."""
        return replace(self, prompt=self.prompt.scaled(factor), output=self.output.scaled(factor))


DISTRIBUTIONS: dict[str, LengthDistribution] = {
    d.name: d
    for d in (
        LengthDistribution(
            "design",
            Lengths(80, 0.8, 240),
            Lengths(60, 0.8, 240),
            "the project's own ragged workload for small machines",
        ),
        LengthDistribution(
            "sharegpt",
            Lengths(161.31, 1.3, 1024),
            Lengths(337.99, 0.9, 1024),
            "chat traffic with the ShareGPT means of the vLLM paper (arXiv 2309.06180)",
        ),
        LengthDistribution(
            "alpaca",
            Lengths(19.31, 0.6, 256),
            Lengths(58.45, 0.9, 512),
            "instructions with the Alpaca means of the vLLM paper (arXiv 2309.06180)",
        ),
        LengthDistribution(
            "azure-code",
            Lengths(2048, 0.79, 7424),
            Lengths(28, 1.24, 256),
            "code completion in the Azure trace of 2023 (Splitwise, ISCA 2024): long prompts, short outputs. Means of "
            "2048 and 28, shapes from medians of 1500 and 13, as papers report them; not computed from the trace here",
        ),
        LengthDistribution(
            "azure-chat",
            Lengths(1155, 0.5, 4096),
            Lengths(211, 0.99, 1024),
            "conversation in the Azure trace of 2023 (Splitwise, ISCA 2024). Means of 1155 and 211, shapes from "
            "medians of 1020 and 129, as papers report them; not computed from the trace here",
        ),
        LengthDistribution(
            "uniform",
            Lengths(80, 0, 240),
            Lengths(60, 0, 240),
            "all requests of one length: what padding likes best and continuous batching gains least from",
        ),
    )
}


def find_distribution(name: str) -> LengthDistribution:
    """The distribution of that name.

    Raises:
        ValueError: no such name; the message lists those there are.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"lengths={name!r}: must be one of {', '.join(DISTRIBUTIONS)}")
    return DISTRIBUTIONS[name]
