"""How many tokens to draft for each sequence of a step: as many as make new tokens come fastest.

Each draft is a bet. It costs what one more token costs a step of that size, which is measured while drafts are
made, and wins a token with a probability that is learned for each sequence: that the draft is right, and all those
before it. Alone, a sequence may draft much, since a step of ten tokens takes hardly longer than one of a single
token; among many, only what is likely to be right is worth its place; and text which is never guessed right is soon
left alone, but for a try now and then, ever more seldom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Tokens at which a step takes twice as long as with one, until steps were measured.
_PRIOR_TOKENS = 32.0
#: Step times are kept by size: 1, 2, 3-4, 5-8, ... tokens.
_NUM_SIZES = 16
_NEWEST_WEIGHT = 0.2
#: A time counts at most so many times what was expected: somebody else may have used the machine.
_MAX_SURPRISE = 2.0
#: A step's share by which sizes not measured seem quicker again: what once took long is tried again some day.
_FADE = 0.0005
#: Drafts must promise to win so many times the tokens that their time is worth.
_MIN_GAIN = 1.2
#: Steps without drafts after which a sequence tries one, at first; twice as many after each try in vain.
_FIRST_PATIENCE, _LONGEST_PATIENCE = 8, 256

_FIRST_RATE, _HIGHEST_RATE = 0.7, 0.98
_PRIOR_WEIGHT = 1.0
#: What a sequence's earlier drafts still count after newer ones, and after a step without any.
_KEPT_AFTER_DRAFT, _KEPT_AFTER_PAUSE = 0.8, 0.985
_KEPT_OVERALL = 0.98


@dataclass
class Acceptance:
    """How often the drafts of one sequence were right, those of one kind: long and short matches differ."""

    kind: int = 0
    right: float = 0.0
    tried: float = 0.0
    patience: int = _FIRST_PATIENCE
    num_pauses: int = 0

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Drafts after the first wrong one were not tried: nothing is known of them."""
        self.right = self.right * _KEPT_AFTER_DRAFT + num_accepted
        self.tried = self.tried * _KEPT_AFTER_DRAFT + num_accepted + (num_accepted < num_drafted)
        self.num_pauses = 0
        self.patience = _FIRST_PATIENCE if num_accepted else min(2 * self.patience, _LONGEST_PATIENCE)

    def pause(self) -> None:
        """A step in which something could have been drafted and was not."""
        self.num_pauses += 1
        self.right *= _KEPT_AFTER_PAUSE
        self.tried *= _KEPT_AFTER_PAUSE

    def rate(self, prior: float) -> float:
        """Probability that a draft is right if the one before it was."""
        rate = (self.right + _PRIOR_WEIGHT * prior) / (self.tried + _PRIOR_WEIGHT)
        return min(rate, _HIGHEST_RATE)


class StepTimes:
    """Seconds a step of T tokens takes, learned from steps."""

    def __init__(self) -> None:
        #: Measured time over that of the prior, by size; 0: not measured.
        self._ratios = np.zeros(_NUM_SIZES)
        self._centers = np.array([1, 2, *(1.5 * 2.0 ** np.arange(1, _NUM_SIZES - 1))])

    def observe(self, num_tokens: int, seconds: float) -> None:
        size = min(int(num_tokens - 1).bit_length(), _NUM_SIZES - 1)
        ratio = seconds / _prior(num_tokens)
        before = self._ratios[size]
        self._ratios *= 1 - _FADE
        if before:
            ratio = before + _NEWEST_WEIGHT * (min(ratio, _MAX_SURPRISE * before) - before)
        self._ratios[size] = ratio

    def __call__(self, num_tokens: np.ndarray) -> np.ndarray:
        """[n] token counts -> [n] seconds; without any measurement in units of a step of one token."""
        known = self._ratios > 0
        if not known.any():
            return _prior(num_tokens)
        centers = self._centers[known]
        times = np.maximum.accumulate(self._ratios[known] * _prior(centers))
        # Straight lines between what was measured, the prior's shape beyond.
        measured = np.clip(num_tokens, centers[0], centers[-1])
        return np.interp(measured, centers, times) * (_prior(num_tokens) / _prior(measured))


def _prior(num_tokens: Any) -> Any:
    """For a number or an array of them."""
    return 1.0 + num_tokens / _PRIOR_TOKENS


class DraftPolicy:
    """Shares drafts among the sequences of a step."""

    def __init__(self) -> None:
        self.step_times = StepTimes()
        #: Over all sequences, by kind: what is expected of a new one.
        self._overall: dict[int, Acceptance] = {}

    def learn(self, acceptance: Acceptance, num_drafted: int, num_accepted: int) -> None:
        acceptance.add(num_drafted, num_accepted)
        overall = self._of_kind(acceptance.kind)
        overall.right = _KEPT_OVERALL * overall.right + num_accepted
        overall.tried = _KEPT_OVERALL * overall.tried + num_accepted + (num_accepted < num_drafted)

    def first_rate(self, kind: int) -> float:
        """What is expected of a sequence that has made no such draft yet, or not for long."""
        overall = self._of_kind(kind)
        return max(overall.right / overall.tried, _FIRST_RATE / 2)

    def _of_kind(self, kind: int) -> Acceptance:
        return self._overall.setdefault(kind, Acceptance(kind, 4 * _FIRST_RATE, 4.0))

    def share(
        self,
        num_tokens: int,
        acceptances: list[Acceptance],
        offers: list[int],
        *,
        room: int,
        seconds_a_depth: list[float],
    ) -> list[int]:
        """How many of its `offers` (each at least 1) each sequence shall draft.

        Args:
            num_tokens: of the step without drafts.
            acceptances: one a sequence.
            room: most drafts in all.
            seconds_a_depth: what another token for a sequence costs in drafting; it is made for all of its kind
                at once, so that the deepest decides.
        """
        rates = np.array([a.rate(self.first_rate(a.kind)) for a in acceptances])
        depths = np.arange(1, max(offers) + 1)[:, None]
        # [depth, sequence], depth-major: among equals the shallower draft goes first.
        gains = np.where(depths <= np.array(offers), rates**depths, 0.0).ravel()
        order = np.argsort(-gains, kind="stable")[: max(0, room)]
        order = order[gains[order] > 0]
        if not len(order):
            return [0] * len(offers)
        expected = num_tokens + np.concatenate([[0.0], np.cumsum(gains[order])])
        seconds = self.step_times(num_tokens + np.arange(len(order) + 1))
        costs = np.array(seconds_a_depth)
        if costs.any():
            depth, member = np.divmod(order, len(offers))
            seconds[1:] += np.maximum.accumulate((depth + 1) * costs[member])
        # The last drafts that still make tokens come faster win next to nothing, if rates and times are right.
        value = _MIN_GAIN * float((expected / seconds).max())
        best = int(np.argmax(expected - value * seconds))
        counts = np.bincount(order[:best] % len(offers), minlength=len(offers)).tolist()
        for i, acceptance in enumerate(acceptances):
            if not counts[i] and acceptance.num_pauses >= acceptance.patience and best < room:
                counts[i] = 1
                best += 1
        return counts
