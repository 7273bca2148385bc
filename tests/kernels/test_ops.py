"""The front door: dispatch, and errors that come before any work and say what is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_paged.kernels import ops
from tests.kernels.paged_case import make_case


def test_importing_the_front_door_imports_neither_numba_nor_triton():
    code = "import sys, hf_paged.kernels.ops; print({'numba', 'triton', 'llvmlite'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def change(**tensors):
    """A change of one or more arguments of a good call."""
    return lambda case: [setattr(case, name, make(getattr(case, name))) for name, make in tensors.items()]


@pytest.mark.parametrize(
    "spoil, options, words",
    [
        (change(query=lambda x: x[:, :3]), {}, ["3 query heads", "multiple of the 2"]),
        (change(query=lambda x: x[..., :8]), {}, ["query of shape", "expected"]),
        (change(query=lambda x: x[1:]), {}, ["query of shape"]),
        (change(query=lambda x: x.double()), {}, ["query of dtype torch.float64", "float32"]),
        (change(key=lambda x: x[:, :1]), {}, ["key of shape", "H_kv, D = (2, 16)"]),
        (change(value=lambda x: x.bfloat16()), {}, ["float32", "bfloat16", "must be equal"]),
        (change(key=lambda x: x.long(), value=lambda x: x.long()), {}, ["key of dtype torch.int64"]),
        (change(query=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), {}, ["last dimension"]),
        (change(k_cache=lambda x: x[:2]), {}, ["k_cache (2, 16, 2, 16)", "[N, B, H_kv, D]"]),
        (change(k_cache=lambda x: x.half()), {}, ["one dtype"]),
        (change(k_cache=lambda x: x.int(), v_cache=lambda x: x.int()), {}, ["k_cache of dtype torch.int32"]),
        (change(k_cache=lambda x: x.mT.contiguous().mT), {}, ["must be contiguous"]),
        (
            change(slot_mapping=lambda x: x.int()),
            {},
            ["metadata.slot_mapping of dtype torch.int32", "int64 [2]"],
        ),
        (change(slot_mapping=lambda x: x[:1]), {}, ["metadata.slot_mapping", "[2]"]),
        (
            change(block_tables=lambda x: x.long()),
            {},
            ["metadata.block_tables of dtype torch.int64", "int32"],
        ),
        (change(block_tables=lambda x: x[:1]), {}, ["metadata.block_tables", "shape (1, 4)"]),
        (change(), {"sliding_window": 0}, ["sliding_window=0", "at least 1"]),
        (change(), {"softcap": -1.0}, ["softcap=-1.0", "above 0"]),
        (change(), {"sinks": torch.zeros(3)}, ["sinks of shape (3,)"]),
        (change(), {"backend": "cuda"}, ["backend='cuda'", "'reference'"]),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(spoil, options, words):
    case = make_case([(1, 5), (1, 20)], group=2, head_size=16)
    spoil(case)
    before = case.k_cache.clone()
    with pytest.raises(ValueError, match=r"paged_attention|backend") as raised:
        case.run(**{"backend": "cpu", **options})
    for word in words:
        assert word in str(raised.value)
    assert torch.equal(case.k_cache.nan_to_num(3), before.nan_to_num(3))


def test_a_layer_unlike_the_one_before_is_checked_again():
    case = make_case([(1, 5)])
    metadata = case.metadata()
    case.run("cpu", metadata=metadata)
    case.query = case.query.double()
    with pytest.raises(ValueError, match="query of dtype"):
        case.run("cpu", metadata=metadata)


def test_triton_refuses_cpu_tensors(monkeypatch):
    pytest.importorskip("triton")
    # Before the variable goes: kernels are defined for the interpreter or not, once for all tests of the process.
    importlib.import_module("hf_paged.kernels.triton_backend")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="device cpu"):
        make_case([(1, 5)]).run("triton")


def test_resolve_backend_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.resolve_backend("cpu") == "cpu"
    assert ops.resolve_backend(torch.device("cpu"), "reference") == "reference"
    with pytest.raises(ValueError, match="backend='triton': cannot run on 'cpu'"):
        ops.resolve_backend("cpu", "triton")
    with pytest.raises(ValueError, match="backend='fast'"):
        ops.resolve_backend("cpu", "fast")
    assert ops.resolve_backend("meta") == "reference"


def test_resolve_backend_without_the_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    ops._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert ops.resolve_backend("cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.resolve_backend("cuda") == "reference"
    with pytest.raises(ValueError, match="needs the package 'triton'"):
        ops.resolve_backend("cuda", "triton")


def _angles(tokens: int, rotary: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, rotary // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("rotary", [32, 16])
def test_rotary_attention_is_upstreams_rotation_then_attention(rotary):
    case = make_case([(1, 5), (7, 20)], group=2)
    cos, sin = _angles(case.query.shape[0], rotary)
    plain = case.copy()
    for name in ("query", "key"):
        x = getattr(plain, name)
        turned, _ = apply_rotary_pos_emb(x[..., :rotary], x[..., :rotary], cos, sin)
        setattr(plain, name, torch.cat((turned, x[..., rotary:]), dim=-1))
    expected = plain.run("reference")
    tensors = (case.query, case.key, case.value, cos, sin, case.k_cache, case.v_cache, case.metadata())
    actual = ops.rotary_paged_attention(*tensors, scale=32**-0.5, backend="reference")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.k_cache, plain.k_cache, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "backend, rotary, tokens, message",
    [
        ("cpu", 32, 5, "backend='cpu'; must be 'reference' or 'triton'"),
        ("reference", 34, 5, "34 rotated elements; must be even and at most the head size 32"),
        ("reference", 32, 4, "both must be"),
    ],
)
def test_bad_rotary_arguments_are_named(backend, rotary, tokens, message):
    case = make_case([(5, 5)])
    tensors = (case.query, case.key, case.value, *_angles(tokens, rotary), case.k_cache, case.v_cache)
    with pytest.raises(ValueError, match=message):
        ops.rotary_paged_attention(*tensors, case.metadata(), scale=1.0, backend=backend)
