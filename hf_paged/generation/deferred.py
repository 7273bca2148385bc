"""Taking over `generate()` of an enabled model for a stretch of code, in one thread.

Who calls a library that calls `generate()` can take each call to start it now and answer it later:

    with taken_by(engine, taker):
        pipe.forward(inputs)          # model.generate(...) inside -> taker(model, replaced, args, kwargs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.generation.view import GenerativeModel


class Taker(Protocol):
    """Answers in place of `model.generate(*args, **kwargs)`; `replaced` as for `paged_generate`."""

    def __call__(
        self, model: GenerativeModel, replaced: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any: ...


_taken: ContextVar[tuple[PagedEngine, Taker] | None] = ContextVar("hf_paged_taken", default=None)


@contextmanager
def taken_by(engine: PagedEngine, taker: Taker) -> Iterator[None]:
    """Inside, `generate()` of the model of `engine` goes to `taker`, in this thread or task only."""
    token = _taken.set((engine, taker))
    try:
        yield
    finally:
        _taken.reset(token)


def taker_of(engine: PagedEngine) -> Taker | None:
    """Who has taken over `generate()` of the model of `engine` here and now."""
    taken = _taken.get()
    return taken[1] if taken is not None and taken[0] is engine else None
