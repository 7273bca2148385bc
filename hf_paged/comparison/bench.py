"""Runs a suite of `hf-paged bench` line by line, keeping every finished line.

The JSON: {"schema_version", "suite", "environment", "lines": [{"key", "title", "judgements": [...], "equal", "skipped",
"report"}]} where `report` is that of a comparison. It is written after each line; `resume` goes on where it ended.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_paged.comparison.api import compare, environment
from hf_paged.comparison.models import build_random, parse_dtype
from hf_paged.comparison.report import SCHEMA_VERSION, CompareReport, write_json
from hf_paged.comparison.runner import OnProgress
from hf_paged.comparison.suites import SUITES, BenchLine

_BF16_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass
class BenchResult:
    """One finished line, as it stands in the JSON."""

    data: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Everything ran, tokens were equal and every ratio reached what it must."""
        return self.data["equal"] and all(j["ok"] for j in self.data["judgements"])


def run_suite(
    suite: str,
    *,
    path: Path | None = None,
    resume: bool = False,
    only: tuple[str, ...] = (),
    device: str | None = None,
    on_progress: OnProgress | None = None,
    on_line: Callable[[BenchResult], None] | None = None,
    on_start: Callable[[BenchLine], None] | None = None,
) -> list[BenchResult]:
    """Runs the lines of `suite` and returns their results.

    Args:
        suite: "quick" or "full".
        path: JSON to write after each line.
        resume: take finished lines from `path`.
        only: keys of lines to run; empty runs all.
        device: None is CUDA where there is one, else the CPU.
        on_progress: as in `hf_paged.compare`.
        on_line, on_start: called with each result and before each line.

    Raises:
        ValueError: an unknown suite or key, or a file to resume that is of another suite.
    """
    if suite not in SUITES:
        raise ValueError(f"suite={suite!r}: must be one of {', '.join(SUITES)}")
    lines = [line for line in SUITES[suite] if not only or line.key in only]
    unknown = set(only) - {line.key for line in SUITES[suite]}
    if unknown:
        raise ValueError(
            f"line {sorted(unknown)[0]!r}: must be one of {', '.join(k.key for k in SUITES[suite])}"
        )
    finished = _finished(path, suite) if resume else {}
    results: list[BenchResult] = []
    facts = environment()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for line in lines:
        if line.key in finished:
            result = BenchResult(finished[line.key])
        else:
            if on_start is not None:
                on_start(line)
            result = BenchResult(_run_line(line, facts, device, on_progress))
        results.append(result)
        if path is not None:
            data = {"schema_version": SCHEMA_VERSION, "suite": suite, "environment": facts}
            write_json(path, data | {"lines": [r.data for r in results]})
        if on_line is not None:
            on_line(result)
    return results


def _run_line(
    line: BenchLine, facts: dict[str, Any], device: str, on_progress: OnProgress | None
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "key": line.key,
        "title": line.title,
        "judgements": [],
        "equal": True,
        "skipped": None,
    }
    if line.dtype == "bfloat16" and device == "cpu" and not _has_bf16(facts):
        return data | {"skipped": "this CPU has no bfloat16 instructions", "report": None}
    model = build_random(line.shape, parse_dtype(line.dtype)).to(device)
    report = compare(
        model,
        lengths="design",
        num_requests=line.num_requests,
        name=f"random:{line.shape}",
        arms=line.arms,
        progress=on_progress or False,
        **line.options,
    )
    del model
    gc.collect()
    data["judgements"] = [_judge(report, line, target) for target in line.targets]
    data["equal"] = report.complete and all(e.equal for e in report.equality if e.arm == line.paged_arm)
    return data | {"report": report.to_dict()}


def _judge(report: CompareReport, line: BenchLine, target: Any) -> dict[str, Any]:
    ratio = report.ratio(target.against, line.paged_arm)
    judgement = {"against": target.against, "must": target.must, "aim": target.aim, "ok": False}
    if ratio is None:
        arm = report.arm(target.against)
        return judgement | {"error": (arm and arm.error) or "hf_paged did not run"}
    values = ratio.to_dict()
    return judgement | values | {"ok": values["median"] >= target.must}


def _has_bf16(facts: dict[str, Any]) -> bool:
    return any(flag in str(facts.get("cpu", "")) for flag in _BF16_FLAGS)


def _finished(path: Path | None, suite: str) -> dict[str, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["suite"] != suite:
            raise ValueError(f"{path} is of suite {data['suite']!r}, not {suite!r}")
        return {line["key"]: line for line in data["lines"]}
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is not a result of hf-paged bench: cannot resume from it") from None
