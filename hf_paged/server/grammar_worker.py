"""Compiles grammars in a process of its own, which can be killed: a thread that hangs in a compiler cannot.

Lines of JSON on standard input and output, no pickle. First the tokenizer's facts come in and `{"ready": true}` goes
out; then for each `{"kind", "text"}` one `{"compiled": ...}` or `{"error": ...}`.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

#: Bytes of address space a compilation may add to what the process has when it is ready.
_MAX_MEMORY = 2 * 2**30
#: Characters of white space between two parts of JSON: enough to indent, and a text that ends some day.
_MAX_WHITESPACE = 20


def main() -> None:
    """Serves until standard input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    import xgrammar

    facts = json.loads(sys.stdin.readline())
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.deserialize_json(facts["tokenizer"]), max_threads=1, cache_enabled=False
    )
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MAX_MEMORY, size + _MAX_MEMORY))
    _say(answers, {"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        try:
            _say(answers, {"compiled": _compile(compiler, task["kind"], task["text"]).serialize_json()})
        except Exception as error:
            _say(answers, {"error": _reason(error)})


def _compile(compiler: Any, kind: str, text: str) -> Any:
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "grammar":
        return compiler.compile_grammar(text)
    return compiler.compile_json_schema(
        text, strict_mode=kind == "schema", max_whitespace_cnt=_MAX_WHITESPACE
    )


def _reason(error: Exception) -> str:
    """The first line of a message, without where in the compiler's sources it comes from."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\S*/\S+?:\d+:?\s*", "", re.sub(r"^\[[^\]]*\]\s*", "", lines[0]))[:300]


def _say(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
