"""Upstream's lists of processors and criteria as a lockstep call runs them, step by step.

What they call of the user's is called exactly as often, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)


def processing(processors: LogitsProcessorList) -> Callable[[Any, Any], Any]:
    """What `processors` does with (ids, scores), for one call: upstream inspects every signature at every step."""
    if type(processors) is not LogitsProcessorList:
        return processors
    fitting: list[Any] = []  # of two arguments

    def run(ids: Any, scores: Any) -> Any:
        for processor in processors:
            if any(processor is known for known in fitting):
                scores = processor(ids, scores)
            else:
                scores = LogitsProcessorList([processor])(ids, scores)  # raises for any other number of them
                fitting.append(processor)
        return scores

    return run


def ends_nothing(criteria: StoppingCriteriaList, tokens: Sequence[int], length: int) -> bool:
    """Whether it is plain, without running them, that `criteria` end no row.

    Args:
        tokens: the newest of each row.
        length: of the rows, those included.
    """
    if type(criteria) is not StoppingCriteriaList:
        return False
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            positions = criterion.max_position_embeddings  # upstream says it when there are more
            if length >= criterion.max_length or (positions is not None and length > positions):
                return False
        elif type(criterion) is EosTokenCriteria and isinstance(criterion.eos_token_id, Tensor):
            if not set(tokens).isdisjoint(criterion.eos_token_id.flatten().tolist()):
                return False
        else:
            return False
    return True
