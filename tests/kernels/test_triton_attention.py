"""Triton's paged attention against the reference: every border of blocks, tiles and splits, nothing unwritten read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_paged.kernels import ops, triton_backend
from tests.kernels.triton_support import (
    DEVICE,
    Step,
    assert_near,
    exact_attention,
    make_step,
    poison_new_tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SCALE = 0.25
#: In the interpreter a tile is 16 keys, a split 32, and past 256 keys (8 splits) splits double.
BORDERS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129]
VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 20},
    "window-of-one": {"sliding_window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 33, "softcap": 4.0, "sinks": True},
}
#: One by one in `make test-full`; together, and none, always.
EACH_VARIANT = [
    name if name in ("plain", "all") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS
]


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch):
    poison_new_tensors(monkeypatch)


def options_of(variant: str, heads: int) -> dict:
    options = {"scale": SCALE, **VARIANTS[variant]}
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1.0, 2.0, heads, device=DEVICE)
    return options


def run(step: Step, **options) -> torch.Tensor:
    caches = step.k_cache.clone(), step.v_cache.clone()
    return triton_backend.paged_attention(step.query, step.key, step.value, *caches, step.metadata, **options)


def check(step: Step, **options) -> None:
    assert_near(run(step, **options), exact_attention(step, **options), step.query.dtype)


def decode_step(lengths: list[int], **shape) -> Step:
    return make_step([1] * len(lengths), lengths, num_decodes=len(lengths), **shape)


@pytest.mark.parametrize("variant", EACH_VARIANT)
def test_decode_matches_the_reference_at_every_border(variant):
    check(decode_step(BORDERS, heads=4, kv_heads=2), **options_of(variant, 4))


@pytest.mark.parametrize("variant", EACH_VARIANT)
def test_prefill_matches_the_reference_at_every_border(variant):
    """Prompts without a cached part, chunks with one, and lone tokens, over all borders of tiles."""
    query_lens = [1, 15, 16, 17, 33, 5, 16, 1, 9]
    contexts = [0, 0, 0, 0, 0, 11, 16, 47, 40]
    seq_lens = [new + old for new, old in zip(query_lens, contexts, strict=True)]
    check(make_step(query_lens, seq_lens, heads=4, kv_heads=2), **options_of(variant, 4))


def test_splits_double_where_a_sequence_has_more_chunks_than_the_launch():
    check(decode_step([255, 256, 257, 513], heads=1, head_size=8), scale=SCALE)


def test_mixed_step_with_padding_and_shared_blocks():
    """Decodes, rows padded for a captured batch, and prefills in one step, over blocks of one prefix."""
    step = make_step(
        [1, 1, 1, 1, 18, 40], [50, 33, 0, 0, 50, 40], num_decodes=4, shared_blocks=2, block_size=8
    )
    output = run(step, scale=SCALE)
    assert_near(output, exact_attention(step, scale=SCALE), torch.float32)
    assert (output[2:4] == 0).all()


def test_padding_rows_are_zero_with_sinks_and_window_too():
    step = decode_step([0, 40, 0], heads=2)
    check(step, scale=SCALE, sinks=torch.ones(2, device=DEVICE), sliding_window=3)


def test_padded_runs_of_tokens_are_zero():
    step = make_step([3, 20, 2], [0, 25, 0])
    output = run(step, scale=SCALE)
    assert_near(output, exact_attention(step, scale=SCALE), torch.float32)
    assert (output[[0, 1, 2, 23, 24]] == 0).all()


def test_tokens_of_no_sequence_come_out_zero():
    step = make_step([4], [4])
    metadata = dataclasses.replace(step.metadata, query_lens_list=[3], seq_lens_list=[3])
    metadata.seq_lens.fill_(3)
    metadata.query_start_loc.copy_(torch.tensor([0, 3]))
    metadata.slot_mapping[3] = -1
    output = run(dataclasses.replace(step, metadata=metadata), scale=SCALE)
    assert output.isfinite().all()
    assert (output[3] == 0).all()


@pytest.mark.parametrize(
    "heads, kv_heads, head_size, block_size, dtype",
    [
        (1, 1, 8, 8, torch.float32),
        (3, 3, 32, 16, torch.float16),
        (6, 2, 80, 32, torch.float32),
        (7, 1, 24, 64, torch.float16),
        (48, 1, 16, 16, torch.float16),
        (20, 1, 64, 128, torch.float32),
        (2, 1, 256, 16, torch.float16),
    ],
)
def test_shapes_of_heads_and_blocks(heads, kv_heads, head_size, block_size, dtype):
    shape = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "block_size": block_size,
        "dtype": dtype,
    }
    step = make_step([1, 1, 3, 17], [1, 70, 35, 17], num_decodes=2, **shape)
    check(step, scale=head_size**-0.5)


def test_cache_of_another_float_dtype_than_the_queries():
    step = make_step([1, 5], [40, 20], num_decodes=1)
    step = dataclasses.replace(step, k_cache=step.k_cache.half(), v_cache=step.v_cache.half())
    expected = exact_attention(step, scale=SCALE)
    assert_near(run(step, scale=SCALE), expected, torch.float16)


def test_bfloat16_is_multiplied_in_float32_by_the_interpreter():
    step = make_step([1, 5], [40, 20], num_decodes=1, dtype=torch.bfloat16)
    check(step, scale=SCALE)


@pytest.mark.parametrize("max_splits", [1, 2, 12])
def test_any_bound_on_splits_gives_the_same_answer(max_splits):
    step = decode_step([1, 33, 100, 129], heads=4, kv_heads=2)
    step.metadata.plan["max_splits"] = max_splits
    options = {"scale": SCALE, "sinks": torch.ones(4, device=DEVICE), "sliding_window": 70}
    check(step, **options)


def test_decode_does_not_depend_on_the_batch_around_a_row():
    """Bitwise, given fixed bounds on splits: alone, among others, in another order."""
    bounds = {"max_splits": 8, "split_chunk": 32}
    together = decode_step([100, 7, 65, 33])
    together.metadata.plan.update(bounds)
    expected = run(together, scale=SCALE)
    for rows in ([2], [3, 2, 0]):
        metadata = dataclasses.replace(
            together.metadata,
            slot_mapping=together.metadata.slot_mapping[rows],
            block_tables=together.metadata.block_tables[rows],
            seq_lens=together.metadata.seq_lens[rows],
            query_start_loc=together.metadata.query_start_loc[: len(rows) + 1],
            num_decodes=len(rows),
            query_lens_list=[1] * len(rows),
            seq_lens_list=[together.metadata.seq_lens_list[row] for row in rows],
            plan=dict(bounds),
        )
        qkv = {name: getattr(together, name)[rows] for name in ("query", "key", "value")}
        assert torch.equal(
            run(dataclasses.replace(together, metadata=metadata, **qkv), scale=SCALE), expected[rows]
        )


def test_decode_reads_lengths_from_the_device_only():
    """What a CUDA graph needs: the same launch over changed lengths and tables, stale numbers on the host."""
    step = decode_step([40, 100, 64, 1], heads=2)
    other = decode_step([3, 100, 0, 97], heads=2, seed=5)
    metadata = dataclasses.replace(
        other.metadata, seq_lens_list=step.metadata.seq_lens_list, plan=step.metadata.plan
    )
    run(step, scale=SCALE)
    actual = run(dataclasses.replace(other, metadata=metadata), scale=SCALE)
    assert_near(actual, exact_attention(other, scale=SCALE), torch.float32)


def test_a_prompt_in_chunks_equals_the_prompt_in_one_piece():
    whole = make_step([50], [50])
    expected = run(whole, scale=SCALE)
    k_cache, v_cache, start = whole.k_cache.clone(), whole.v_cache.clone(), 0
    for chunk in (7, 16, 20, 7):
        rows = slice(start, start + chunk)
        start += chunk
        metadata = dataclasses.replace(
            whole.metadata,
            slot_mapping=whole.metadata.slot_mapping[rows],
            seq_lens=torch.tensor([start], dtype=torch.int32, device=DEVICE),
            query_start_loc=torch.tensor([0, chunk], dtype=torch.int32, device=DEVICE),
            query_lens_list=[chunk],
            seq_lens_list=[start],
            plan={},
        )
        qkv = whole.query[rows], whole.key[rows], whole.value[rows]
        actual = triton_backend.paged_attention(*qkv, k_cache, v_cache, metadata, scale=SCALE)
        torch.testing.assert_close(actual, expected[rows], atol=1e-6, rtol=1e-6)


def test_the_front_door_leads_here():
    step = make_step([1, 5], [20, 9], num_decodes=1, heads=4, kv_heads=2)
    expected = exact_attention(step, scale=SCALE)
    arguments = step.query, step.key, step.value, step.k_cache, step.v_cache, step.metadata
    assert_near(ops.paged_attention(*arguments, scale=SCALE, backend="triton"), expected, torch.float32)


def test_layers_of_one_step_share_the_plan():
    step = make_step([1, 9], [50, 9], num_decodes=1)
    run(step, scale=SCALE)
    made = {
        key: value
        for key, value in step.metadata.plan.items()
        if key.startswith(("triton.decode", "triton.prefill"))
    }
    assert len(made) == 2
    run(step, scale=SCALE)
    assert all(step.metadata.plan[key] is value for key, value in made.items())


def test_offsets_past_two_to_the_31_elements():
    """The cache is address space of which two blocks are touched."""
    shape = (2**31 // (16 * 16) + 8, 16, 1, 16)
    needed = 4 * shape[0] * 16 * 16
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 2 * needed:
        pytest.skip("needs 8 GiB of GPU memory")
    step = decode_step([20], heads=1, dtype=torch.float16)
    far = torch.tensor([[shape[0] - 3, shape[0] - 1]], dtype=torch.int32, device=DEVICE)
    k_cache, v_cache = (
        torch.empty_strided(shape, (256, 16, 16, 1), dtype=torch.float16, device=DEVICE) for _ in "kv"
    )
    for cache, near in ((k_cache, step.k_cache), (v_cache, step.v_cache)):
        cache[far[0].long()] = near[step.metadata.block_tables[0].long()]
    slots = far[0, 1].long().reshape(1) * 16 + 3
    expected = exact_attention(step, scale=SCALE)
    metadata = dataclasses.replace(step.metadata, block_tables=far, slot_mapping=slots)
    actual = triton_backend.paged_attention(
        step.query, step.key, step.value, k_cache, v_cache, metadata, scale=SCALE
    )
    assert_near(actual, expected, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [8, 48, 128])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (48, 1)])
@pytest.mark.parametrize("head_size", [32, 96, 128])
@pytest.mark.parametrize("dtype, variant", [(torch.float32, "all"), (torch.float16, "plain")])
def test_full_grid(block_size, heads, kv_heads, head_size, dtype, variant):
    shape = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "block_size": block_size,
        "dtype": dtype,
    }
    query_lens = [1] * len(BORDERS) + [1, 15, 17, 33, 6]
    seq_lens = [*BORDERS, 1, 15, 40, 33, 70]
    step = make_step(query_lens, seq_lens, num_decodes=len(BORDERS), shared_blocks=1, **shape)
    check(step, **options_of(variant, heads))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_steps(seed):
    """Random lengths, heads, blocks and options, from the seed alone."""
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    def upto(bound):
        return 1 + int(torch.randint(bound, (), generator=rng))

    num_decodes, num_prefills = upto(4), upto(3)
    query_lens = [1] * num_decodes + [upto(40) for _ in range(num_prefills)]
    seq_lens = [new + pick(0, upto(80), 16 * upto(5)) for new in query_lens]
    heads, kv_heads = pick((1, 1), (4, 2), (6, 1), (5, 5))
    step = make_step(
        *(query_lens, seq_lens),
        **{"num_decodes": num_decodes, "heads": heads, "kv_heads": kv_heads, "shared_blocks": pick(0, 2)},
        **{"head_size": pick(16, 40, 64), "block_size": pick(8, 16, 20), "seed": seed},
    )
    check(step, **options_of(pick(*VARIANTS), heads))
