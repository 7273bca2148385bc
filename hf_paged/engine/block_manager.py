"""Which block holds what: reference counts, copy-on-write, the prefix cache and its eviction.

Pure bookkeeping over block numbers: no tensors, no model. The invariant, checked by `check_integrity`:

    free + cached + used = total

    free    never written, or dropped
    cached  full, without an owner, found by its key, evictable
    used    referenced by at least one sequence

Keys of full blocks are sha256 over (key of the block before, its tokens); the first block's parent is the call's
namespace (adapter, weights version, salt). A key that two sequences need at once is computed by one and waited
for by the other.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable

from hf_paged.engine.request import Sequence
from hf_paged.errors import KVCacheOutOfMemory


class BlockManager:
    """Hands out blocks of `block_size` tokens to sequences.

    Args:
        block_size: tokens a block holds.
        max_blocks: most blocks there may ever be.
        grow: asks the pool for more: `grow(wanted_total) -> usable_total`; may return less than wanted, or raise
            `KVCacheOutOfMemory`, after which the manager stops growing.
        prefix_caching: keep full blocks of finished sequences for reuse.
        slack_blocks: the pool may grow to twice the peak in use plus this before unowned cached blocks are evicted.
    """

    def __init__(
        self,
        block_size: int,
        max_blocks: int,
        grow: Callable[[int], int],
        *,
        prefix_caching: bool = True,
        slack_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.prefix_caching = prefix_caching
        self.slack_blocks = slack_blocks
        self._grow = grow
        self._ref: list[int] = []
        self._key: list[bytes | None] = []
        self._free: list[int] = []  # heap: low numbers first keep the touched part of the pool compact
        self._cached: OrderedDict[int, None] = (
            OrderedDict()
        )  # unowned keyed blocks, least recently used first
        self._by_key: dict[bytes, int] = {}
        self._computing: dict[bytes, Sequence] = {}
        self.peak_used = 0

    # --- counts -----------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return len(self._ref)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._ref) - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that could be handed out now, by growth and eviction too."""
        return self.max_blocks - self.num_used

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # --- allocation -------------------------------------------------------------------------------------------------

    def allocate(self, seq: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Gives `seq` room to compute up to `num_tokens` tokens.

        Returns:
            Block copies (source, destination) to make before writing, because the block to be written is shared; or
            None, with nothing changed, when there is no room.
        """
        table = seq.block_table
        first_written = seq.num_computed // self.block_size
        shared = first_written < len(table) and self._ref[table[first_written]] > 1
        missing = self.blocks_for(num_tokens) - len(table)
        needed = max(missing, 0) + shared
        if needed == 0:
            return []
        if needed > self.num_available or not self._reserve(needed):
            return None
        copies = []
        if shared:
            old, new = table[first_written], self._take()
            self._ref[old] -= 1
            table[first_written] = new
            copies.append((old, new))
        for _ in range(missing):
            table.append(self._take())
        self.peak_used = max(self.peak_used, self.num_used)
        return copies

    def without_place(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those of `sequences` whose next token has no place in a block of their own: `allocate` has to make one."""
        size, ref = self.block_size, self._ref
        return [
            s
            for s in sequences
            if s.num_computed >= size * len(s.block_table) or ref[s.block_table[s.num_computed // size]] > 1
        ]

    def _reserve(self, count: int) -> bool:
        """Makes `count` blocks takeable: by growth while the pool is small beside its use, else by eviction."""
        short = count - len(self._free)
        if short <= 0:
            return True
        wanted_use = max(self.peak_used, self.num_used + count)
        if self.num_blocks < min(self.max_blocks, 2 * wanted_use + self.slack_blocks):
            self._grow_by(max(short, self.num_blocks // 8, 16), 2 * wanted_use + self.slack_blocks)
        while len(self._free) < count and self._cached:
            self._evict()
        if len(self._free) < count:
            self._grow_by(count - len(self._free), self.max_blocks)
        return len(self._free) >= count

    def _grow_by(self, count: int, limit: int) -> None:
        wanted = min(self.num_blocks + count, limit, self.max_blocks)
        if wanted <= self.num_blocks:
            return
        total = self._grow_to(wanted)
        if total < wanted:
            self.max_blocks = total
        for block in range(self.num_blocks, total):
            self._ref.append(0)
            self._key.append(None)
            heapq.heappush(self._free, block)

    def _grow_to(self, wanted: int) -> int:
        """Grows by as much as can be had, down to a single block. Returns the blocks there are."""
        while wanted > self.num_blocks:
            try:
                return self._grow(wanted)
            except KVCacheOutOfMemory:
                wanted = self.num_blocks + (wanted - self.num_blocks) // 2
        return self.num_blocks

    def _take(self) -> int:
        block = heapq.heappop(self._free)
        self._ref[block] = 1
        return block

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        heapq.heappush(self._free, block)

    def _forget(self, block: int) -> None:
        key = self._key[block]
        self._key[block] = None
        if key is not None:
            del self._by_key[key]

    def free(self, seq: Sequence) -> None:
        """Takes all blocks back; keyed ones stay findable. Later blocks are evicted before the ones they build on."""
        self._stop_computing(seq)
        for block in reversed(seq.block_table):
            self._ref[block] -= 1
            if self._ref[block] == 0:
                if self._key[block] is not None:
                    self._cached[block] = None
                else:
                    heapq.heappush(self._free, block)
        seq.block_table = []
        seq.block_keys = []
        seq.num_computed = 0

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Lets `child` share the blocks of the first `num_tokens` computed tokens of `parent`."""
        blocks = parent.block_table[: self.blocks_for(num_tokens)]
        for block in blocks:
            self._ref[block] += 1
        child.block_table = list(blocks)
        child.block_keys = parent.block_keys[: num_tokens // self.block_size]
        child.num_computed = num_tokens

    def reassign(self, sequences: list[Sequence], sources: list[int]) -> None:
        """Gives `sequences[i]` what `sequences[sources[i]]` has computed, all at once; what nobody takes goes back."""
        had = [(s.block_table, s.block_keys, s.num_computed) for s in sequences]
        uses = [0] * len(sequences)
        for source in sources:
            uses[source] += 1
        for (table, _, _), count in zip(had, uses, strict=True):
            if count > 1:
                for block in table:
                    self._ref[block] += count - 1
        for seq, count in zip(sequences, uses, strict=True):
            if not count:
                self.free(seq)
        taken = [False] * len(sequences)
        for seq, source in zip(sequences, sources, strict=True):
            table, keys, computed = had[source]
            # One taker keeps the lists themselves, the others get copies.
            seq.block_table = list(table) if taken[source] else table
            seq.block_keys = list(keys) if taken[source] else keys
            seq.num_computed = computed
            taken[source] = True

    # --- prefix cache -----------------------------------------------------------------------------------------------

    def attach_prefix(self, seq: Sequence) -> bool:
        """Gives a sequence without blocks the cached blocks of its longest known prefix.

        At least the last token stays to be computed, since its logits are needed.

        Returns:
            False, with nothing changed, when another running sequence is just computing the next block: wait for it.
        """
        namespace = seq.prefix_namespace
        if not self.prefix_caching or namespace is None:
            return True
        num_full = (seq.num_tokens - 1) // self.block_size
        keys = list(self._keys(namespace, seq.token_ids, num_full))
        hits = 0
        while hits < num_full and keys[hits] in self._by_key:
            hits += 1
        if hits < num_full and self._computing.get(keys[hits], seq) is not seq:
            return False
        for key in keys[:hits]:
            block = self._by_key[key]
            if self._ref[block] == 0:
                del self._cached[block]
            self._ref[block] += 1
            seq.block_table.append(block)
        seq.block_keys = keys[:hits]
        seq.num_computed = hits * self.block_size
        for key in keys[hits:]:
            self._computing.setdefault(key, seq)
        self.peak_used = max(self.peak_used, self.num_used)
        return True

    def commit_filled(self, sequences: Iterable[Sequence]) -> None:
        """`commit` for those of `sequences` that still run and have filled another block."""
        size = self.block_size
        for seq in sequences:
            if seq.num_computed // size > len(seq.block_keys) and seq.block_table:
                self.commit(seq)

    def commit(self, seq: Sequence) -> None:
        """Registers the keys of blocks that `seq.num_computed` has newly filled."""
        namespace = seq.prefix_namespace
        num_full = seq.num_computed // self.block_size
        if num_full <= len(seq.block_keys) or not self.prefix_caching or namespace is None:
            return
        first = len(seq.block_keys)
        parent = seq.block_keys[-1] if first else namespace
        for i in range(first, num_full):
            tokens = seq.token_ids[i * self.block_size : (i + 1) * self.block_size]
            parent = _block_key(parent, tokens)
            seq.block_keys.append(parent)
            if self._computing.get(parent) is seq:
                del self._computing[parent]
            block = seq.block_table[i]
            # Two sequences may have computed equal blocks: the first stays the one that is found.
            if parent not in self._by_key and self._key[block] is None:
                self._by_key[parent] = block
                self._key[block] = parent

    def drop_cached(self) -> None:
        """Forgets every prefix; blocks in use stay with their owners but are not found any more."""
        while self._cached:
            self._evict()
        for block in list(self._by_key.values()):
            self._forget(block)
        self._computing.clear()

    def trim(self) -> int:
        """Drops free blocks at the end of the pool. Returns the number of blocks left."""
        last = self.num_blocks - 1
        while last >= 0 and not self._ref[last] and self._key[last] is None:
            last -= 1
        self._free = [b for b in self._free if b <= last]
        heapq.heapify(self._free)
        del self._ref[last + 1 :], self._key[last + 1 :]
        return self.num_blocks

    def _keys(self, namespace: bytes, tokens: list[int], count: int) -> Iterable[bytes]:
        key = namespace
        for i in range(count):
            key = _block_key(key, tokens[i * self.block_size : (i + 1) * self.block_size])
            yield key

    def _stop_computing(self, seq: Sequence) -> None:
        if self._computing:
            for key in [k for k, owner in self._computing.items() if owner is seq]:
                del self._computing[key]

    # --- integrity --------------------------------------------------------------------------------------------------

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError unless counts, tables and keys agree with `sequences`, all those that hold blocks."""
        expected = [0] * self.num_blocks
        for seq in sequences:
            for block in seq.block_table:
                expected[block] += 1
        problems = []
        if expected != self._ref:
            wrong = [
                (b, self._ref[b], expected[b]) for b in range(self.num_blocks) if expected[b] != self._ref[b]
            ]
            problems.append(f"reference counts differ (block, count, owners): {wrong[:8]}")
        free = set(self._free)
        if len(free) != len(self._free):
            problems.append("a block is free twice")
        if free & self._cached.keys():
            problems.append("a block is both free and cached")
        if any(self._ref[b] for b in free) or any(self._ref[b] for b in self._cached):
            problems.append("an unowned block has references")
        used = sum(1 for r in self._ref if r)
        if len(free) + len(self._cached) + used != self.num_blocks:
            problems.append(
                f"free {len(free)} + cached {len(self._cached)} + used {used} != total {self.num_blocks}"
            )
        if any(self._key[block] != key for key, block in self._by_key.items()):
            problems.append("a key leads to a block of another key")
        if sum(k is not None for k in self._key) != len(self._by_key):
            problems.append("a keyed block cannot be found")
        if problems:
            raise AssertionError("block manager: " + "; ".join(problems))


def _block_key(parent: bytes, tokens: list[int]) -> bytes:
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()
