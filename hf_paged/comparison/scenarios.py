"""Named scenarios: kinds of traffic, each with its lengths, its prompts and when requests arrive.

A scenario is drawn from a seed and cut or scaled to the model, so the same name, seed and number of requests give the
same work on every machine. What was changed to make it fit is in the workload's notes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_paged.comparison.lengths import LengthDistribution, Lengths, find_distribution
from hf_paged.comparison.workloads import Request, Workload, fit, prompt_source

GROUP_SIZE = 8
_SHARED_SUFFIX = LengthDistribution(
    "shared-prefix",
    Lengths(40, 0.6, 160),
    Lengths(60, 0.8, 240),
    "own part of the prompt and output; the shared part comes before",
)


@dataclass(frozen=True)
class Scenario:
    """One kind of traffic. `options` are defaults of `options.Options` for what the caller does not give."""

    name: str
    what: str
    distribution: LengthDistribution
    shared_tokens: int = 0  # first tokens that all prompts have in common
    group_size: int = 1  # times each prompt is asked for, one after another
    num_requests: int | None = None  # None: as many as the caller says
    scale_to_fit: bool = (
        False  # lengths shrink until the longest request fits the model, instead of being cut
    )
    options: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, str]:
        """For the report."""
        return {"name": self.name, "what": self.what, "lengths": self.distribution.source}

    def scale(self, max_positions: int | None) -> float:
        """The factor on all lengths: 1, or a power of one half with which the longest request fits."""
        longest = self.shared_tokens + self.distribution.prompt.maximum + self.distribution.output.maximum
        factor = 1.0
        while self.scale_to_fit and max_positions is not None and longest * factor > max_positions:
            factor /= 2
        return factor

    def draw(
        self,
        num_requests: int,
        *,
        vocab_size: int,
        max_positions: int | None,
        seed: int = 0,
        tokenizer: Any = None,
        special_ids: Sequence[int] = (),
        scale: float | None = None,
    ) -> Workload:
        """The requests.

        Args:
            num_requests: how many, unless the scenario has a number of its own.
            vocab_size, tokenizer, special_ids: where prompts come from, as in `workload_from_lengths`.
            max_positions: most tokens of a request, or None.
            seed: of lengths and prompts.
            scale: factor on all lengths; None is `self.scale(max_positions)`.

        Raises:
            ValueError: fewer than one request, or a scale that is not positive.
        """
        count = self.num_requests or num_requests
        if count < 1:
            raise ValueError(f"num_requests={num_requests}: must be at least 1")
        if scale is not None and not scale > 0:
            raise ValueError(f"scale={scale!r}: must be above 0")
        factor = self.scale(max_positions) if scale is None else scale
        lengths = self.distribution.scaled(factor).draw(count, seed)
        draw = prompt_source(vocab_size, special_ids, seed, tokenizer)
        shared = tuple(draw(max(round(self.shared_tokens * factor), 1))) if self.shared_tokens else ()
        requests: list[Request] = []
        prompt: tuple[int, ...] = ()
        for index, (prompt_tokens, output_tokens) in enumerate(lengths):
            if index % self.group_size == 0:
                prompt = shared + tuple(draw(prompt_tokens))
            requests.append(Request(prompt, output_tokens))
        notes = self._notes(factor, len(shared))
        return fit(Workload(self.name, tuple(requests), seed, notes), max_positions)

    def _notes(self, factor: float, shared: int) -> tuple[str, ...]:
        notes = []
        if factor != 1:
            notes.append(f"all lengths times {factor:g}")
        if shared:
            notes.append(f"the first {shared} tokens of every prompt are the same")
        if self.group_size > 1:
            notes.append(
                f"each prompt is asked for {self.group_size} times; each answer has a limit of its own"
            )
        return tuple(notes)


def _of_lengths(name: str, what: str, **more: Any) -> Scenario:
    return Scenario(name, what, find_distribution(name), **more)


_DESIGN = find_distribution("design")
SCENARIOS: dict[str, Scenario] = {
    s.name: s
    for s in (
        _of_lengths("design", "Ragged prompts and outputs, short enough for small machines"),
        _of_lengths("sharegpt", "Chat: outputs twice as long as prompts, both very ragged"),
        _of_lengths("alpaca", "Instructions: short prompts, short ragged outputs"),
        _of_lengths("azure-code", "Code completion: long prompts, a few tokens out", scale_to_fit=True),
        _of_lengths("azure-chat", "Conversation with long context", scale_to_fit=True),
        _of_lengths("uniform", "All requests of one length: padding wastes nothing, least is gained here"),
        Scenario(
            "shared-prefix",
            "One long system prompt before every request",
            _SHARED_SUFFIX,
            shared_tokens=256,
            scale_to_fit=True,
        ),
        Scenario(
            "rl-groups",
            f"Rollouts for reinforcement learning: {GROUP_SIZE} samples of each prompt",
            _DESIGN,
            group_size=GROUP_SIZE,
        ),
        Scenario(
            "single",
            "One prompt alone: there is nobody to share a step with",
            replace(_DESIGN, prompt=Lengths(80, 0, 240), output=Lengths(60, 0, 240)),
            num_requests=1,
            options={"arms": ("loop", "generate_batch", "hf_paged"), "repeats": 5},
        ),
        Scenario(
            "poisson",
            "Requests that arrive at random, one by one, at several rates",
            _DESIGN,
            options={"rate_fractions": (0.1, 0.25, 0.5, 0.8)},
        ),
    )
}


def find_scenario(name: str) -> Scenario:
    """The scenario of that name.

    Raises:
        ValueError: no such name; the message lists those there are.
    """
    if name not in SCENARIOS:
        raise ValueError(f"scenario={name!r}: must be one of {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """`count` arrival times in seconds, ascending from 0, of a Poisson process of `rate` a second.

    Raises:
        ValueError: a rate that is not positive.
    """
    if not rate > 0:
        raise ValueError(f"rate={rate!r}: must be above 0")
    rng = random.Random(f"arrivals:{seed}:{rate!r}")
    now, times = 0.0, []
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    return times
