"""The KV cache's memory: it comes with use, goes back, and never moves under a tensor on a CPU."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from hf_paged.config import ConfigError
from hf_paged.engine import kv_cache as module
from hf_paged.engine.kv_cache import KVCache, LayerSpec
from hf_paged.engine.memory import available_bytes, default_kv_budget, host_limits, parse_bytes
from hf_paged.errors import KVCacheOutOfMemory

CPU = torch.device("cpu")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def make_cache(
    layers=3, block_size=4, budget_blocks=10, dtype=torch.float32, heads=2, head_dim=8, device=CPU
):
    specs = [LayerSpec(heads, head_dim, dtype, device)] * layers
    per_block = 2 * layers * block_size * heads * head_dim * dtype.itemsize
    return KVCache(specs, block_size, per_block * budget_blocks + per_block - 1)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=["mapped", "moved"])
def cache(request, monkeypatch):
    """Both ways to hold blocks; the one for other devices also works on a CPU."""
    if request.param == "moved":
        monkeypatch.setattr(
            module, "_HostPool", lambda shape, dtype, _max: module._DevicePool(shape, dtype, CPU)
        )
    return make_cache()


def fill(cache: KVCache, value: float, blocks: slice = slice(None)) -> None:
    for index in range(3):
        for tensor in cache.layer(index):
            tensor[blocks] = value + index


def test_sizes(cache):
    assert cache.bytes_per_block == 3 * 2 * 4 * 2 * 8 * 4
    assert (cache.max_blocks, cache.num_blocks, cache.held_bytes) == (10, 0, 0)
    assert cache.grow(4) == 4
    assert cache.held_bytes == 4 * cache.bytes_per_block
    k_cache, v_cache = cache.layer(2)
    assert k_cache.shape == v_cache.shape == (4, 4, 2, 8)
    assert k_cache.is_contiguous()
    assert k_cache.data_ptr() != v_cache.data_ptr()


def test_contents_stay_as_it_grows_and_shrinks(cache):
    cache.grow(3)
    fill(cache, 5.0)
    assert cache.grow(10) == 10
    fill(cache, 9.0, slice(3, None))
    cache.shrink(4)
    assert cache.num_blocks == 4
    for index in range(3):
        for tensor in cache.layer(index):
            assert torch.equal(
                tensor, torch.tensor([5.0, 5, 5, 9]).view(-1, 1, 1, 1).expand(4, 4, 2, 8) + index
            )


def test_never_grows_past_the_budget_nor_shrinks_by_grow(cache):
    assert cache.grow(99) == 10
    assert cache.grow(2) == 10
    assert cache.layer(0)[0].shape[0] == 10


def test_a_budget_below_one_block():
    cache = make_cache(budget_blocks=0)
    assert cache.max_blocks == 0
    with pytest.raises(KVCacheOutOfMemory, match="1535 bytes is less than one block of 1536 bytes"):
        cache.grow(1)


def test_a_refused_reservation_leaves_what_was_usable(cache, monkeypatch):
    cache.grow(2)
    fill(cache, 1.0)
    calls = []

    def refuse(self, num_blocks):
        calls.append(num_blocks)
        if len(calls) > 2:
            raise MemoryError("no more")
        return resize(self, num_blocks)

    pool = type(cache._pools[0][0])
    resize = pool.resize
    monkeypatch.setattr(pool, "resize", refuse)
    with pytest.raises(KVCacheOutOfMemory, match=r"2 -> 8 blocks.*no more"):
        cache.grow(8)
    assert cache.num_blocks == 2
    assert torch.equal(cache.layer(2)[1], torch.full((2, 4, 2, 8), 3.0))
    monkeypatch.undo()
    assert cache.grow(8) == 8


def test_release_and_reuse(cache):
    cache.grow(5)
    fill(cache, 3.0)
    cache.release()
    assert (cache.num_blocks, cache.held_bytes, cache.layer(0)[0].shape[0]) == (0, 0, 0)
    assert cache.grow(2) == 2
    fill(cache, 4.0)
    assert cache.layer(0)[0].mean() == 4.0


def test_a_closed_cache_refuses(cache):
    cache.grow(2)
    cache.close()
    cache.close()
    assert cache.held_bytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        cache.grow(1)


def test_generation_counts_moves():
    mapped = make_cache()
    mapped.grow(1)
    first, address = mapped.generation, mapped.layer(0)[0].data_ptr()
    mapped.grow(9)
    assert (mapped.generation, mapped.layer(0)[0].data_ptr()) == (first, address)


def test_generation_counts_moves_of_other_devices(monkeypatch):
    monkeypatch.setattr(module, "_HostPool", lambda shape, dtype, _max: module._DevicePool(shape, dtype, CPU))
    moved = make_cache()
    for expected, blocks in enumerate([1, 4, 10], start=1):
        moved.grow(blocks)
        assert moved.generation == expected
    moved.grow(10)
    assert moved.generation == 3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_copy_blocks(cache, backend):
    cache.grow(5)
    for index in range(3):
        for tensor in cache.layer(index):
            tensor.copy_(torch.arange(5.0).view(-1, 1, 1, 1).expand_as(tensor) + 10 * index)
    cache.copy_blocks([(1, 4), (4, 0)], backend)
    cache.copy_blocks([], backend)
    for index in range(3):
        for tensor in cache.layer(index):
            assert tensor[:, 0, 0, 0].tolist() == [10 * index + block for block in (4, 1, 2, 3, 1)]
    with pytest.raises(ValueError, match=r"outside of 0..4"):
        cache.copy_blocks([(0, 5)], backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_int8_blocks_have_scales(backend):
    spec = LayerSpec(2, 64, torch.int8, CPU)
    cache = KVCache([spec] * 2, 4, 10**6)
    assert cache.bytes_per_block == 2 * 2 * 4 * 2 * (64 + 4)
    cache.grow(5)
    assert cache.held_bytes == 5 * cache.bytes_per_block
    pairs = [tuple(torch.randn(2, 6, 2, 64)) for _ in range(2)]
    cache.write([1, 3], pairs)
    cache.copy_blocks([(1, 4), (3, 0)], backend)
    for index, pair in enumerate(pairs):
        for table in ([1, 3], [4, 0]):
            for read, given in zip(cache.read(index, torch.tensor(table), 6), pair, strict=True):
                assert read.dtype == torch.float32
                assert ((read - given).abs() <= given.abs().amax(-1, keepdim=True) / 253).all()
    cache.release()
    assert cache.held_bytes == 0
    assert cache.scales(1)[0].shape == (0, 4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_its_numbers(dtype):
    cache = make_cache(dtype=dtype)
    cache.grow(2)
    numbers = torch.randn(2, 4, 2, 8).to(dtype)
    cache.layer(1)[0].copy_(numbers)
    assert torch.equal(cache.layer(1)[0], numbers)


def test_made_under_inference_mode_and_written_outside(cache):
    with torch.inference_mode():
        cache.grow(2)
    cache.layer(0)[0].fill_(1.0)
    with torch.inference_mode():
        cache.layer(0)[0].fill_(2.0)
        cache.grow(4)
    cache.layer(0)[0].fill_(3.0)
    assert not cache.layer(0)[0].is_inference()


@needs_proc
def test_memory_comes_with_writing_and_goes_back():
    cache = make_cache(layers=24, block_size=16, heads=12, head_dim=64, budget_blocks=10_000)
    start = resident_bytes()
    cache.grow(1000)
    assert resident_bytes() - start < 8 * 2**20
    for index in range(24):
        for tensor in cache.layer(index):
            tensor[:20] = 1.0
    taken = resident_bytes() - start
    used = 20 * cache.bytes_per_block
    assert used * 0.9 < taken < used * 1.1 + 8 * 2**20
    cache.shrink(10)
    assert resident_bytes() - start < used * 0.6 + 8 * 2**20
    cache.release()
    assert resident_bytes() - start < 8 * 2**20


@needs_proc
def test_reserved_addresses_go_with_the_last_tensor():
    before = mapped_bytes()
    cache = make_cache(layers=2, block_size=16, heads=8, head_dim=128, budget_blocks=20_000)
    cache.grow(10)
    reserved = 2 * 2 * 16 * 8 * 128 * 4 * 20_000
    assert mapped_bytes() - before > reserved * 0.99
    tensor = cache.layer(0)[0]
    tensor.fill_(2.0)
    del cache
    gc.collect()
    assert mapped_bytes() - before < reserved * 0.26
    assert tensor.mean() == 2.0
    del tensor
    assert mapped_bytes() - before < 16 * 2**20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_copy():
    cache = make_cache()
    cache.grow(2)
    fill(cache, 1.0)
    child = os.fork()
    if child == 0:
        good = cache.layer(0)[0][0, 0, 0, 0].item() == 1.0
        cache.layer(0)[0][0, 0, 0] = 7.0
        cache.release()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.layer(0)[0].mean() == 1.0


def test_bad_arguments():
    with pytest.raises(ValueError, match="layer_specs is empty"):
        KVCache([], 16, 100)
    with pytest.raises(ValueError, match="block_size=0"):
        make_cache(block_size=0)
    with pytest.raises(ValueError, match="num_blocks=-1"):
        make_cache().shrink(-1)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path):
    write(
        tmp_path / "proc/meminfo",
        "MemTotal: 100 kB\nMemAvailable: 50 kB\nCommitLimit: 40 kB\nCommitted_AS: 10 kB\n",
    )
    write(tmp_path / "proc/sys/vm/overcommit_memory", "0\n")
    write(tmp_path / "proc/self/cgroup", "0::/user/job\n")
    return tmp_path / "proc"


def limits(proc: Path) -> list[int]:
    return [limit for limit in host_limits(proc, proc.parent / "cgroup") if limit < 2**40]


def test_available_memory(proc):
    assert limits(proc) == [50 * 1024]


def test_strict_overcommit_counts_reservations(proc):
    write(proc / "sys/vm/overcommit_memory", "2\n")
    assert 30 * 1024 in limits(proc)


def test_cgroup_v2_and_those_above(proc):
    group = proc.parent / "cgroup"
    write(group / "user/job/memory.max", "max\n")
    write(group / "user/job/memory.current", "300\n")
    write(group / "user/memory.max", "9000\n")
    write(group / "user/memory.current", "5000\n")
    write(group / "user/memory.stat", "anon 1000\ninactive_file 700\n")
    assert limits(proc) == [50 * 1024, 9000 - 5000 + 700]


def test_cgroup_v1_in_a_container(proc):
    """The path in the file is the host's; only the root of the hierarchy is there."""
    write(proc / "self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    write(proc.parent / "cgroup/memory/memory.limit_in_bytes", "8000\n")
    write(proc.parent / "cgroup/memory/memory.usage_in_bytes", "6000\n")
    assert limits(proc) == [50 * 1024, 2000]


@needs_proc
def test_ulimits_bound_the_budget(monkeypatch):
    resource = pytest.importorskip("resource")
    used = mapped_bytes()
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (used + 2**20, -1) if which == resource.RLIMIT_AS else (-1, -1)
    )
    assert available_bytes("cpu") <= 2**20
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1, 1))
    assert available_bytes("cpu") == 0
    assert default_kv_budget("cpu") == 0


def test_the_default_budget_is_half_of_what_is_available():
    assert default_kv_budget("cpu") == pytest.approx(available_bytes("cpu") / 2, rel=0.2)


def test_parse_bytes():
    assert parse_bytes("kv_cache_memory", "1.5KiB") == 1536
    assert parse_bytes("kv_cache_memory", 7) == 7
    for bad in ("", "GiB", "-1", "1 parsec", "nan", 0, True, 1.5):
        with pytest.raises(ConfigError, match="kv_cache_memory="):
            parse_bytes("kv_cache_memory", bad)
