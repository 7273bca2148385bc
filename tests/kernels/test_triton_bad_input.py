"""What the Triton kernels cannot take is an error before a launch: it names op, value and what is supported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_paged.kernels import triton_backend, triton_launch
from hf_paged.kernels.triton_activation import gelu, silu_mul
from hf_paged.kernels.triton_launch import Gpu, gpu_of, recording
from hf_paged.kernels.triton_layer_norm import layer_norm
from hf_paged.kernels.triton_rms_norm import rms_norm
from hf_paged.kernels.triton_sample import sample
from tests.kernels.triton_support import make_step


def attention(**changes):
    """A decode step with some of its tensors replaced, through the whole op."""
    changes = {"head_size": 16, "heads": 2, "convert": {}} | changes
    step = make_step([1], [5], num_decodes=1, heads=changes["heads"], head_size=changes["head_size"])
    tensors = {name: getattr(step, name) for name in ("query", "key", "value", "k_cache", "v_cache")}
    tensors |= {name: change(tensors[name]) for name, change in changes["convert"].items()}
    return triton_backend.paged_attention(*tensors.values(), step.metadata, scale=1.0)


def double(x):
    return x.double()


def elsewhere(x):
    return x.to("meta")


ROWS = torch.zeros(3, 8)
CACHES = ("k_cache", "v_cache")
CASES = {
    "dtype of the query": (
        lambda: attention(convert={"query": double}),
        "paged_attention: query of dtype float64; supported: float32, bfloat16, float16",
    ),
    "dtype of the cache": (
        lambda: attention(convert=dict.fromkeys(CACHES, double)),
        "store_kv: k_cache of dtype float64; supported: float32, bfloat16, float16, int8, float8_e4m3fn",
    ),
    "head size": (lambda: attention(head_size=257), "store_kv: head size 257; supported: 1 to 256"),
    "device mix": (
        lambda: attention(convert={"query": elsewhere}),
        "paged_attention: query on 'meta', others on 'cpu'; must be one device",
    ),
    "group": (
        lambda: attention(convert={"query": lambda x: x[..., :7]}),
        "paged_attention: query of 2 heads of size 7 over a cache of 1 heads of size 16; sizes must be equal",
    ),
    "rms_norm dtype": (
        lambda: rms_norm(ROWS.double(), ROWS[0].double(), 1e-5),
        "rms_norm: x of dtype float64",
    ),
    "rms_norm width": (
        lambda: rms_norm(torch.zeros(1, 32769), torch.zeros(32769), 1e-5),
        r"rms_norm: x of shape \(1, 32769\); must be \[T, C\] with C from 1 to 32768",
    ),
    "layer_norm weight": (
        lambda: layer_norm(ROWS, ROWS[0, :4], ROWS[0], 1e-5),
        "layer_norm: weight of shape",
    ),
    "silu_mul shapes": (lambda: silu_mul(ROWS, ROWS[:2]), "silu_mul: gate torch.float32"),
    "gelu form": (lambda: gelu(ROWS, "fast"), "gelu: approximate='fast'; supported: 'none' and 'tanh'"),
    "sample dtype": (
        lambda: sample(ROWS.double(), *[torch.zeros(3)] * 3),
        "sample: logits of dtype float64; supported: float32, bfloat16, float16",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_before_a_launch(case, monkeypatch):
    launches = []
    gpu = Gpu("sm_90", num_sms=132, has_fp8=True)
    call, message = CASES[case]
    with recording(lambda *launch: launches.append(launch), gpu), pytest.raises(ValueError, match=message):
        call()
    # The store is an op of its own and may have run; attention itself, or the only op, has not.
    assert [launch[0].fn.__name__ for launch in launches] in ([], ["store_kv_kernel"])


def test_fp8_is_refused_where_the_gpu_has_none():
    convert = dict.fromkeys(CACHES, lambda x: torch.zeros(x.shape, dtype=torch.float8_e4m3fn))
    gpu = Gpu("sm_80", num_sms=108, has_fp8=False)
    with recording(lambda *launch: None, gpu):
        with pytest.raises(
            ValueError, match="a float8_e4m3fn cache on sm_80; supported from sm_89, or use int8"
        ):
            attention(convert=convert)


@pytest.mark.parametrize(
    "hip, properties, message",
    [
        (None, {"major": 7, "minor": 5}, "GPU of compute capability 7.5; supported: 8.0 and newer"),
        ("6.2", {"gcnArchName": "gfx90a:sramecc+"}, "GPU generation gfx90a; supported: gfx942 and gfx950"),
    ],
)
def test_an_old_gpu_is_named(hip, properties, message, monkeypatch):
    found = SimpleNamespace(multi_processor_count=80, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    triton_launch._describe.cache_clear()
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        gpu_of("rms_norm", torch.device("cuda", 0))
    triton_launch._describe.cache_clear()
