"""Load: the highest rate of Poisson arrivals that `transformers serve --continuous-batching` and ours hold.

A rate is held if over a window of 60 s the time to the first token is at most 2 s for 99 of 100 requests, the queue
does not grow (mean requests in flight of the last third against the middle third), and every request is answered.
Locust sends each request as a stream at its own time (`serving_load.py`). One server runs at a time; server, engine and
load generator share the machine's cores, so what the load generator takes is in every figure. Then pairs on the same
machine: transformers at its rate, ours at three and at five times it. Target: three is held.

Needs locust and matplotlib beside the extra `serve`, and transformers[serving]. Windows are written to --json as they
come; --resume goes on where a run ended, --minutes ends it between two windows.

    python benchmarks/serving.py --json serving.json [--models llama-demo,gpt2-124m] [--seconds 60] [--minutes 11]
    [--resume] [--plots docs]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from serving_models import NAMES, folder_of
from serving_plots import save_plots
from serving_search import highest, next_rate
from serving_servers import Settings, serving
from serving_summary import best_settings, counting, summary, table
from serving_windows import bodies_of, run_window, verdict

from hf_paged._env import environment
from hf_paged.comparison.report import write_json

_POOL = 16384  # bodies; a window takes a run of them
_PAIRS = 2
_TIMES = (3, 5)
#: The rate at which transformers' settings are tried, above what any of them holds, and for which share of a window:
#: those that make the most tokens are taken, and their tokens a second say where the search begins.
_TUNING = {"llama-demo": (40.0, 0.25), "gpt2-124m": (3.0, 0.4)}
_CANDIDATES = ((256, 256, None), (256, 256, 1), (512, 256, None), (512, 64, None))


def candidates() -> list[Settings]:
    """The settings of transformers that are tried: blocks of 16 tokens, how many, tokens a step, threads."""
    return [
        Settings(
            {"cb-block-size": "16", "cb-num-blocks": str(blocks), "cb-max-batch-tokens": str(tokens)}, threads
        )
        for blocks, tokens, threads in _CANDIDATES
    ]


class Benchmark:
    """Everything of one run; `data` is what is written."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.minutes * 60
        self.data: dict[str, Any] = {"kind": "serving", "windows": []}
        if args.resume and args.json.is_file():
            self.data = json.loads(args.json.read_text())
            self.data["windows"] = [window | verdict(window) for window in self.data["windows"]]
        self.data["options"] = {"seconds": args.seconds}
        self.data["environment"] = environment()
        self.name = ""

    def run(self) -> None:
        """Everything that has not been run: what is worth most comes first."""
        names = self.args.models.split(",")
        for name in names:
            self.tune(name)
            self.search(name, "transformers")
            self.pair(name, 0)
        for name in names:
            self.search(name, "hf_paged")
        for number in range(1, _PAIRS):
            for name in names:
                self.pair(name, number)

    def use(self, name: str) -> None:
        """Makes `name` the model of the next windows."""
        if self.name != name:
            self.name = name
            self.folder, tokenizer = folder_of(name)
            self.bodies = bodies_of(tokenizer, _POOL, 0, 1024)

    def windows(self, **like: Any) -> list[dict[str, Any]]:
        """The windows there are with these fields."""
        return [w for w in self.data["windows"] if all(w.get(key) == value for key, value in like.items())]

    def tune(self, name: str) -> None:
        for settings in candidates():
            what = {
                "part": "tuning",
                "model": name,
                "server": "transformers",
                "settings": settings.describe(),
            }
            if not self.windows(**what):
                rate, share = _TUNING[name]
                self.window(what, settings, rate, self.args.seconds * share)

    def search(self, name: str, server: str) -> None:
        what = {"model": name, "server": server}
        while (rate := next_rate(self.counting(name, server), self.start(name))) is not None:
            self.window({"part": "search", **what}, self.settings(name, server), rate, self.args.seconds)

    def counting(self, name: str, server: str) -> list[dict[str, Any]]:
        """The windows that say which rate a server holds."""
        return counting(self.windows(model=name, server=server))

    def start(self, name: str) -> float:
        """Where the search for transformers' rate begins."""
        self.use(name)
        made = max(w["tokens_per_second"] for w in self.windows(part="tuning", model=name))
        return made / statistics.fmean(body["max_tokens"] for body in self.bodies)

    def settings(self, name: str, server: str) -> Settings:
        """Ours are its defaults; transformers' those that made the most tokens a second."""
        if server == "hf_paged":
            return Settings({})
        best = best_settings(self.windows(part="tuning", model=name))
        assert best is not None
        return Settings(best["options"], best["OMP_NUM_THREADS"])

    def pair(self, name: str, number: int) -> None:
        """transformers at its highest rate, then ours at some times that rate."""
        base = highest(self.windows(part="search", model=name, server="transformers"))
        if base is None:
            return
        for server, times in (("transformers", 1), *(("hf_paged", times) for times in _TIMES)):
            what = {"part": "pair", "pair": number, "model": name, "server": server, "times": times}
            if not self.windows(**what):
                self.window(what, self.settings(name, server), base * times, self.args.seconds)

    def window(self, what: dict[str, Any], settings: Settings, rate: float, seconds: float) -> None:
        """Runs a window on a fresh server and writes it down.

        Raises:
            OutOfTime: it would end after the time this run has.
        """
        if time.monotonic() + seconds + 40 > self.deadline:
            raise OutOfTime
        self.use(what["model"])
        seed = len(self.data["windows"])
        # A pair's windows have the same first requests, so that the answers can be compared.
        begin = 0 if what["part"] == "pair" else (seed * 997) % (_POOL // 2)
        count = min(max(round(rate * seconds), 8), _POOL - begin)
        log = self.args.json.with_suffix(f".{what['server']}.log")
        warm_up = [body | {"max_tokens": 16} for body in self.bodies[-16:]]
        with serving(what["server"], self.folder, settings, warm_up, log) as server:
            window = run_window(server, self.bodies[begin : begin + count], rate, seed)
        if what["part"] != "pair":
            del window["texts"]
        self.data["windows"].append(what | window)
        first, flight = window["first_token"], window["in_flight"]
        print(
            f"{what['model']:10s} {what['part']:6s} {what['server']:12s} {rate:6.2f}/s for {window['seconds']:.0f} s: "
            f"{'held  ' if window['held'] else 'MISSED'} first token p50 {first['p50']} p99 {first['p99']} s, "
            f"in flight {flight['middle_third']} → {flight['last_third']}, {window['tokens_per_second']:.0f} tokens/s, "
            f"cpu {window['server_cpu_seconds']} + {window['load_cpu_seconds']} s"
            f"{'' if not window['wrong'] + window['refused'] else ' WRONG OR REFUSED'}",
            flush=True,
        )
        self.write()

    def write(self) -> None:
        self.data["summary"] = [summary(self.data, name) for name in NAMES]
        self.data["table"] = table(self.data)
        write_json(self.args.json, self.data)


class OutOfTime(Exception):
    """The time of this run is over; --resume goes on."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--seconds", type=float, default=60.0, help="of a window; less for a quick look")
    parser.add_argument("--minutes", type=float, default=600.0, help="most that this run may take")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--plots", type=Path, help="a folder")
    args = parser.parse_args()
    benchmark = Benchmark(args)
    complete = True
    try:
        benchmark.run()
    except OutOfTime:
        complete = False
        print("out of time: --resume goes on", flush=True)
    benchmark.write()
    for row in benchmark.data["table"]["rows"]:
        print("  ".join(map(str, row)))
    if args.plots is not None:
        for path in save_plots(benchmark.data, args.plots):
            print(path)
    held = [s["three_times_held"] for s in benchmark.data["summary"] if s["model"] in args.models.split(",")]
    return 0 if complete and all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
