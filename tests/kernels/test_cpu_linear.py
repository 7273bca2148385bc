"""Which product `cpu_linear` takes, and that a model's tokens stay the same with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged.kernels import cpu_backend, cpu_linear, cpu_row_linear, cpu_runtime

pytestmark = pytest.mark.skipif(cpu_row_linear.missing() is not None, reason=str(cpu_row_linear.missing()))


@pytest.fixture
def tiles(monkeypatch) -> list[tuple[int, int, int]]:
    """A processor on which our tiles are the faster ones: the rows, columns and size of each product they make."""
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(cpu_linear, "tiles_are_faster", lambda: True)
    monkeypatch.setattr(cpu_linear, "amx_is_faster", lambda: False)
    cpu_backend.load_kernels(torch.float32)
    cpu_linear.load_products()
    cpu_runtime.wait_for_loading()
    made: list[tuple[int, int, int]] = []
    original = cpu_row_linear.multiply

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, along: bool) -> Tensor:
        made.append((x.numel() // weight.shape[1], *weight.shape))
        return original(x, weight, bias, along)

    monkeypatch.setattr(cpu_row_linear, "multiply", counted)
    return made


def weight_of(columns: int, size: int, layout: str) -> Tensor:
    weight = torch.randn(columns, size, generator=torch.Generator().manual_seed(1)) / size**0.5
    return weight if layout == "linear" else weight.t().contiguous().t()


@pytest.mark.parametrize("layout, rows", [("linear", range(4, 33)), ("conv1d", range(2, 17))])
def test_a_few_rows_of_large_weights_go_by_tiles(tiles, layout, rows):
    weight, bias = weight_of(2048, 1024, layout), torch.randn(2048)
    for count in (1, rows.start - 1, rows.start, rows.stop - 1, rows.stop, 100):
        x = torch.randn(1, count, 1024)
        tiles.clear()
        output = cpu_linear.linear(x, weight, bias)
        assert (output is not None) == bool(tiles) == (count in rows)
        if output is not None:
            assert torch.allclose(output, F.linear(x, weight, bias), atol=1e-5)


def test_small_weights_and_other_layouts_and_dtypes_do_not(tiles):
    x = torch.randn(1, 16, 256)
    assert cpu_linear.least_input(weight_of(256, 256, "linear")) is None
    assert cpu_linear.linear(x, weight_of(256, 256, "linear"), None) is None
    wide = weight_of(16384, 256, "linear")
    assert cpu_linear.linear(x.bfloat16(), wide.bfloat16(), None) is None
    assert cpu_linear.linear(x.transpose(0, 1).expand(16, 4, 256), wide, None) is None  # not contiguous
    assert cpu_linear.linear(x, wide, None) is not None


def test_until_they_are_compiled_the_library_serves(tiles, monkeypatch):
    monkeypatch.setattr(cpu_linear, "_tiles_are_ready", cpu_linear.threading.Event())
    assert cpu_linear.linear(torch.randn(1, 16, 256), weight_of(16384, 256, "linear"), None) is None


@pytest.mark.parametrize(
    "vendor, onednn, by_tiles",
    [("GenuineIntel", False, True), ("AuthenticAMD", True, False), (None, False, False)],
)
def test_the_processors_maker_decides(tmp_path, monkeypatch, vendor, onednn, by_tiles):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_linear, "_op_works", lambda: True)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("" if vendor is None else f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert cpu_linear.onednn_is_faster.__wrapped__(cpuinfo) is (
        onednn and torch.backends.mkldnn.is_available()
    )
    assert cpu_linear.tiles_are_faster.__wrapped__(cpuinfo) is by_tiles
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu_linear.onednn_is_faster.__wrapped__(cpuinfo)
    assert not cpu_linear.tiles_are_faster.__wrapped__(cpuinfo)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=2500, n_embd=768, n_layer=1, n_head=12, n_positions=64))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2500, hidden_size=768, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=12
    )
    return LlamaForCausalLM(config)


def assert_native_tokens_are_equal(model: GPT2LMHeadModel | LlamaForCausalLM, rows: int) -> None:
    """Of a batch of prompts of 9 tokens, by 12 greedy steps."""
    ids = torch.randint(3, 2500, (rows, 9))
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected = model.generate(ids, **options)
    with hf_paged.enabled(model):
        actual = model.generate(ids, **options)
        assert hf_paged.stats(model).native_calls == 1
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family, products", [(gpt2, 3 + 1), (llama, 3 + 1)])
def test_a_model_gives_the_same_tokens(tiles, family, products):
    torch.manual_seed(0)
    assert_native_tokens_are_equal(family().eval(), 8)
    by_step = [made for made in tiles if made[0] == 8]
    assert len(by_step) >= 11 * products
