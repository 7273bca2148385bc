"""The results file: one run more at each start, written again after every row, and printed as tables.

The JSON: {"schema_version", "runs": [{"suite", "command", "started", "environment", "rows": [{"name", ...}]}]}.
A row that failed has "error" in place of its figures.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

from hf_paged.comparison.numbers import short
from hf_paged.comparison.report import write_json

SCHEMA_VERSION = 1
Row = dict[str, Any]


class ResultFile:
    """Appends one run to a file that may hold earlier ones."""

    def __init__(self, path: Path, suite: str, environment: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: there is a file, and it is not one of ours.
        """
        self.path = path
        self.rows: list[Row] = []
        self._data = _read(path)
        run = {
            "suite": suite,
            "command": " ".join(sys.argv),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": environment,
            "rows": self.rows,
        }
        self._data["runs"].append(run)

    def add(self, row: Row) -> None:
        """Keeps the row and writes the file."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._data)

    def earlier(self, name: str) -> Row | None:
        """The newest row of that name of any run in the file, if it has figures."""
        for run in reversed(self._data["runs"]):
            for row in reversed(run["rows"]):
                if row["name"] == name and "error" not in row:
                    return row
        return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"schema_version": SCHEMA_VERSION, "runs": []}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] == SCHEMA_VERSION and isinstance(data["runs"], list):
            return data
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path}: not a results file of schema {SCHEMA_VERSION}: move it or name another by --json"
    )


def default_path(root: Path, device_name: str, day: datetime.date) -> Path:
    """benchmarks/results/<gpu>-<date>.json, the GPU's name in lower case with dashes."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return root / "benchmarks" / "results" / f"{slug}-{day.isoformat()}.json"


def line(row: Row) -> str:
    """A row as one line of the terminal."""
    if "error" in row:
        return f"{row['name']}: FAILED: {row['error']}"
    return f"{row['name']}: " + "  ".join(f"{key} {_shown(value)}" for key, value in _figures(row))


def tables(rows: list[Row]) -> str:
    """Rows of like columns under one head, in the order they came."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        columns = ("error",) if "error" in row else tuple(key for key, _ in _figures(row))
        groups.setdefault(columns, []).append(row)
    return "\n\n".join(_table(columns, group) for columns, group in groups.items())


def _table(columns: tuple[str, ...], rows: list[Row]) -> str:
    cells = [["", *columns]] + [[r["name"], *(_shown(r.get(c)) for c in columns)] for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def _figures(row: Row) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in row.items() if k != "name" and not isinstance(v, dict | list)]


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return str(value) if isinstance(value, int) else short(value)
