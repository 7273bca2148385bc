"""Rows of a table of angles: upstream's bits, and never those of other frequencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.patches.rotary import RotaryTable

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def rotary(kind: str = "default", head_dim: int = 24) -> Any:
    options = {"rope_type": kind, "rope_theta": 10000.0, **ROPES.get(kind, {"factor": 4.0})}
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=256)
    config.rope_parameters = options
    return LlamaRotaryEmbedding(config)


class Step:
    """Of a `StepInputs` what the table looks at."""

    def __init__(self, seq_lens: list[int]) -> None:
        starts = list(range(len(seq_lens) + 1))
        self.metadata = PagedMetadata(
            slot_mapping=torch.arange(len(seq_lens)),
            block_tables=torch.zeros(len(seq_lens), 1, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            num_decodes=len(seq_lens),
            query_lens_list=[1] * len(seq_lens),
            seq_lens_list=seq_lens,
        )
        self.positions = torch.tensor([[length - 1 for length in seq_lens]])


def check(table: RotaryTable, module: Any, seq_lens: list[int], dtype: torch.dtype = torch.float32) -> None:
    step, x = Step(seq_lens), torch.empty(1, len(seq_lens), 48, dtype=dtype)
    found, wanted = table(module, step, x, position_ids=step.positions), module(x, step.positions)
    assert found is not None
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype is dtype
        assert a.is_contiguous()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ROPES)
def test_rows_are_upstreams_bits(kind: str, dtype: torch.dtype) -> None:
    table, module = RotaryTable(), rotary(kind)
    for seq_lens in ([1], [7, 256, 3], [257], [5000, 2], list(range(1, 90))):
        check(table, module, seq_lens, dtype)


def test_other_frequencies_scaling_or_dtypes_are_noticed() -> None:
    table, module = RotaryTable(), rotary()
    check(table, module, [3, 9])
    module.inv_freq.mul_(0.5)
    check(table, module, [3, 9])
    module.inv_freq.data[1] = 0.25
    check(table, module, [3, 9])
    module.attention_scaling = 1.5
    check(table, module, [3, 9])
    module.half()
    check(table, module, [3, 9])
    check(table, module, [3, 9], torch.bfloat16)
    module.inv_freq = torch.rand(12)
    check(table, module, [3, 9])


def test_under_settings_of_the_users() -> None:
    table, module = RotaryTable(), rotary()
    torch.set_default_dtype(torch.float64)  # noqa: TID251 - what a user may do
    try:
        with torch.device("meta"):
            step, x = Step([3]), torch.empty(1, 1, 48, dtype=torch.float32, device="cpu")
            step.positions = torch.tensor([[2]], device="cpu")
            found = table(module, step, x, position_ids=step.positions)
    finally:
        torch.set_default_dtype(torch.float32)  # noqa: TID251
    assert found is not None
    assert torch.equal(found[0], module(x, step.positions)[0])
    with torch.inference_mode():
        check(table, module, [2000])
    check(table, module, [1999])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_length_are_not_looked_up(kind: str) -> None:
    module = rotary()
    module.rope_type = kind
    step = Step([4])
    assert RotaryTable()(module, step, torch.empty(1, 1, 48), position_ids=step.positions) is None
