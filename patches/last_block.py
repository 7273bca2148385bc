"""The last block of a step computes what follows its keys and values for the tokens that get logits only.

Nothing reads the others' output: no later block, and the head takes rows of `StepInputs.logits_indices`. So where a
step has prompts, their tokens are normed and projected to keys and values, and upstream's own block runs on the rows
that are left, each a decode over the blocks just written. Of a model of L blocks that saves nearly one Lth of a prompt.

    all T tokens    norm -> keys, values -> their slots
    R last tokens   the whole block, with `StepInputs.tail` for metadata -> written over their rows of the input
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.patches.attention import forward_slot
from hf_paged.patches.registry import PatchSpec, class_reason, qualified_name, unwrapped
from hf_paged.step import StepInputs, stands_in

__all__ = ["find_last_block", "least_cut", "short_form"]

#: Multiplications that take as long as the second part's own calls, about 0.2 ms on two CPU cores.
_WORTH = 20_000_000


def find_last_block(model: Any, spec: PatchSpec) -> nn.Module | None:
    """The block around the last attention layer; None where its forward is not the family's own."""
    attention = spec.find_attention_layers(model)[-1]
    block = next((b for b in map(unwrapped, reversed(spec.blocks(model))) if _holds(b, attention)), None)
    trusted = next((name for module, name in spec.structure(model) if module is block), None)
    if block is None or trusted is None or vars(block).get(forward_slot(block)) is not None:
        return None
    cls: Any = type(block)
    own = qualified_name(cls) == trusted and class_reason(cls, cls.forward, trusted) is None
    return block if own else None


def short_form(
    block: Any, number: int, spec: PatchSpec, form: Callable[..., Any] | None
) -> Callable[..., Any]:
    """What to run in a step in place of the forward of `block`, the last of `number` + 1.

    Args:
        form: what would run in a step otherwise; None for the forward of its class.
    """
    known = type(block).forward

    def whole(module: Any, step: StepInputs, *args: Any, **kwargs: Any) -> Any:
        if form is not None:
            return form(module, step, *args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def in_step(module: Any, step: StepInputs, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        tail = step.tail
        if (
            tail is None
            or step.recording is not None
            or type(module).forward is not known
            or not _plain(hidden_states)
        ):
            return whole(module, step, hidden_states, *args, **kwargs)
        spec.store_new_kv(module, step, number, hidden_states, **kwargs)
        rows = step.logits_indices.to(hidden_states.device)
        if rows.numel():
            tokens = hidden_states.shape[1]
            args = tuple(_of_rows(value, rows, tokens) for value in args)
            kwargs = {name: _of_rows(value, rows, tokens) for name, value in kwargs.items()}
            part = replace(step, metadata=tail, tail=None)
            with stands_in(part):
                output = whole(module, part, hidden_states[:, rows], *args, **kwargs)
            hidden_states[0].index_copy_(0, rows, output[0])
        return hidden_states

    return in_step


def least_cut(block: nn.Module) -> int:
    """From how many tokens on the products saved are worth more than running the block in two parts."""
    weights = sum(parameter.numel() for parameter in block.parameters())
    return max(2, _WORTH // max(1, weights))


def _holds(block: Any, attention: nn.Module) -> bool:
    return any(child is not None and unwrapped(child) is attention for child in block._modules.values())


def _plain(hidden_states: Tensor) -> bool:
    """Whether rows may be written over: autocast could give them another dtype, and a graph may need the old ones."""
    return not (torch.is_autocast_enabled(hidden_states.device.type) or hidden_states.requires_grad)


def _of_rows(value: Any, rows: Tensor, tokens: int) -> Any:
    """An argument of the block, cut to `rows` where it is laid out by token: [1, T, ...]."""
    if isinstance(value, tuple):
        return tuple(_of_rows(part, rows, tokens) for part in value)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == (1, tokens):
        return value[:, rows]
    return value
