"""examples/tour.ipynb: its cells run in order as they stand, and print what is stored in it."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from typing import Any

import pytest

from tests.helpers import ROOT

NOTEBOOK = ROOT / "examples" / "tour.ipynb"
MAX_BYTES = 12_000


def code_cells() -> list[dict[str, Any]]:
    return [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def run(cells: list[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """What each cell prints, run in one namespace, and that namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(cells):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        printed.append(out.getvalue())
    return printed, names


def stored(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"])


def test_the_notebook_is_small_and_well_formed() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.stat().st_size <= MAX_BYTES
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    numbers = [cell["execution_count"] for cell in code_cells()]
    assert numbers == list(range(1, len(numbers) + 1)), "stored as run from the top, once"
    for cell in code_cells():
        ast.parse("".join(cell["source"]))
        assert all(output["output_type"] == "stream" for output in cell["outputs"])


def test_its_cells_print_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = code_cells()
    printed, names = run(cells)
    assert printed == [stored(cell) for cell in cells]
    assert "the same tokens: True" in "".join(printed)
    assert not names["hf_paged"].is_enabled(names["model"])
