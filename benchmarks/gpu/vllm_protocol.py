"""`vllm bench throughput --backend hf` as it is: what the first papers compared with.

Requests are packed as they come, while there are fewer than the batch size and longest prompt + longest output stay
within 2048 tokens. A batch gets no attention mask, samples, and runs to its longest output; every request is credited
with its prompt and all tokens it asked for. It is unfair to nobody's speed, and its texts are worth nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

import hf_paged
from hf_paged.comparison.sampling import Unit, rate_error, sample_units
from hf_paged.comparison.workloads import Request

_TOKEN_LIMIT = 2048


def pack(requests: Sequence[Request], batch_size: int) -> list[Unit]:
    """Batches in the order of the requests."""
    units: list[Unit] = []
    batch: list[int] = []
    for index in range(len(requests)):
        members = [*batch, index]
        longest = max(len(requests[i].prompt) for i in members)
        longest += max(requests[i].max_new_tokens for i in members)
        if batch and (len(batch) == batch_size or longest > _TOKEN_LIMIT):
            units.append(Unit(tuple(batch)))
            members = [index]
        batch = members
    return [*units, Unit(tuple(batch))]


def generate_rate(
    model: Any, requests: Sequence[Request], batch_size: int, subset: int | None
) -> dict[str, Any]:
    """Credited tokens a second of `model.generate`, on a sample of about `subset` requests."""
    units = pack(requests, batch_size)
    sample = sample_units(units, requests, subset, 0)
    seconds, tokens = [], []
    for unit in sample:
        batch = [requests[i] for i in unit.indices]
        width = max(len(r.prompt) for r in batch)
        ids = torch.tensor(
            [[0] * (width - len(r.prompt)) + list(r.prompt) for r in batch], device=model.device
        )
        started = time.perf_counter()
        model.generate(
            ids,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            use_cache=True,
            max_new_tokens=max(r.max_new_tokens for r in batch),
            pad_token_id=0,
        ).tolist()
        seconds.append(time.perf_counter() - started)
        tokens.append(credited(batch))
    return {
        "tokens_per_s": sum(tokens) / sum(seconds),
        "relative_error": rate_error(tokens, seconds, len(units)),
        "batch_size": batch_size,
        "requests_run": sum(len(u.indices) for u in sample),
    }


def paged_rate(model: Any, requests: Sequence[Request], options: dict[str, Any]) -> dict[str, Any]:
    """Credited tokens a second of `generate_many` with the same decoding, every request to its own length."""
    from transformers import GenerationConfig

    configs = [
        GenerationConfig(
            max_new_tokens=r.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            pad_token_id=0,
        )
        for r in requests
    ]
    prompts = [list(r.prompt) for r in requests]
    with hf_paged.enabled(model, **options):
        hf_paged.generate_many(model, prompts[:2], max_new_tokens=2, do_sample=True, top_k=0)
        started = time.perf_counter()
        hf_paged.generate_many(model, prompts, generation_config=configs)
        seconds = time.perf_counter() - started
    return {"tokens_per_s": credited(requests) / seconds, "requests_run": len(requests)}


def credited(requests: Sequence[Request]) -> int:
    """Tokens of prompts and of outputs asked for."""
    return sum(len(r.prompt) + r.max_new_tokens for r in requests)
