"""Adapters chosen request by request or row by row: from what users give to the selections of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_paged.engine.adapters import RowAdapters, Selection, row_adapters
from hf_paged.errors import InvalidRequestError
from hf_paged.generation.prepared import Prepared

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine


def select(engine: PagedEngine, choice: Any) -> Selection | None:
    """The selection of one request: an adapter's name, several, `"__base__"`, or None for the model as it stands.

    Raises:
        InvalidRequestError: no such adapter, or one that cannot be chosen per request.
    """
    if engine.adapters is None:
        if choice is None:
            return None
        raise InvalidRequestError(f"adapter {choice!r}: this model has no adapters")
    return engine.adapters.select(choice)


def select_each(engine: PagedEngine, choices: Any, count: int) -> list[Selection | None]:
    """The selections of `count` requests, from one choice for all or a list with one a request.

    Raises:
        InvalidRequestError: as `select`, or a list of another length. The message names the place.
    """
    if choices is None or isinstance(choices, str):
        return [select(engine, choices)] * count
    if not isinstance(choices, Sequence) or len(choices) != count:
        size = f"{len(choices)} adapters" if isinstance(choices, Sequence) else f"adapters={choices!r}"
        raise InvalidRequestError(
            f"{size} for {count} prompts: give one name for all, or a list with one a prompt"
        )
    known: dict[Any, Selection | None] = {}
    selections = []
    for i, choice in enumerate(choices):
        key = tuple(choice) if isinstance(choice, list) else choice
        try:
            if key not in known:
                known[key] = select(engine, choice)
        except (InvalidRequestError, TypeError) as error:
            raise InvalidRequestError(f"adapters[{i}]: {error}") from error
        selections.append(known[key])
    return selections


def select_rows(engine: PagedEngine, prepared: Prepared) -> list[Selection | None]:
    """The selections of the rows of a `generate`: its `adapter_names`, copies of a prompt alike, or the model's own.

    Raises:
        InvalidRequestError: as `select`, or not one name a prompt.
    """
    rows = len(prepared.input_ids)
    if engine.adapters is None:
        return [None] * rows
    names = engine.adapters.row_choices()
    if names is None:
        return [engine.adapters.current()] * rows
    copies = prepared.num_copies
    if prepared.method == "_beam_search" and isinstance(names, list | tuple) and len(names) == rows:
        names = names[::copies]  # PEFT has named each beam already
    if not isinstance(names, list | tuple) or len(names) * copies != rows:
        raise InvalidRequestError(
            f"adapter_names={names!r}: must be a list with one name for each of the {rows // copies} prompts"
        )
    selected = {name: select(engine, name) for name in dict.fromkeys(names)}
    return [selected[name] for name in names for _ in range(copies)]


@contextmanager
def chosen_rows(model: Any, names: Any) -> Iterator[None]:
    """Serves `adapter_names` given to the `generate` of the model itself, which upstream's does not know."""
    token = row_adapters.set(RowAdapters(model, names, ours=True))
    try:
        yield
    finally:
        row_adapters.reset(token)
