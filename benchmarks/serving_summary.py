"""What the windows of a run come to: the highest rates, the pairs, and the table for the benchmarks page."""

from __future__ import annotations

import math
from typing import Any

from serving_search import bounds

TARGET = 3


def summary(data: dict[str, Any], model: str) -> dict[str, Any]:
    """One model's figures; None where its windows have not been run."""
    windows = [w for w in data["windows"] if w["model"] == model]
    known = {
        server: bounds(counting([w for w in windows if w["server"] == server]))
        for server in ("transformers", "hf_paged")
    }
    rates = {server: held or None for server, (held, _) in known.items()}
    pairs = [w for w in windows if w["part"] == "pair"]
    at_target = [w["held"] for w in pairs if w["times"] == TARGET]
    both = None not in rates.values()
    return {
        "model": model,
        "highest_rate": rates,
        # None: no rate was tried that was not held, so the highest may be higher.
        "missed_rate": {s: None if missed == math.inf else missed for s, (_, missed) in known.items()},
        "ratio": rates["hf_paged"] / rates["transformers"] if both else None,
        "pairs": [
            {key: w[key] for key in ("pair", "server", "times", "rate", "held", "first_token")} for w in pairs
        ],
        "three_times_held": bool(at_target) and all(at_target),
        "settings": {
            "transformers": best_settings([w for w in windows if w["part"] == "tuning"]),
            "hf_paged": "defaults",
        },
        **_equal_answers(pairs),
    }


def counting(windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The windows that say which rate a server holds.

    Ours of the pairs as well; transformers' only of the search that set the pairs' rate.
    """
    return [w for w in windows if w["part"] == "search" or (w["part"], w["server"]) == ("pair", "hf_paged")]


def best_settings(tried: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The settings of the tuning windows that made the most tokens a second; None without windows."""
    return max(tried, key=lambda w: w["tokens_per_second"])["settings"] if tried else None


def _equal_answers(pairs: list[dict[str, Any]]) -> dict[str, int]:
    """Answers of a pair's first window beside those of its others: the same requests in the same order."""
    compared = different = 0
    for pair in {w["pair"] for w in pairs}:
        first, *others = [w["texts"].split() for w in pairs if w["pair"] == pair]
        for texts in others:
            both = [(a, b) for a, b in zip(first, texts, strict=False) if "-" not in (a, b)]
            compared += len(both)
            different += sum(a != b for a, b in both)
    return {"answers_compared": compared, "answers_different": different}


def table(data: dict[str, Any]) -> dict[str, Any]:
    """For the benchmarks page."""
    rows = []
    for line in data["summary"]:
        rates = line["highest_rate"]
        if None in rates.values():
            continue
        least = {server: "≥ " if line["missed_rate"][server] is None else "" for server in rates}
        row = [line["model"], *(f"{least[s]}{rates[s]:.2f}" for s in ("transformers", "hf_paged"))]
        row.append(f"{least['hf_paged']}{line['ratio']:.1f}×")
        for times in (3, 5):
            tried = [p for p in line["pairs"] if p["times"] == times]
            firsts = ", ".join(_seconds(p["first_token"]["p99"]) for p in tried)
            row.append(f"{sum(p['held'] for p in tried)} of {len(tried)} ({firsts})" if tried else "–")
        rows.append([*row, f"{line['answers_different']} of {line['answers_compared']}"])
    return {
        "about": "Servers under Poisson arrivals (`benchmarks/serving.py`): the highest requests a second that each "
        f"holds over {data['options']['seconds']:g} s with the first token of 99 of 100 requests within 2 s and a "
        "queue that does not grow; then pairs, ours at 3 and 5 times transformers' rate: how many held, and their p99. "
        "Server, engine and load generator share the cores.",
        "head": ["model", "`transformers serve --continuous-batching`", "`hf-paged serve`", "ratio"]
        + ["3× held", "5× held", "answers that differ"],
        "rows": rows,
    }


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} s"
