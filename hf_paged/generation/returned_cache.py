"""`past_key_values` of a native call: a `DynamicCache` filled from the blocks when it is first looked at.

Until then the blocks stay in the pool. They go back when the cache is filled or dropped, and `fill_pending`
fills what is still open before the pool must change hands (the next call, `release_memory`, `disable`, a fork); the
engine has it filled (`Call.spill`) where a running request cannot go on without its blocks.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call

_pending: weakref.WeakKeyDictionary[PagedEngine, weakref.WeakSet[UnfilledCache]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


class UnfilledCache(DynamicCache):
    """Becomes the plain `DynamicCache` it stands for at the first access to any of its attributes.

    Args:
        empty: the cache upstream made for the call; it gives its layers and its class.
        engine: whose blocks hold keys and values.
        call: finished, made with `keep_kv` and `run_on`.
    """

    def __init__(self, empty: DynamicCache, engine: PagedEngine, call: Call) -> None:
        # The parent's __init__ would set the attributes whose absence tells that nothing is filled yet.
        self.__dict__["_source"] = (empty, engine, call)
        release = weakref.finalize(self, engine.release_kv, call)
        release.atexit = False  # the pool goes with the process
        self.__dict__["_release"] = release
        reference = weakref.ref(self)
        call.spill = lambda: None if (cache := reference()) is None else fill(cache)
        with _lock:
            _pending.setdefault(engine, weakref.WeakSet()).add(self)

    def __getattr__(self, name: str) -> Any:
        # Only reached for what the instance lacks; so do lookups of optional protocol methods, which need
        # no filling.
        if name.startswith("__"):
            raise AttributeError(name)
        fill(self)
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        fill(self)
        return self.__reduce_ex__(protocol)


def fill(cache: DynamicCache) -> None:
    """Fills `cache` if that was not done: it is a plain `DynamicCache` after."""
    with _lock:
        source = cache.__dict__.get("_source")
        if source is None:
            return
        empty, engine, call = source
        with torch.inference_mode(False), torch.no_grad():
            for layer, (keys, values) in enumerate(gather(engine, call)):
                empty.update(keys, values, layer)
        release = cache.__dict__["_release"]
        # What its user has put on it meanwhile stays.
        users = {name: value for name, value in vars(cache).items() if name not in ("_source", "_release")}
        cache.__dict__.clear()
        cache.__dict__.update(empty.__dict__ | users)
        cache.__class__ = type(empty)
        pending = _pending.get(engine)
        if pending is not None:
            pending.discard(cache)  # type: ignore[arg-type]
        release()


def fill_pending(engine: PagedEngine) -> None:
    """Fills every cache that was returned from `engine` and is still unfilled; their blocks go back."""
    with _lock:
        for cache in list(_pending.get(engine, ())):
            fill(cache)


def _fill_all() -> None:
    with _lock:
        for engine in list(_pending):
            fill_pending(engine)


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that does not exist there may hold the other one


# A forked child has no blocks: it starts from an empty pool.
os.register_at_fork(before=_fill_all, after_in_child=_unlock_in_child)


def gather(engine: PagedEngine, call: Call) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [rows, H_kv, length, D], left pads zero."""
    layers: list[tuple[Tensor, Tensor]] = []
    length = max(s.num_pad + s.num_computed for s in call.sequences)
    for sequence in call.sequences:
        for layer, pair in enumerate(engine.gather_kv(sequence)):
            if layer == len(layers):
                keys, values = (_zeros(x, len(call.sequences), length) for x in pair)
                layers.append((keys, values))
            for out, computed in zip(layers[layer], pair, strict=True):
                out[sequence.row, :, sequence.num_pad : sequence.num_pad + computed.shape[2]] = computed[0]
    return layers


def _zeros(like: Tensor, rows: int, length: int) -> Tensor:
    return like.new_zeros((rows, like.shape[1], length, like.shape[3]))
