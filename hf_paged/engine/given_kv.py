"""Keys and values that a sequence comes with, computed by somebody else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class GivenKV:
    """Of the first tokens of a sequence, layer by layer: keys and values, each [num_tokens, H_kv, D].

    They stay until the sequence ends: what cannot be computed from its tokens must survive a preemption.
    """

    layers: list[tuple[Tensor, Tensor]]
    in_blocks: bool = False  # whether the blocks the sequence has now hold them

    @property
    def num_tokens(self) -> int:
        return self.layers[0][0].shape[0]
