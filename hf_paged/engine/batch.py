"""From a `StepPlan` to tensors: `build` packs the tokens of all sequences of a step without padding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.step import StepInputs, StepPlan


def build(
    plan: StepPlan,
    *,
    block_size: int,
    owner: object,
    backend: str,
    device: torch.device,
    kv_layer: Callable[[int], tuple[Tensor, Tensor]],
) -> StepInputs:
    """Token ids, positions, slots and block tables of the step, on `device`.

    The arrays are filled on the host in numpy and cross to the device once each.
    """
    num_tokens, num_seqs = plan.num_tokens, len(plan.sequences)
    ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slots = np.empty(num_tokens, np.int64)
    starts = np.zeros(num_seqs + 1, np.int32)
    np.cumsum(plan.num_scheduled_tokens, out=starts[1:])
    tables = np.zeros((num_seqs, max(len(s.block_table) for s in plan.sequences)), np.int32)
    seq_lens = []
    for i, (seq, count) in enumerate(zip(plan.sequences, plan.num_scheduled_tokens, strict=True)):
        table, start = seq.block_table, seq.num_computed
        tables[i, : len(table)] = table
        seq_lens.append(start + count)
        at = starts[i]
        if count == 1:
            ids[at] = seq.token_ids[start]
            positions[at] = start
            slots[at] = table[start // block_size] * block_size + start % block_size
        else:
            span = np.arange(start, start + count)
            ids[at : at + count] = seq.token_ids[start : start + count]
            positions[at : at + count] = span
            slots[at : at + count] = tables[i, span // block_size].astype(np.int64) * block_size + span % block_size

    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    metadata = PagedMetadata(
        slot_mapping=move(slots),
        block_tables=move(tables),
        seq_lens=move(np.asarray(seq_lens, np.int32)),
        query_start_loc=move(starts),
        num_decodes=plan.num_decodes,
        query_lens_list=plan.num_scheduled_tokens,
        seq_lens_list=seq_lens,
    )
    return StepInputs(
        owner=owner,
        input_ids=move(ids)[None],
        position_ids=move(positions)[None],
        logits_indices=move(starts[1:][plan.sample_indices].astype(np.int64) - 1),
        metadata=metadata,
        backend=backend,
        kv_layer=kv_layer,
    )
