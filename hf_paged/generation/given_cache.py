"""A `DynamicCache` given to `generate()`: its keys and values become blocks, and it is filled on in place.

Upstream takes the tokens the cache holds as computed and appends the keys and values of all others to the very
object, whether or not it is returned; so do we. The keys and values are used as they are, whatever made them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_paged.engine.given_kv import GivenKV
from hf_paged.generation.prepared import Prepared
from hf_paged.generation.returned_cache import gather

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call


def problem_with(engine: PagedEngine, prepared: Prepared) -> str | None:
    """Why the engine cannot start from the cache of this call; None if it can, or if the user gave none."""
    cache = prepared.given_cache
    if cache is None:
        return None
    if type(cache) is not DynamicCache:
        return type(cache).__name__
    if getattr(cache, "offloading", False) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return "its layers are not plain dynamic ones"
    if prepared.method != "_sample":
        return f"in {prepared.method}"
    length = cache.get_seq_length()
    if not length:
        return None
    rows, width = len(prepared.input_ids), prepared.prompt_width
    if (
        prepared.inputs_embeds is None
        and prepared.attention_mask is None
        and getattr(prepared.config, "_mask_length", width) != width
    ):
        return "only the new tokens are given as input_ids"
    if length >= width:
        return f"it holds {length} tokens, the prompt has {width}"
    geometry = engine.layer_geometry()
    wanted = [((rows, g.num_kv_heads, length, g.head_dim), g.dtype, g.device) for g in geometry]
    for name in ("keys", "values"):
        tensors: list[Tensor] = [getattr(layer, name) for layer in cache.layers]
        if [(tuple(t.shape), t.dtype, t.device) for t in tensors] != wanted:
            return f"its {name} are not those of {rows} rows of this model"
    return None


def given_kv(prepared: Prepared, row: int, num_pad: int) -> GivenKV | None:
    """What the cache of the call holds of the tokens of a row, pads left out; None if it holds none."""
    cache = prepared.given_cache
    if cache is None or cache.get_seq_length() <= num_pad:
        return None
    return GivenKV([_of_row(layer, row, num_pad) for layer in cache.layers])


def _of_row(layer: DynamicLayer, row: int, num_pad: int) -> tuple[Tensor, Tensor]:
    assert layer.keys is not None  # `problem_with` has looked
    assert layer.values is not None
    keys, values = (x[row, :, num_pad:].detach().transpose(0, 1) for x in (layer.keys, layer.values))
    return keys, values


def fill_on(cache: DynamicCache, engine: PagedEngine, call: Call) -> None:
    """Appends to `cache` what `call`, which has ended, computed beyond it; the blocks stay."""
    length = cache.get_seq_length()
    with torch.no_grad():
        for index, (keys, values) in enumerate(gather(engine, call)):
            cache.update(keys[:, :, length:], values[:, :, length:], index)
