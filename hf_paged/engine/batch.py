"""From a `StepPlan` to tensors: `build` packs the tokens of all sequences of a step without padding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.adapters import Selection
from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.step import AdapterRuns, StepInputs, StepPlan


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
    sequences, counts, num_decodes = plan.sequences, plan.num_scheduled_tokens, plan.num_decodes
    computed = np.fromiter((s.num_computed for s in sequences), np.int64, len(sequences))
    query_lens = np.asarray(counts, np.int64)
    starts = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(query_lens, out=starts[1:])
    seq_lens = computed + query_lens
    tables = _pad_tables([s.block_table for s in sequences])

    ids = np.empty(starts[-1], np.int64)
    ids[:num_decodes] = [s.token_ids[s.num_computed] for s in sequences[:num_decodes]]
    for seq, count, at in zip(
        sequences[num_decodes:], counts[num_decodes:], starts[num_decodes:], strict=False
    ):
        known = seq.token_ids[seq.num_computed : seq.num_computed + count]
        ids[at : at + len(known)] = known
        if len(known) < count:
            ids[at + len(known) : at + count] = seq.draft[: count - len(known)]
    if num_decodes == len(sequences):
        rows, positions = np.arange(num_decodes), computed
    else:
        # Position of a token = its sequence's computed tokens + its place among the new ones.
        rows = np.repeat(np.arange(len(sequences)), query_lens)
        positions = computed[rows] + np.arange(starts[-1]) - starts[rows]
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size

    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    metadata = PagedMetadata(
        slot_mapping=move(slots),
        block_tables=move(tables),
        seq_lens=move(seq_lens.astype(np.int32)),
        query_start_loc=move(starts),
        num_decodes=num_decodes,
        query_lens_list=counts,
        seq_lens_list=seq_lens.tolist(),
    )
    logits_indices = starts[1:][plan.sample_indices].astype(np.int64) - 1
    if plan.num_drafts:
        logits_indices = np.concatenate(
            [
                np.arange(last - count + 1, last + 1)
                for last, count in zip(logits_indices, plan.logits_counts, strict=True)
            ]
            or [logits_indices]
        )
    return StepInputs(
        owner=owner,
        input_ids=move(ids)[None],
        position_ids=move(positions)[None],
        logits_indices=move(logits_indices),
        metadata=metadata,
        backend=backend,
        kv_layer=kv_layer,
        adapters=_adapter_runs(plan),
    )


def _adapter_runs(plan: StepPlan) -> AdapterRuns | None:
    """Which adapters the tokens and the rows of logits run with; None where no sequence has chosen any."""
    selections = [s.adapters for s in plan.sequences]
    if all(selection is None for selection in selections):
        return None
    return AdapterRuns(
        tokens=_runs(selections, plan.num_scheduled_tokens),
        rows=_runs([selections[i] for i in plan.sample_indices], plan.logits_counts),
    )


def _runs(selections: list[Selection | None], counts: list[int]) -> list[tuple[Selection | None, int, int]]:
    """(selection, first, end) of neighbours that have the same one; `counts` places are taken by each."""
    runs: list[tuple[Selection | None, int, int]] = []
    end = 0
    for selection, count in zip(selections, counts, strict=True):
        if runs and runs[-1][0] == selection:
            runs[-1] = (selection, runs[-1][1], end + count)
        else:
            runs.append((selection, end, end + count))
        end += count
    return runs


def _pad_tables(tables: list[list[int]]) -> np.ndarray:
    """[S, longest] int32, zeros after each table's end."""
    lens = np.fromiter(map(len, tables), np.int64, len(tables))
    padded = np.zeros((len(tables), int(lens.max())), np.int32)
    padded[np.arange(padded.shape[1]) < lens[:, None]] = np.fromiter(
        chain.from_iterable(tables), np.int32, int(lens.sum())
    )
    return padded
