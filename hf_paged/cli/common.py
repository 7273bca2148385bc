"""What the commands share: errors in one line, lists in one option."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer


def fail(message: object) -> NoReturn:
    """One line on standard error, exit code 2: what the user asked for cannot be done."""
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError, which is how the library refuses an argument, into `fail`."""
    try:
        yield
    except ValueError as error:
        fail(error)


def split_names(value: str) -> tuple[str, ...]:
    """ "a,b" as ("a", "b")."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def split_ints(option: str, value: str) -> tuple[int, ...]:
    """ "4,8" as (4, 8).

    Raises:
        ValueError: a part is no positive int.
    """
    parts = split_names(value)
    if not parts or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(f"{option}={value!r}: must be positive numbers with commas between them")
    return tuple(int(p) for p in parts)


def split_numbers(option: str, value: str) -> tuple[float, ...]:
    """ "0.5,2" as (0.5, 2.0); empty stays empty.

    Raises:
        ValueError: a part is no number above 0.
    """
    try:
        numbers = tuple(float(part) for part in split_names(value))
    except ValueError:
        numbers = (0.0,)
    if not all(0 < n < float("inf") for n in numbers):
        raise ValueError(f"{option}={value!r}: must be numbers above 0 with commas between them")
    return numbers


def load_adapters(model: Any, values: Sequence[str], *, activate: bool = True) -> list[str]:
    """Loads the PEFT checkpoints of `--adapter NAME=PATH` options.

    Args:
        activate: whether the first one is active after.

    Returns:
        The names, in the order given. "__base__" without a path stands for the model without adapters.

    Raises:
        ValueError: an option is malformed, or its checkpoint cannot be loaded.
    """
    from hf_paged.integrations.peft_checkpoints import load_adapter

    names = []
    for value in values:
        name, equals, path = value.partition("=")
        if value != "__base__":
            if not equals or not path:
                raise ValueError(f"--adapter {value}: must be NAME=PATH, or __base__")
            load_adapter(model, path, name)
        names.append(name)
    own = [name for name in names if name != "__base__"]
    if own and activate:
        model.set_adapter(own[0])
    return names


def writable(path: Path | None) -> Path | None:
    """`path`, checked before minutes of work are done for it.

    Raises:
        ValueError: its folder does not exist, or it is a folder.
    """
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(f"cannot write {path}: it must name a file in a folder that exists")
    return path


def terminal_width() -> int:
    """Columns of the terminal, and enough of them for the tables where it is narrow or none."""
    return max(shutil.get_terminal_size().columns, 120)


def quiet_libraries() -> None:
    """Keeps upstream's hints out of tables; errors still show."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hf_paged").setLevel(logging.WARNING)
