"""Whether two arms gave the same greedy tokens, and if not, whether the first difference was a near tie.

Greedy decoding is only defined up to rounding: where the two best logits are closer than the arithmetic is
exact, the order of summation decides. So for a difference the plain model is asked, on the very tokens up to
it, how far the other token's logit lies below the best one. That is a near tie in float32 below 1e-4, in
16-bit types below four times the spacing of numbers at that logit. After the first difference the two texts
are different texts and nothing is compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hf_paged.comparison.arms import ArmContext

_FP32_TIE = 1e-4
_MAX_EXAMINED = 32


@dataclass
class Difference:
    """The first difference of one request. `gap` is in logits; None where one text just ended earlier."""

    request: int
    position: int
    gap: float | None
    near_tie: bool


@dataclass
class Equality:
    """Requests both arms ran. Differences beyond the `examined` ones count as differences, never as ties."""

    arm: str
    reference: str
    num_requests: int
    num_equal: int
    num_tokens: int
    near_ties: int = 0
    differences: list[Difference] = field(default_factory=list)
    examined: int = 0

    @property
    def equal(self) -> bool:
        """All equal, or different only from a near tie on."""
        return self.num_equal + self.near_ties == self.num_requests

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"equal": self.equal}


def compare_outputs(
    context: ArmContext,
    arm: str,
    outputs: dict[int, list[int]],
    reference: str,
    expected: dict[int, list[int]],
) -> Equality:
    """Compares the tokens of two arms on the requests both have."""
    common = sorted(outputs.keys() & expected.keys())
    result = Equality(arm, reference, len(common), 0, sum(len(expected[i]) for i in common))
    for index in common:
        if outputs[index] == expected[index]:
            result.num_equal += 1
            continue
        if result.examined >= _MAX_EXAMINED:
            continue
        difference = _examine(context, index, outputs[index], expected[index])
        result.examined += 1
        result.near_ties += difference.near_tie
        result.differences.append(difference)
    return result


def _examine(context: ArmContext, index: int, tokens: list[int], expected: list[int]) -> Difference:
    pairs = zip(tokens, expected, strict=False)
    position = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:
        return Difference(index, min(len(tokens), len(expected)), None, False)
    prefix = [*context.requests[index].prompt, *expected[:position]]
    with torch.no_grad():
        ids = torch.tensor([prefix], device=context.model.device)
        logits = context.model(input_ids=ids, use_cache=False).logits[0, -1]
    best = float(logits.max())
    gap = max(best - float(logits[tokens[position]]), best - float(logits[expected[position]]))
    limit = _FP32_TIE
    if logits.dtype in (torch.bfloat16, torch.float16):
        limit = 4 * torch.finfo(logits.dtype).eps * max(abs(best), 1e-3)
    return Difference(index, position, gap, gap <= limit)
