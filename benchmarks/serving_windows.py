"""One window of Poisson arrivals at a rate: what is sent, and what the answers say of the server."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from serving_servers import Server

from hf_paged.comparison.scenarios import poisson_arrivals
from hf_paged.comparison.workloads import workload_from_lengths

#: The limit of issue and report: 99 of 100 requests have their first token within so many seconds.
MOST_SECONDS = 2.0
#: Requests in flight in the last third of a window over those in its middle third; above it the queue grows.
MOST_GROWTH, GROWTH_SLACK = 1.25, 5.0
#: Seconds after the last arrival in which running requests may end.
GRACE = 10.0
_LOAD = Path(__file__).with_name("serving_load.py")


def bodies_of(tokenizer: Any, count: int, seed: int, max_positions: int) -> list[dict[str, Any]]:
    """Bodies of `count` requests: windows of text, lengths of the workload "design", greedy, ended by max_tokens.

    Each text begins with its number, so that no prefix cache finds anything.
    """
    workload = workload_from_lengths(
        "design",
        count,
        vocab_size=len(tokenizer),
        max_positions=max_positions,
        seed=seed,
        tokenizer=tokenizer,
    )
    return [
        {
            "prompt": f"{index} {tokenizer.decode(request.prompt)}",
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "stream": True,
        }
        for index, request in enumerate(workload.requests)
    ]


def run_window(server: Server, bodies: list[dict[str, Any]], rate: float, seed: int) -> dict[str, Any]:
    """Sends `bodies` at `rate` requests a second and says how it went."""
    arrivals = poisson_arrivals(len(bodies), rate, seed)
    plan = {
        "grace": GRACE,
        "requests": [{"arrival": a, "body": b} for a, b in zip(arrivals, bodies, strict=True)],
    }
    busy = server.cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        paths = {"SERVING_PLAN": Path(folder, "plan.json"), "SERVING_RECORDS": Path(folder, "records.json")}
        paths["SERVING_PLAN"].write_text(json.dumps(plan))
        generator = subprocess.Popen(
            [sys.executable, "-m", "locust", "-f", str(_LOAD), "--headless", "-u", "1", "--host", server.url]
            + ["--only-summary", "--loglevel", "ERROR", "--exit-code-on-error", "0"],
            env=dict(os.environ) | {name: str(path) for name, path in paths.items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        load = _cpu_of(generator)
        records = json.loads(paths["SERVING_RECORDS"].read_text())
    return judge(records, bodies, arrivals[-1]) | {
        "rate": rate,
        "seed": seed,
        "server_cpu_seconds": round(server.cpu_seconds() - busy, 1),
        "load_cpu_seconds": load,
        "server_resident_bytes": server.resident_bytes(),
    }


def _cpu_of(process: subprocess.Popen[bytes]) -> float:
    """Waits for a process's end; its processor seconds."""
    watched, seconds = psutil.Process(process.pid), 0.0
    while process.poll() is None:
        try:
            times = watched.cpu_times()
            seconds = times.user + times.system
            process.wait(0.5)
        except (subprocess.TimeoutExpired, psutil.NoSuchProcess):
            continue
    return round(seconds, 1)


def judge(records: list[dict[str, Any]], bodies: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What the records of a window say, and whether the limit was held.

    Args:
        seconds: from the start to the last arrival.
    """
    firsts = [math.inf if r["first"] is None else r["first"] - r["arrival"] for r in records]
    wrong = [r for r in records if r["end"] is not None and not _complete(r["body"])]
    refused = [r for r in records if r["status"] not in (None, 200)]
    queue = in_flight(records, seconds)
    third = len(queue) // 3
    middle, last = statistics.fmean(queue[third : 2 * third]), statistics.fmean(queue[-third:])
    ended = [(r, b) for r, b in zip(records, bodies, strict=True) if r["end"] is not None]
    in_time = [body["max_tokens"] for record, body in ended if record["end"] <= seconds]
    window = {
        "seconds": round(seconds, 2),
        "requests": len(records),
        "answered": len(ended),
        "refused": len(refused),
        "wrong": len(wrong),
        "first_token": {
            name: _round(percentile(firsts, q)) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        },
        "whole_answer_p99": _round(
            percentile([math.inf if r["end"] is None else r["end"] - r["arrival"] for r in records], 0.99)
        ),
        "tokens_per_second": round(sum(in_time) / seconds, 1),
        "in_flight": {
            "middle_third": round(middle, 1),
            "last_third": round(last, 1),
            "each_second": queue[::4],
        },
        "texts": " ".join("-" if r["end"] is None else digest_of(r["body"]) for r in records),
    }
    return window | verdict(window)


def verdict(window: dict[str, Any]) -> dict[str, bool]:
    """Whether the limit was held, from the figures of a window."""
    flight, p99 = window["in_flight"], window["first_token"]["p99"]
    grows = flight["last_third"] > MOST_GROWTH * flight["middle_third"] + GROWTH_SLACK
    all_right = window["answered"] == window["requests"] and not window["refused"] and not window["wrong"]
    return {"queue_grows": grows, "held": p99 is not None and p99 <= MOST_SECONDS and not grows and all_right}


def in_flight(records: list[dict[str, Any]], seconds: float) -> list[int]:
    """Requests that have arrived and not ended, four times a second."""
    times = [step / 4 for step in range(1, int(seconds * 4) + 1)]
    return [sum(r["arrival"] <= t and (r["end"] is None or r["end"] > t) for r in records) for t in times]


def percentile(values: list[float], share: float) -> float:
    """The least value that at least `share` of `values` do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def digest_of(body: str) -> str:
    """A digest of the text of a stream of events."""
    events = [json.loads(line[6:]) for line in body.split("\n") if line.startswith("data: {")]
    text = "".join(choice["text"] for event in events for choice in event.get("choices", []))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _complete(body: str) -> bool:
    return '"finish_reason":"length"' in body


def _round(value: float) -> float | None:
    """For JSON, which knows no infinity: None."""
    return round(value, 4) if math.isfinite(value) else None
