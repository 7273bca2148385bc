"""Workloads: lists of requests, from prompts of the user or from a length distribution.

With a tokenizer, the prompts of a distribution are windows of real text that ships with Python; without one
(random weights) they are random token ids. Every arm of a comparison gets the very same requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_paged.comparison.lengths import find_distribution

_TEXT_CHARS = 200_000


@dataclass(frozen=True)
class Request:
    """One prompt and how many tokens were asked for at most."""

    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests with a name and, in `notes`, what was changed to make them fit the model."""

    name: str
    requests: tuple[Request, ...]
    seed: int | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Counts, means and maxima, for the report."""
        prompts = [len(r.prompt) for r in self.requests]
        outputs = [r.max_new_tokens for r in self.requests]
        return {
            "name": self.name,
            "seed": self.seed,
            "num_requests": len(self.requests),
            "prompt_tokens": {"mean": sum(prompts) / len(prompts), "max": max(prompts)},
            "max_new_tokens": {"mean": sum(outputs) / len(outputs), "max": max(outputs)},
            "notes": list(self.notes),
        }


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Prompts of a file: one a line, or JSON lines of {"prompt": text or ids, "max_new_tokens": optional
    int}.

    A file whose name ends in .jsonl is JSON lines, any other is text. Blank lines are skipped.

    Raises:
        ValueError: no such file, no prompts in it, or a line that cannot be read; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_json_row(path, number, line) if path.suffix == ".jsonl" else {"prompt": line})
    if not rows:
        raise ValueError(f"no prompts in {path}: it has no line with text")
    return rows


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    if not isinstance(row, dict) or not row.get("prompt"):
        raise ValueError(f'{path}, line {number}: needs an object with a non-empty "prompt"')
    limit = row.get("max_new_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"{path}, line {number}: max_new_tokens={limit!r}: must be a positive int")
    return {"prompt": row["prompt"], "max_new_tokens": limit}


def workload_from_prompts(
    prompts: Iterable[Any], *, tokenizer: Any = None, max_new_tokens: int = 128, name: str = "prompts"
) -> Workload:
    """Requests from texts, token ids, `Request`s or rows of `read_prompts`, in their order.

    Raises:
        ValueError: no prompts, an empty prompt, or text without a tokenizer; the message names the index.
    """
    requests = []
    for index, item in enumerate(prompts):
        if isinstance(item, Request):
            requests.append(item)
            continue
        row = item if isinstance(item, dict) else {"prompt": item}
        ids = _token_ids(row["prompt"], tokenizer, index)
        requests.append(Request(tuple(ids), row.get("max_new_tokens") or max_new_tokens))
    if not requests:
        raise ValueError("no prompts")
    return Workload(name, tuple(requests))


def _token_ids(prompt: Any, tokenizer: Any, index: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"prompt {index} is text, but there is no tokenizer: give token ids or a tokenizer"
            )
        prompt = tokenizer(prompt)["input_ids"]
    elif hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    ids = list(prompt)
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"prompt {index}: must be text or a non-empty flat list of token ids")
    return ids


def workload_from_lengths(
    name: str,
    num_requests: int,
    *,
    vocab_size: int,
    max_positions: int | None,
    seed: int = 0,
    tokenizer: Any = None,
    special_ids: Sequence[int] = (),
) -> Workload:
    """Requests with lengths of the distribution `name`, cut where prompt and output exceed `max_positions`.

    Raises:
        ValueError: an unknown name, or fewer than one request.
    """
    if num_requests < 1:
        raise ValueError(f"num_requests={num_requests}: must be at least 1")
    lengths = find_distribution(name).draw(num_requests, seed)
    draw = prompt_source(vocab_size, special_ids, seed, tokenizer)
    requests = tuple(Request(tuple(draw(prompt)), output) for prompt, output in lengths)
    return fit(Workload(name, requests, seed), max_positions)


def fit(workload: Workload, max_positions: int | None) -> Workload:
    """The workload with outputs, and then prompts, cut so that no request exceeds `max_positions` tokens."""
    if max_positions is None:
        return workload
    fitted = []
    for request in workload.requests:
        prompt = request.prompt[-max(max_positions - 1, 1) :]
        fitted.append(Request(prompt, min(request.max_new_tokens, max_positions - len(prompt))))
    cut = sum(a != b for a, b in zip(fitted, workload.requests, strict=True))
    if not cut:
        return workload
    note = f"{cut} of {len(fitted)} requests cut to the model's {max_positions} positions"
    return Workload(workload.name, tuple(fitted), workload.seed, (*workload.notes, note))


def prompt_source(
    vocab_size: int, special_ids: Sequence[int], seed: int, tokenizer: Any = None
) -> Callable[[int], list[int]]:
    """A function of a length that gives the next prompt: a window of text, or random ids without a tokenizer."""
    if tokenizer is not None:
        return _text_windows(tokenizer, seed)
    return _random_ids(vocab_size, special_ids, seed)


def _random_ids(vocab_size: int, special_ids: Sequence[int], seed: int) -> Callable[[int], list[int]]:
    rng = random.Random(f"ids:{seed}")
    allowed = [i for i in range(vocab_size) if i not in set(special_ids)]
    return lambda length: rng.choices(allowed, k=length)


def _text_windows(tokenizer: Any, seed: int) -> Callable[[int], list[int]]:
    from pydoc_data import topics

    rng = random.Random(f"text:{seed}")
    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:_TEXT_CHARS]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def draw(length: int) -> list[int]:
        start = rng.randrange(max(len(ids) - length, 1))
        return ids[start : start + length]

    return draw
