"""Tensors of a decode step that stay where they are: what a captured graph reads, filled anew for each step.

    rows      | of the step ............ | padding .............. |
              0                    num_rows                    size
    padding   id 0, position 0, slot -1 (stores nothing), length 0 (attends nothing), an all-zero row of the table

Two copies cross to the device a step, from pinned memory; the next step waits for them before it fills it again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_paged.engine.batch import StepArrays
from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.step import StepInputs

__all__ = ["StepBuffers"]


class StepBuffers:
    """Inputs of `size` decodes over tables of `width` blocks."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self.size, self.width = size, width
        self._device = device
        pinned = device.type == "cuda"
        with torch.inference_mode(False):
            self._host = [
                torch.zeros(3 * size, dtype=torch.int64, pin_memory=pinned),
                torch.zeros(size * (width + 1), dtype=torch.int32, pin_memory=pinned),
            ]
            self._static = [torch.zeros_like(part, device=device) for part in self._host]
            longs, ints = self._static
            self._ids, self._positions, self._slots = longs.view(3, size)
            self._tables = ints[: size * width].view(size, width)
            self._lengths = ints[size * width :]
            self._starts = torch.arange(size + 1, dtype=torch.int32, device=device)
            self._logits_indices = torch.arange(size, device=device)
        self._longs = self._host[0].view(3, size).numpy()
        self._host_tables = self._host[1][: size * width].view(size, width).numpy()
        self._host_lengths = self._host[1][size * width :].numpy()
        self._copied: torch.cuda.Event | None = None
        # The kernels' scratch of this step's shape lives as long as the buffers do.
        self._metadata = PagedMetadata(
            slot_mapping=self._slots,
            block_tables=self._tables,
            seq_lens=self._lengths,
            query_start_loc=self._starts,
            num_decodes=size,
            # A decode reads no number on the host. These are none of any step: one that did would show.
            query_lens_list=[1] * size,
            seq_lens_list=[0] * size,
        )

    def fill(self, arrays: StepArrays) -> None:
        """Puts a step of at most `size` decodes, none with more than `width` blocks, into the tensors."""
        if self._copied is not None:
            self._copied.synchronize()
        rows, columns = arrays.tables.shape
        self._longs[0, :rows], self._longs[0, rows:] = arrays.ids, 0
        self._longs[1, :rows], self._longs[1, rows:] = arrays.positions, 0
        self._longs[2, :rows], self._longs[2, rows:] = arrays.slots, -1
        self._host_tables[:rows, :columns] = arrays.tables
        self._host_tables[:rows, columns:] = 0
        self._host_tables[rows:] = 0
        self._host_lengths[:rows], self._host_lengths[rows:] = arrays.seq_lens, 0
        for static, host in zip(self._static, self._host, strict=True):
            static.copy_(host, non_blocking=True)
        if self._device.type == "cuda":
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    def inputs(
        self, *, owner: object, backend: str, kv_layer: Callable[[int], tuple[Tensor, Tensor]]
    ) -> StepInputs:
        """The step that was filled in, padding included: logits come for all `size` rows."""
        return StepInputs(
            owner=owner,
            input_ids=self._ids[None],
            position_ids=self._positions[None],
            logits_indices=self._logits_indices,
            metadata=self._metadata,
            backend=backend,
            kv_layer=kv_layer,
        )
