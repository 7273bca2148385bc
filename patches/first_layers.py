"""The first layers of a model as a model, for drafts by early exit (Elhoushi et al., 2024, arXiv 2404.16710).

Upstream shortens the config that all share while it drafts. Here two modules are stood in for, and everything below
them is shared, so that weights and patches are the very ones of the model:

    model          -> copy with the same head         neither is registered anywhere; both are gone with
      base model   -> copy with fewer blocks          the assistant that drafts with them
        blocks [n] -> the first ones
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_paged.patches.registry import PatchSpec

__all__ = ["first_layers"]


def first_layers(model: Any, spec: PatchSpec, num_layers: int) -> Any:
    """`model` as it is now, cut after its first `num_layers` (>= 1) blocks: its head reads what they give.

    For steps of the model's own patch only. Blocks beyond what there are change nothing.
    """
    name = model.base_model_prefix
    base, blocks = model._modules[name], spec.blocks(model)
    parts = {
        key: nn.ModuleList(list(blocks)[:num_layers]) if child is blocks else child
        for key, child in base._modules.items()
    }
    return _stand_in(model, {**model._modules, name: _stand_in(base, parts)})


def _stand_in(module: nn.Module, children: dict[str, nn.Module | None]) -> Any:
    """A module that is `module` but for its children, and for a forward put on the instance: hooks that move what goes
    in and out, which a step has in place already."""
    copy: Any = object.__new__(type(module))
    attributes = {key: value for key, value in vars(module).items() if key != "forward"}
    object.__setattr__(copy, "__dict__", {**attributes, "_modules": children})
    return copy
