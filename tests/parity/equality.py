"""What "equal" means (design, section 4): the same tokens, or at the first difference a tie in upstream's own numbers.

A tie is a gap below 1e-4 between upstream's best two scores, or for a draw between the best two p/q, at that
step. Ties are counted:
more than one in 20,000 tokens fails the session.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

TIE = 1e-4
TOKENS_PER_TIE = 20_000


@dataclass
class Tally:
    tokens: int = 0
    ties: list[str] = field(default_factory=list)

    def check(self) -> None:
        allowed = -(-self.tokens // TOKENS_PER_TIE)
        assert len(self.ties) <= allowed, f"{len(self.ties)} ties in {self.tokens} tokens: {self.ties[:10]}"


TALLY = Tally()


def seeded_generate(model: Any, seed: int | None, **kwargs: Any) -> Any:
    if seed is not None:
        torch.manual_seed(seed)
    return model.generate(**kwargs)


def assert_equal_output(
    plain: Any, kwargs: dict[str, Any], seed: int | None, expected: Any, actual: Any
) -> None:
    """Compares sequences row by row; `plain` is a model that is not enabled, to look at upstream's scores at a
    difference.

    Args:
        kwargs: the arguments of the call.
        seed: what `torch.manual_seed` got before it, or None.
        expected, actual: [rows, width] outputs of the plain and of the enabled model.
    """
    width = kwargs["input_ids"].shape[1]
    TALLY.tokens += actual[:, width:].numel()
    if expected.shape == actual.shape and torch.equal(expected, actual):
        return
    common = min(expected.shape[1], actual.shape[1])
    differing = [
        (row, int((expected[row, :common] != actual[row, :common]).nonzero()[0]))
        for row in range(expected.shape[0])
        if not torch.equal(expected[row, :common], actual[row, :common])
    ]
    assert differing, f"shapes differ with equal tokens: {tuple(expected.shape)} and {tuple(actual.shape)}"
    for row, column in differing:
        gap = _upstream_gap(plain, kwargs, seed, row, column - width)
        where = f"row {row}, new token {column - width}"
        assert gap < TIE, (
            f"{where}: {int(actual[row, column])} instead of {int(expected[row, column])}, upstream's gap is {gap:.2e}"
        )
        TALLY.ties.append(f"{where}, gap {gap:.1e}")


def _upstream_gap(plain: Any, kwargs: dict[str, Any], seed: int | None, row: int, step: int) -> float:
    """How far apart upstream's best two candidates are at one step of one row."""
    assert step >= 0, "the prompt itself differs"
    output = seeded_generate(plain, seed, **kwargs, return_dict_in_generate=True, output_scores=True)
    scores = output.scores[step].float()
    if kwargs.get("do_sample"):
        torch.manual_seed(seed)
        for _ in range(step + 1):
            draws = torch.empty_like(scores).exponential_()
        race = scores.softmax(-1) / draws
        best = race[row].topk(2).values
        return float((best[0] - best[1]) / best[0])
    best = scores[row].topk(2).values
    return float(best[0] - best[1])
