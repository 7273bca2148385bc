"""Checks of whole models on the Triton backend: on a GPU by `test_gpu_step.py`, on tiny models in the interpreter by
`tests/patches/test_triton_step.py`, so that what runs on the day a GPU is there has run before.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.kernels import triton_activation, triton_backend, triton_launch, triton_rms_norm  # noqa: F401
from tests.helpers import assert_same_tokens, left_pad, native_calls, random_prompts
from tests.kernels.triton_support import DEVICE

_ATTENTION = {"paged_decode_kernel", "paged_prefill_kernel"}
#: Kernels that greedy steps of a family launch.
LAUNCHED = {
    "gpt2": {"store_kv_kernel", *_ATTENTION},
    "gpt_bigcode": {"store_kv_kernel", *_ATTENTION},
    "llama": {"store_kv_rope_kernel", "rms_norm_kernel", "silu_mul_kernel", *_ATTENTION},
}


@contextlib.contextmanager
def counted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts launches by the kernel's name while it is open."""
    counts: Counter[str] = Counter()
    launch = triton_launch.launch

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counts[kernel.fn.__name__] += 1
        launch(kernel, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("hf_paged.kernels.triton_") and getattr(module, "launch", None) is launch:
                patch.setattr(module, "launch", counting)
        yield counts


def check_parity(
    monkeypatch: pytest.MonkeyPatch, family: str, model: Any, lengths: list[int], new: int
) -> None:
    """Greedy `generate` of ragged rows in float32 equals upstream's, and the family's own kernels did it."""
    batch = {name: part.to(DEVICE) for name, part in left_pad(random_prompts(lengths)).items()}
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    with counted_launches(monkeypatch) as launches, hf_paged.enabled(model, backend="triton"):
        with native_calls(model):
            assert_same_tokens(model.generate(**batch, **options), expected)
    assert set(launches) == LAUNCHED[family] | (set(launches) & {"combine_splits_kernel"})
    layers = model.config.num_hidden_layers
    assert launches["paged_decode_kernel"] == layers * (new - 1)
    assert launches["paged_prefill_kernel"] == layers
    if family == "llama":
        # Two norms a layer, the second with its sum, and one at the end, each step.
        assert launches["rms_norm_kernel"] == new * (2 * layers + 1)


def greedy(model: Any, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """New tokens of each prompt by `generate_many`, none ending before its limit."""
    results = hf_paged.generate_many(
        model, prompts, max_new_tokens=new, do_sample=False, eos_token_id=None, **options
    )
    assert all(r.finish_reason == "length" for r in results)
    return [r.token_ids for r in results]


def to_device(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    return model.to(DEVICE, dtype)
