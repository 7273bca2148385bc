"""Keys and values that a sequence comes with, computed by somebody else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hf_paged.engine.kv_cache import KVCache
    from hf_paged.engine.request import Sequence


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


def write_given(sequences: Iterable[Sequence], cache: KVCache) -> None:
    """Writes what sequences came with into the blocks they have now, where that was not done."""
    for seq in sequences:
        given = seq.given_kv
        if given is not None and not given.in_blocks:
            cache.write(seq.block_table, given.layers)
            given.in_blocks = True
