"""Prefix-cache namespaces: what keeps keys and values of different weights, adapters and salts apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from hf_paged.engine.adapters import Selection, base_modules
from hf_paged.engine.weight_samples import Samples
from hf_paged.engine.weights import adapters_version, optimizer_steps, weights_version

if TYPE_CHECKING:
    from hf_paged.engine.request import Call


class Namespaces(dict[Selection | None, bytes]):
    """Those of one moment, by what sequences run with; None for what no selection can say.

    Args:
        num_pauses: `paused()` blocks that had ended before: after another one these are no longer true.
        salt: what they were made with.
    """

    def __init__(self, num_pauses: int, salt: str = "") -> None:
        super().__init__()
        self.num_pauses = num_pauses
        self.salt = salt


class NamespaceMaker:
    """Makes the namespaces of one model, and tells when its weights are other ones than before.

    Args:
        salt: of the engine's config, besides that of a request.
        on_change: called when the base weights have changed since the last time.
    """

    def __init__(self, salt: str, on_change: Callable[[], object]) -> None:
        self._salt = salt
        self._on_change = on_change
        self._weights: tuple[bytes, int] | None = None
        self._samples = Samples()

    def make(
        self, model: nn.Module, selections: Iterable[Selection | None], num_pauses: int, salt: str
    ) -> Namespaces:
        modules = base_modules(model)
        version = weights_version(modules, self._samples)
        # Optimizers that work on copies (master weights) may leave no other trace than that they ran.
        steps = optimizer_steps()
        if (version, steps) != self._weights:
            if self._weights is not None:
                self._on_change()
            self._weights = (version, steps)
        salts = repr((self._salt, salt, steps)).encode()
        made = Namespaces(num_pauses, salt)
        for s in set(selections):
            # `WeightsGuard` compares how they begin.
            names = None if s is None else s.names
            made[s] = b"\0".join((version, adapters_version(modules, names), salts))
        return made


def assign(call: Call, namespaces: Namespaces) -> None:
    """Gives the call and its sequences those of `namespaces`; who has None stays out of the prefix cache."""
    call.num_pauses, call.salt = namespaces.num_pauses, namespaces.salt
    for seq in call.sequences:
        if seq.own_namespace is not None:
            seq.own_namespace = namespaces[seq.adapters]
    if call.namespace is not None:
        call.namespace = namespaces[call.sequences[0].adapters]
