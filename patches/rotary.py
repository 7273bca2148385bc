"""The angles of rotary positions, looked up: upstream computes cosines and sines anew in every step.

Of static kinds of RoPE the row of a position is always the same, so on a CPU each is computed once, by upstream's own
forward, in the dtype it is asked for. A table is as long as the longest sequence was so far, and belongs to the
frequencies it was made of: these are compared in every step, as anybody may change them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_paged.step import StepInputs

__all__ = ["STATIC_ROPE", "RotaryTable"]

#: Kinds whose frequencies depend neither on the length of a sequence nor on that of a forward.
STATIC_ROPE = ("default", "linear", "yarn", "llama3", "proportional")
_LEAST_ROWS = 256
_MOST_NUMBERS = 1 << 23  # of cosines


class RotaryTable:
    """What to run in a step in place of the forward of one `LlamaRotaryEmbedding`."""

    def __init__(self) -> None:
        self._made_of: tuple[Any, ...] = ()  # scaling, dtype
        self._frequencies: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None  # cos and sin, each [positions, D]

    def __call__(
        self, module: Any, step: StepInputs, x: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Cos and sin, each [1, T, D] in the dtype of `x`; None where they are not to be looked up."""
        frequencies = module.inv_freq
        if x.device.type != "cpu" or frequencies.device.type != "cpu" or module.rope_type not in STATIC_ROPE:
            return None
        longest = max(step.metadata.seq_lens_list)
        if 2 * longest * 2 * frequencies.shape[-1] > _MOST_NUMBERS:
            return None
        tables = self._known(module, x, longest) or self._make(module, x, longest)
        cos, sin = (table.index_select(0, position_ids[0])[None] for table in tables)
        return cos, sin

    def _known(self, module: Any, x: Tensor, longest: int) -> tuple[Tensor, Tensor] | None:
        if (
            self._tables is None
            or self._frequencies is None
            or len(self._tables[0]) < longest
            or self._made_of != (module.attention_scaling, x.dtype)
            or self._frequencies.dtype is not module.inv_freq.dtype
            or not torch.equal(self._frequencies, module.inv_freq)
        ):
            return None
        return self._tables

    def _make(self, module: Any, x: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        rows = max(_LEAST_ROWS, 1 << (longest - 1).bit_length())
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(rows, device="cpu")[None]
            cos, sin = type(module).forward(module, x.new_empty(0, device="cpu"), positions)
            self._frequencies = module.inv_freq.clone()
        self._made_of, self._tables = (module.attention_scaling, x.dtype), (cos[0], sin[0])
        return self._tables
