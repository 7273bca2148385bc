"""Which prepared calls run in lockstep, and which of their parts the engine runs row by row."""

from __future__ import annotations

from typing import Any

from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from hf_paged.engine import sampling, stopping
from hf_paged.generation.prepared import Prepared

#: Runs the model itself beside the loop, which is no part of what is served.
_UNSERVED = (UnbatchedClassifierFreeGuidanceLogitsProcessor,)


def is_lockstep(prepared: Prepared) -> bool:
    """Whether a processor or criterion of the call needs all its rows, step by step."""
    criteria, _ = row_criteria(prepared)
    return sampling.unsupported(prepared.processors, criteria) is not None


def row_criteria(prepared: Prepared) -> tuple[list[Any], tuple[Any, ...]]:
    """The criteria of the call, and beside them those of stop sequences that stop each row by itself.

    The harnesses they come from cut the text at the stop sequence, so what follows it does not matter. Where scores or
    logits are asked for, every row goes on as upstream's: then they are left where they are.
    """
    config = prepared.config
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return list(prepared.criteria), ()
    own = [c for c in prepared.criteria if stopping.is_stop_sequence(c)]
    return [c for c in prepared.criteria if c not in own], tuple(own)


def unserved_parts(prepared: Prepared, attended: bool) -> str | None:
    """Names a processor or criterion that cannot be served; None if all can.

    Args:
        attended: a thread will be there to run user-made ones. Requests without one keep a state for one prompt only.
    """
    if not attended or prepared.method == "_beam_search":
        return sampling.unsupported(prepared.processors, prepared.criteria)
    for processor in prepared.processors:
        if isinstance(processor, _UNSERVED):
            return f"logits processor {type(processor).__name__}"
    return None
