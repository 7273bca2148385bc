"""A small made-up report, for tests of what shows reports."""

from __future__ import annotations

from typing import Any


def sample_run(repeat: int, rate: float, **more: Any) -> dict[str, Any]:
    run: dict[str, Any] = {"repeat": repeat, "seconds": 2.0, "tokens": 100, "tokens_per_second": rate}
    run |= {"relative_error": 0.0, "requests_run": 4, "first_token_seconds": 0.1, "first_token_note": None}
    run |= {"peak_memory_bytes": 3 << 20, "memory_method": "VmHWM", "kv_waste": 0.25, "mean_running": 3.5}
    statistics = {"mean": 0.2, "p50": 0.2, "p90": 0.3, "p99": 0.4}
    run |= {
        "peak_kv_bytes": 5 << 20,
        "latency": {"ttft": statistics, "e2e": statistics},
        "latency_note": "a clock",
    }
    run |= {"goodput": {"requests_per_second": 2.0, "share": 0.5, "limits": {"ttft": 2.0}}, "extra": {}}
    return run | more


def sample_arm(name: str, *rates: float, **more: Any) -> dict[str, Any]:
    timeline = {"seconds": [0.0, 1.0, 2.0], "running": [4, 2, 1], "kv_bytes": [4 << 20, 5 << 20, 1 << 20]}
    arm: dict[str, Any] = {
        "name": name,
        "title": f"The {name}",
        "settings": {"call": name},
        "calibration": [],
    }
    arm |= {"runs": [sample_run(k, rate) for k, rate in enumerate(rates)], "repeats_equal": True}
    return arm | {"timeline": timeline, "error": None} | more


def sample_rate(arm: str, rate: float, *, saturated: bool = False) -> dict[str, Any]:
    run = sample_run(0, 50.0)
    row = {k: run[k] for k in ("seconds", "tokens_per_second", "latency", "goodput", "mean_running")}
    return {"arm": arm, "rate": rate, "requests": 4, "saturated": saturated, **row}


def sample_report(scenario: str = "design", **more: Any) -> dict[str, Any]:
    report: dict[str, Any] = {"schema_version": 2, "complete": True}
    report["model"] = {"name": "random:x", "class": "C", "model_type": "gpt2", "parameters": 5_000_000}
    report["model"] |= {"dtype": "float32", "device": "cpu", "attention": "sdpa"}
    report["scenario"] = {"name": scenario, "what": "Some traffic", "lengths": "made up"}
    report["workload"] = {"name": scenario, "seed": 0, "num_requests": 4, "notes": ["all lengths times 0.5"]}
    report["workload"] |= {
        "prompt_tokens": {"mean": 9.5, "max": 20},
        "max_new_tokens": {"mean": 25.0, "max": 30},
    }
    report["options"] = {"repeats": 2, "limits": {"ttft": 2.0}}
    report["environment"] = {
        "python": "3.11",
        "cpu": {"model": "A CPU", "usable_cores": 2},
        "packages": {},
        "gpus": [],
    }
    report["arms"] = [sample_arm("loop", 10.0, 11.0), sample_arm("hf_paged", 40.0, 55.0)]
    equality = {"arm": "hf_paged", "reference": "loop", "num_requests": 4, "num_equal": 4, "num_tokens": 100}
    report["equality"] = [equality | {"near_ties": 0, "differences": [], "examined": 0, "equal": True}]
    return report | {"rates": [], "ratios": []} | more
