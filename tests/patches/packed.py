"""Packed steps over a hand-made KV store: what the engine does, reduced to what the patches need."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.patches import registry
from hf_paged.patches.apply import AppliedPatch, apply
from hf_paged.step import StepInputs, active_step

BLOCK_SIZE = 4


def patch(model: torch.nn.Module) -> AppliedPatch:
    return apply(model, registry.find(model))


class PackedRun:
    """Sequences on scattered blocks of a store whose unwritten slots are NaN."""

    def __init__(
        self,
        model: torch.nn.Module,
        applied: AppliedPatch,
        sequences: Sequence[list[int]],
        backend: str = "reference",
    ) -> None:
        self.model, self.applied, self.sequences, self.backend = model, applied, sequences, backend
        self.computed = [0] * len(sequences)
        blocks_each = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
        ids = list(range(1, sum(blocks_each) + 3))
        random.Random(0).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(count)] for count in blocks_each]
        num_blocks = sum(blocks_each) + 3
        self.store = [
            tuple(
                torch.full(
                    (num_blocks, BLOCK_SIZE, layer.num_kv_heads, layer.head_dim), torch.nan, dtype=layer.dtype
                )
                for _ in range(2)
            )
            for layer in applied.layer_geometry()
        ]

    def inputs(self, scheduled: Sequence[tuple[int, int]]) -> StepInputs:
        """The step that computes `count` more tokens of each (sequence, count); decodes must come first."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for index, count in scheduled:
            start = self.computed[index]
            ids += self.sequences[index][start : start + count]
            positions += range(start, start + count)
            table = self.tables[index]
            slots += [
                table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, start + count)
            ]
        counts = [count for _, count in scheduled]
        seq_lens = [self.computed[index] + count for index, count in scheduled]
        width = max(len(self.tables[index]) for index, _ in scheduled)
        tables = [self.tables[index] + [0] * (width - len(self.tables[index])) for index, _ in scheduled]
        metadata = PagedMetadata(
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            query_start_loc=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            num_decodes=next((i for i, count in enumerate(counts) if count > 1), len(counts)),
            query_lens_list=counts,
            seq_lens_list=seq_lens,
        )
        return StepInputs(
            owner=self.applied.owner,
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            logits_indices=torch.arange(len(ids)),
            metadata=metadata,
            backend=self.backend,
            kv_layer=self.store.__getitem__,
        )

    def step(self, *scheduled: tuple[int, int]) -> list[Tensor]:
        """Runs the model on one step; one [count, V] of logits for each (sequence, count)."""
        inputs = self.inputs(scheduled)
        with active_step(inputs), torch.no_grad():
            output = self.model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                attention_mask=torch.ones(1, 1, 1, 1),
                use_cache=False,
                logits_to_keep=inputs.logits_indices,
            )
        for index, count in scheduled:
            self.computed[index] += count
        return list(output.logits[0].split([count for _, count in scheduled]))

    def all_logits(self, chunk: int = 5) -> list[Tensor]:
        """Every sequence to its end, by decodes mixed with chunks; [len, V] for each sequence."""
        logits: list[list[Tensor]] = [[] for _ in self.sequences]
        turn = 0
        while any(done < len(tokens) for done, tokens in zip(self.computed, self.sequences, strict=True)):
            scheduled = []
            for index, tokens in enumerate(self.sequences):
                left = len(tokens) - self.computed[index]
                if left:
                    scheduled.append((index, 1 if (turn + index) % 3 == 2 else min(chunk + index, left)))
            scheduled.sort(key=lambda item: item[1] > 1)
            for (index, _), rows in zip(scheduled, self.step(*scheduled), strict=True):
                logits[index].append(rows)
            turn += 1
        return [torch.cat(rows) for rows in logits]


def plain_logits(model: torch.nn.Module, sequences: Sequence[list[int]]) -> list[Tensor]:
    """Upstream's logits, one sequence at a time; [len, V] each."""
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits[0] for tokens in sequences]
