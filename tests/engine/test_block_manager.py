from __future__ import annotations

import pytest

from hf_paged.errors import KVCacheOutOfMemory
from tests.engine.policy import make_call, make_manager


def fill(manager, seq, num_tokens=None):
    num_tokens = seq.num_tokens if num_tokens is None else num_tokens
    copies = manager.allocate(seq, num_tokens)
    assert copies is not None
    seq.num_computed = num_tokens
    manager.commit(seq)
    return copies


def sequences(*prompts, **options):
    return [make_call(p, **options).sequences[0] for p in prompts]


def test_blocks_come_and_go():
    manager = make_manager(num_blocks=4, block_size=4, prefix_caching=False)
    (seq,) = sequences(list(range(9)))
    fill(manager, seq)
    assert (manager.num_used, manager.num_free, manager.num_cached) == (3, manager.num_blocks - 3, 0)
    manager.check_integrity([seq])
    manager.free(seq)
    assert manager.num_used == 0
    manager.check_integrity([])


def test_refuses_without_change_when_full():
    manager = make_manager(num_blocks=2, block_size=4)
    a, b = sequences([1] * 5, [2] * 5)
    fill(manager, a)
    assert manager.allocate(b, 5) is None
    assert b.block_table == []
    manager.check_integrity([a])


def test_prefix_is_found_again_but_last_token_is_left_to_compute():
    manager = make_manager(num_blocks=8, block_size=4)
    a, b, c = sequences(list(range(8)), list(range(8)), list(range(9)))
    fill(manager, a)
    manager.free(a)
    assert manager.num_cached == 2
    assert manager.attach_prefix(b)
    assert b.num_computed == 4  # the second block holds the last token
    assert manager.attach_prefix(c)
    assert c.num_computed == 8
    manager.check_integrity([b, c])


def test_other_namespace_shares_nothing():
    manager = make_manager(num_blocks=8, block_size=4)
    (a,) = sequences(list(range(9)), namespace=b"weights 1")
    (b,) = sequences(list(range(9)), namespace=b"weights 2")
    (c,) = sequences(list(range(9)), namespace=None)
    fill(manager, a)
    for seq in (b, c):
        assert manager.attach_prefix(seq)
        assert seq.num_computed == 0


def test_block_being_computed_is_waited_for():
    manager = make_manager(num_blocks=8, block_size=4)
    a, b = sequences(list(range(9)), list(range(9)))
    assert manager.attach_prefix(a)
    assert not manager.attach_prefix(b)
    assert b.block_table == []
    fill(manager, a)
    assert manager.attach_prefix(b)
    assert b.num_computed == 8


def test_waiting_ends_when_the_computing_sequence_leaves():
    manager = make_manager(num_blocks=8, block_size=4)
    a, b = sequences(list(range(9)), list(range(9)))
    assert manager.attach_prefix(a)
    manager.free(a)
    assert manager.attach_prefix(b)


def test_copy_on_write_keeps_the_other_owner():
    manager = make_manager(num_blocks=8, block_size=4)
    parent, child = sequences([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    fill(manager, parent)
    manager.fork(parent, child, 5)
    assert parent.block_table == child.block_table
    shared = parent.block_table[1]
    parent.token_ids.append(6)
    copies = fill(manager, parent)
    assert copies == [(shared, parent.block_table[1])]
    assert child.block_table[1] == shared
    child.token_ids.append(7)
    assert fill(manager, child) == []  # sole owner now
    manager.check_integrity([parent, child])


def test_least_recently_used_prefix_is_evicted_tail_first():
    manager = make_manager(num_blocks=4, block_size=4)
    a, b, c = sequences(list(range(9)), [50] * 4 + [51], list(range(9)))
    fill(manager, a)
    manager.free(a)
    fill(manager, b)  # takes the free blocks, then evicts a's later block
    manager.free(b)
    assert manager.attach_prefix(c)
    assert c.num_computed in (4, 8)
    manager.check_integrity([c])


def test_growth_that_fails_becomes_the_limit():
    def grow(wanted):
        if wanted > 16:
            raise KVCacheOutOfMemory("no room")
        return wanted

    from hf_paged.engine.block_manager import BlockManager

    manager = BlockManager(4, 1000, grow)
    (seq,) = sequences([1] * 200)
    assert manager.allocate(seq, 40) is not None
    assert manager.allocate(seq, 200) is None
    assert manager.max_blocks == manager.num_blocks
    manager.check_integrity([seq])


def test_pool_stays_near_its_peak_use():
    manager = make_manager(num_blocks=10_000, block_size=4)
    for i in range(200):
        (seq,) = sequences([i] * 39)
        fill(manager, seq)
        manager.free(seq)
    assert manager.peak_used == 10
    assert manager.num_blocks <= 2 * manager.peak_used + 16


def test_integrity_check_notices_a_lost_block():
    manager = make_manager()
    (seq,) = sequences([1] * 9)
    fill(manager, seq)
    with pytest.raises(AssertionError, match="reference counts differ"):
        manager.check_integrity([])
