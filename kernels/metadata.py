"""What every attention layer of one step shares: where new tokens go and what they may read.

Built once a step by `hf_paged.engine.batch`, read once a layer by the ops in `hf_paged.kernels.ops`.
Knows no model, no request and no family: only ragged queries over tables of KV blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PagedMetadata:
    """The ragged shape of one step of S sequences with T new tokens in all.

    Sequences come in two runs: first `num_decodes` sequences with exactly one new token each, then those with
    any number (chunks of prompts). So tokens `[0, num_decodes)` are the decode queries.

        tokens of one sequence   | cached .......................... | new in this step |
                                 0                     seq_len - query_len          seq_len

    A new token at absolute position p sees keys 0..p. All keys, the new ones too, are read from the cache or, where a
    backend prefers it for sequences with no cached part, from the fresh keys of this step: the two are the
    same numbers.
    """

    slot_mapping: Tensor  # [T] int64: slot = block * block_size + offset of each new token; -1 stores nothing
    block_tables: Tensor  # [S, M] int32: physical block of each logical block; unused entries are 0
    seq_lens: Tensor  # [S] int32: tokens of each sequence including those of this step
    query_start_loc: Tensor  # [S + 1] int32: prefix sum of the numbers of new tokens
    num_decodes: int  # leading sequences with exactly one new token
    query_lens_list: list[
        int
    ]  # [S] host copy, for backends that loop on the host; never baked into a CUDA graph
    seq_lens_list: list[int]  # [S] host copy
    #: A token's output must not depend, in a single bit, on what else is in the step or how long its query is.
    deterministic: bool = False
    #: Scratch a backend computes once a step and reuses in every layer, keyed by the backend's own names.
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_list)
