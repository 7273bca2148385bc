"""From a `StepPlan` to tensors: `build` packs the tokens of all sequences of a step without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.adapters import Selection
from hf_paged.engine.host_copy import to_device
from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.step import AdapterRuns, StepInputs, StepPlan

#: Up to this many sequences of one new token each, Python lists are quicker than numpy's two dozen calls.
_FEW = 8


@dataclass
class StepArrays:
    """The numbers of a step on the host. Shapes and dtypes are those of `PagedMetadata` and `StepInputs`."""

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    seq_lens: np.ndarray
    starts: np.ndarray
    logits_indices: np.ndarray


def build(
    plan: StepPlan,
    *,
    block_size: int,
    owner: object,
    backend: str,
    device: torch.device,
    kv_layer: Callable[[int], tuple[Tensor, Tensor]],
    kv_scales: Callable[[int], tuple[Tensor | None, Tensor | None]],
    deterministic: bool = False,
    least_cut: int | None = None,
) -> StepInputs:
    """Token ids, positions, slots and block tables of the step, on `device`.

    The arrays are filled on the host and cross to the device once each. A token that only the device knows
    (`engine.ahead`) is 0 there.

    Args:
        least_cut: how many tokens without logits make `StepInputs.tail` worth its while; None: it never is.
    """
    arrays = pack(plan, block_size)

    def move(array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array), device)

    def metadata(arrays: StepArrays, num_decodes: int, query_lens: list[int]) -> PagedMetadata:
        return PagedMetadata(
            slot_mapping=move(arrays.slots),
            block_tables=move(arrays.tables),
            seq_lens=move(arrays.seq_lens),
            query_start_loc=move(arrays.starts),
            num_decodes=num_decodes,
            query_lens_list=query_lens,
            seq_lens_list=arrays.seq_lens.tolist(),
            deterministic=deterministic,
        )

    counts = plan.logits_counts
    tail = None if least_cut is None or plan.is_plain else _tail(plan, arrays, counts, least_cut)
    return StepInputs(
        owner=owner,
        input_ids=move(arrays.ids)[None],
        position_ids=move(arrays.positions)[None],
        logits_indices=move(arrays.logits_indices),
        metadata=metadata(arrays, plan.num_decodes, plan.num_scheduled_tokens),
        backend=backend,
        kv_layer=kv_layer,
        kv_scales=kv_scales,
        adapters=None if plan.is_plain else _adapter_runs(plan),
        embeds=[] if plan.is_plain else _embeds(plan),
        tail=None if tail is None else metadata(tail, _leading_ones(counts), counts),
    )


def _leading_ones(counts: list[int]) -> int:
    return next((i for i, count in enumerate(counts) if count > 1), len(counts))


def _tail(plan: StepPlan, arrays: StepArrays, counts: list[int], least_cut: int) -> StepArrays | None:
    """What of the step gets logits, as a step of its own; None if that is not much less than all."""
    rows = arrays.logits_indices
    if len(arrays.ids) - len(rows) < max(least_cut, len(rows)):
        return None
    kept = plan.sample_indices
    starts = np.zeros(len(kept) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return StepArrays(
        ids=arrays.ids[rows],
        positions=arrays.positions[rows],
        slots=arrays.slots[rows],
        tables=arrays.tables[kept],
        seq_lens=arrays.seq_lens[kept],
        starts=starts,
        logits_indices=np.arange(len(rows)),
    )


def pack(plan: StepPlan, block_size: int) -> StepArrays:
    """The numbers of the step, packed without padding."""
    is_small = plan.num_decodes == len(plan.sequences) <= _FEW
    if is_small:
        return _few_decodes(plan, block_size)
    return (_one if len(plan.sequences) == 1 else _ragged)(plan, block_size)


def _embeds(plan: StepPlan) -> list[tuple[int, Tensor]]:
    """First place among the tokens of the step, and the rows [n, E] that stand in for the ids from there on."""
    found: list[tuple[int, Tensor]] = []
    place = 0
    for seq, count in zip(plan.sequences, plan.num_scheduled_tokens, strict=True):
        if seq.embeds is not None and seq.num_computed < seq.prompt_len:
            found.append((place, seq.embeds[seq.num_computed : seq.num_computed + count]))
        place += count
    return found


def _few_decodes(plan: StepPlan, block_size: int) -> StepArrays:
    """Of a step in which each of a few sequences has one new token: no drafts, no chunks of prompts."""
    sequences = plan.sequences
    positions = [s.num_computed for s in sequences]
    tables = [s.block_table for s in sequences]
    longest = max(map(len, tables))
    longs = [0 if s.num_ahead else s.token_ids[p] for s, p in zip(sequences, positions, strict=True)]
    longs += positions
    longs += [
        t[p // block_size] * block_size + p % block_size for t, p in zip(tables, positions, strict=True)
    ]
    count = len(sequences)
    packed = np.array(longs, np.int64).reshape(3, count)
    return StepArrays(
        ids=packed[0],
        positions=packed[1],
        slots=packed[2],
        tables=np.array([t + [0] * (longest - len(t)) for t in tables], np.int32),
        seq_lens=np.array([p + 1 for p in positions], np.int32),
        starts=np.arange(count + 1, dtype=np.int32),
        logits_indices=np.array(plan.sample_indices, np.int64),
    )


def _one(plan: StepPlan, block_size: int) -> StepArrays:
    """Of a step of one sequence."""
    seq, count = plan.sequences[0], plan.num_scheduled_tokens[0]
    first, end = seq.num_computed, seq.num_computed + count
    table = np.array([seq.block_table], np.int32)
    slots = np.array(seq.block_table, np.int64)[:, None] * block_size + np.arange(block_size)
    starts = np.array([0, count], np.int32)
    return StepArrays(
        ids=_token_ids(plan, starts),
        positions=np.arange(first, end),
        slots=slots.ravel()[first:end],
        tables=table,
        seq_lens=np.array([end], np.int32),
        starts=starts,
        logits_indices=_logits_indices(plan, starts),
    )


def _ragged(plan: StepPlan, block_size: int) -> StepArrays:
    """Of any step."""
    sequences, counts = plan.sequences, plan.num_scheduled_tokens
    computed = np.fromiter((s.num_computed for s in sequences), np.int64, len(sequences))
    query_lens = np.asarray(counts, np.int64)
    starts = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(query_lens, out=starts[1:])
    tables = _pad_tables([s.block_table for s in sequences])
    if plan.num_decodes == len(sequences):
        rows, positions = np.arange(len(sequences)), computed
    else:
        # Position of a token = its sequence's computed tokens + its place among the new ones.
        rows = np.repeat(np.arange(len(sequences)), query_lens)
        positions = computed[rows] + np.arange(starts[-1]) - starts[rows]
    slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return StepArrays(
        ids=_token_ids(plan, starts),
        positions=positions,
        slots=slots,
        tables=tables,
        seq_lens=(computed + query_lens).astype(np.int32),
        starts=starts,
        logits_indices=_logits_indices(plan, starts),
    )


def _token_ids(plan: StepPlan, starts: np.ndarray) -> np.ndarray:
    """[T] int64: the known tokens each sequence is to compute, then its drafts."""
    sequences, counts, num_decodes = plan.sequences, plan.num_scheduled_tokens, plan.num_decodes
    ids = np.empty(starts[-1], np.int64)
    ids[:num_decodes] = [0 if s.num_ahead else s.token_ids[s.num_computed] for s in sequences[:num_decodes]]
    for seq, count, at in zip(
        sequences[num_decodes:], counts[num_decodes:], starts[num_decodes:], strict=False
    ):
        known = seq.token_ids[seq.num_computed : seq.num_computed + count]
        ids[at : at + len(known)] = known
        if len(known) < count:
            ids[at + len(known) : at + count] = seq.draft[: count - len(known)]
    return ids


def _logits_indices(plan: StepPlan, starts: np.ndarray) -> np.ndarray:
    """[R] int64: the last token of each sequence in `sample_indices`, and those before it whose next is a draft."""
    last = starts[1:][plan.sample_indices].astype(np.int64) - 1
    if not plan.num_drafts:
        return last
    counts = zip(last, plan.logits_counts, strict=True)
    return np.concatenate([np.arange(i - count + 1, i + 1) for i, count in counts] or [last])


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
