"""The rows of a long benchmark, each in a JSON file as soon as it is there: a run may be cut short and go on."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_paged._env import environment
from hf_paged.comparison.report import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, --resume and --minutes."""
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in --json")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no row after so long: exit 2, go on with --resume",
    )


class Rows:
    """What a benchmark has measured so far.

    Args:
        arguments: with those of `add_arguments`.
        about: what was measured, and how; a file that says otherwise is not gone on with.

    Attributes:
        data: what is in the file: `about`, "environment", "rows" and whatever else is put there before `keep`.

    Raises:
        SystemExit: the file is of another workload or machine.
    """

    def __init__(self, arguments: argparse.Namespace, about: Mapping[str, Any]) -> None:
        self._path: Path | None = arguments.json
        self._deadline = time.monotonic() + 60 * arguments.minutes
        self.data: dict[str, Any] = {**about, "environment": environment(), "rows": []}
        if arguments.resume and self._path and self._path.exists():
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self._check(known, about)
            self.data |= known

    def _check(self, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(about))
        other = [name for name, value in plain.items() if known.get(name) != value]
        if known["environment"]["cpu"] != self.data["environment"]["cpu"]:
            other.append("cpu")
        if other:
            raise SystemExit(f"{self._path} differs in {', '.join(other)}: not a run to go on with")

    def get(self, key: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row that `key` is part of, from the file or by `run`.

        Raises:
            SystemExit: with 2, as the time for beginning another is over.
        """
        for row in self.data["rows"]:
            if key.items() <= row.items():
                return row
        if time.monotonic() > self._deadline:
            print("not finished: run again with --resume", flush=True)
            raise SystemExit(2)
        row = {**key, **run()}
        self.data["rows"].append(row)
        words = ", ".join(f"{name} {value}" for name, value in key.items())
        print(f"{words}: {row['seconds']:.2f} s for {row['tokens']} tokens", flush=True)
        self.keep()
        return row

    def keep(self) -> None:
        """Writes the file."""
        if self._path:
            write_json(self._path, self.data)
