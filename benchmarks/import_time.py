"""What importing hf_paged and its first call cost, each in processes of its own.

import        hf_paged in a process that has torch and transformers already; target < 50 ms
first call    a short generate of a fresh process with hf_paged enabled, over the same call without: with
an empty
              numba cache (target for the compile ≤ 6 s) and with a warm one (target ≤ 0.3 s)

python benchmarks/import_time.py [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_paged.comparison.report import write_json

_IMPORT = """
import time, torch, transformers
started = time.perf_counter()
import hf_paged
print(time.perf_counter() - started)
"""

_FIRST_CALL = """
import sys, time, torch, transformers
from hf_paged.comparison.models import build_random
model = build_random("gpt2-tiny", torch.float32)
ids = torch.arange(1, 33)[None]
paged = sys.argv[1] == "paged"
started = time.perf_counter()
if paged:
    import hf_paged
    hf_paged.enable(model)
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
seconds = time.perf_counter() - started
assert not paged or hf_paged.stats(model).native_calls == 1, hf_paged.stats(model)
print(seconds)
"""


def seconds_of(code: str, *arguments: str, cache: str | None = None) -> float:
    """What the program printed last, run with a numba cache of its own."""
    env = dict(os.environ)
    if cache is not None:
        # Both names: hf_paged's own folder follows XDG_CACHE_HOME, numba's default follows its variable.
        env |= {"XDG_CACHE_HOME": cache, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    repeats = range(arguments.repeats)
    imports = [seconds_of(_IMPORT) for _ in repeats]
    plain = [seconds_of(_FIRST_CALL, "plain") for _ in repeats]
    with tempfile.TemporaryDirectory() as cache:
        cold = seconds_of(_FIRST_CALL, "paged", cache=cache)
        warm = [seconds_of(_FIRST_CALL, "paged", cache=cache) for _ in repeats]
    base = statistics.median(plain)
    rows = {
        "import_ms": 1e3 * statistics.median(imports),
        "first_call_plain_s": base,
        "first_call_cold_over_plain_s": cold - base,
        "first_call_warm_over_plain_s": statistics.median(warm) - base,
    }
    ok = {
        "import_ms": rows["import_ms"] < 50,
        "first_call_cold_over_plain_s": rows["first_call_cold_over_plain_s"] <= 6,
        "first_call_warm_over_plain_s": rows["first_call_warm_over_plain_s"] <= 0.3,
    }
    for name, value in rows.items():
        verdict = {None: "", True: "  ok", False: "  ABOVE the target"}[ok.get(name)]
        print(f"{name}: {value:.3f}{verdict}")
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "ok": ok, "all": {"import_s": imports, "warm_s": warm}})


if __name__ == "__main__":
    main()
