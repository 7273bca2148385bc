"""What upstream's preparation makes of a call to `generate()`, and running that preparation alone."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from hf_paged.generation.view import GenerativeModel, make_view

#: What every decoding loop takes, in order.
_LOOP_ARGUMENTS = (
    "input_ids",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "streamer",
)


@dataclass
class Prepared:
    """The arguments of a decoding loop, as upstream hands them over: validated, merged and expanded."""

    method: str  # the loop: "_sample", "_beam_search", ...
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input_ids: Tensor  # [rows, padded length], `num_return_sequences` expanded
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    synced_gpus: bool
    streamer: Any
    model_kwargs: dict[str, Any]
    user_cache: Any = None  # `past_key_values` as the user gave it

    @classmethod
    def of(cls, method: str, *args: Any, **kwargs: Any) -> Prepared:
        """Sorts the arguments of a decoding loop."""
        rest = dict(kwargs)
        named = dict(zip(_LOOP_ARGUMENTS, args, strict=False))
        named |= {name: rest.pop(name) for name in _LOOP_ARGUMENTS if name in rest}
        return cls(
            method,
            args,
            kwargs,
            named["input_ids"],
            named["logits_processor"],
            named["stopping_criteria"],
            named["generation_config"],
            bool(named.get("synced_gpus", False)),
            named.get("streamer"),
            rest,
        )

    @property
    def max_length(self) -> int | float | None:
        """The length, pads included, at which every row ends; None without a limit."""
        # A class of the user's may mean anything by that name.
        limits = [c.max_length for c in self.criteria if type(c) is MaxLengthCriteria]
        return min(limits, default=None)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens a row can get: upstream always makes one before it looks at the length."""
        assert self.max_length is not None
        return max(1, math.ceil(self.max_length) - self.input_ids.shape[1])

    @property
    def given_cache(self) -> Any:
        """The cache the user gave, which is to be filled on in place; None for one that upstream made."""
        cache = self.model_kwargs.get("past_key_values")
        if cache is None or cache is self.user_cache:
            return cache
        ours = not getattr(cache, "_is_user_defined", False) and not cache.get_seq_length()
        return None if ours else cache

    @property
    def num_copies(self) -> int:
        """Rows that each prompt was expanded to: beams, or the sequences to return."""
        config = self.config
        return config.num_beams if self.method == "_beam_search" else config.num_return_sequences or 1

    @property
    def prompt_width(self) -> int:
        """Columns of the padded prompt, as the model sees it: `input_ids` may have fewer beside embeddings."""
        embeds = self.inputs_embeds
        return self.input_ids.shape[1] if embeds is None else embeds.shape[1]

    @property
    def inputs_embeds(self) -> Tensor | None:
        """[rows, padded length, E]: the prompt in place of its ids."""
        return self.model_kwargs.get("inputs_embeds")

    @property
    def attention_mask(self) -> Tensor | None:
        return self.model_kwargs.get("attention_mask")

    @functools.cached_property
    def attended(self) -> np.ndarray | None:
        """Where the mask is one, [rows, padded length] bool on the host; None where nothing is masked."""
        mask = self.attention_mask
        if mask is None:
            return None
        # On small masks numpy is several times as fast as torch; it does not know every dtype.
        is_usual = mask.dtype in (torch.int64, torch.bool) and mask.device.type == "cpu"
        ones: np.ndarray = mask.numpy() == 1 if is_usual else (mask == 1).cpu().numpy()
        return None if ones.all() else ones

    @functools.cached_property
    def prompt_lengths(self) -> list[int]:
        """Prompt tokens of each row, pads not counted."""
        if self.attended is None:
            return [self.prompt_width] * len(self.input_ids)
        return self.attended.sum(-1).tolist()

    def run_upstream(self, model: GenerativeModel) -> Any:
        """The original decoding loop on the real model, with the very arguments it would have got."""
        kwargs = dict(self.kwargs)
        if self.config.use_cache and kwargs.get("past_key_values") is None:
            # The view left it out. `_sample` gets an equal one from the first forward; the other loops expect it.
            kwargs["past_key_values"] = DynamicCache(config=model.config.get_text_config(decoder=True))
        return getattr(type(model), self.method)(model, *self.args, **kwargs)


def prepare(model: GenerativeModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Prepared:
    """Runs upstream's preparation of `model.generate(*args, **kwargs)` and stops before the decoding loop.

    Raises:
        HubDecodingMode: the mode lives on the hub.
        Exception: whatever upstream raises for these arguments.
    """
    view = make_view(model, Prepared.of)
    prepared: Prepared = type(view).generate(view, *args, **kwargs)
    prepared.user_cache = argument(model, args, kwargs, "past_key_values")
    return prepared


def argument(model: GenerativeModel, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """The value a call to `generate` gives the parameter `name`, or None; positional or by keyword."""
    if name in kwargs or not args:
        return kwargs.get(name)
    # Too many of them: upstream will say what is wrong with the arguments.
    return dict(zip(_positional(type(model).generate), args, strict=False)).get(name)


@functools.lru_cache(maxsize=64)
def _positional(generate: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what `generate` takes by position, after the model."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in inspect.signature(generate).parameters.items() if p.kind in kinds)[1:]
