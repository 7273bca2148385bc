"""`deterministic=True`: a request has the same bits whatever else happens. Log-probabilities are compared as numbers,
without tolerance; the same checks fail without the option."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

import hf_paged
from hf_paged.kernels import cpu_runtime
from tests.helpers import EOS, FAMILIES, ROOT, make_model, random_prompts
from tests.integrations.peft_models import config, peft_model

NEW_TOKENS = 24
#: Small, so that sequences need new blocks often.
BLOCK_SIZE = 4
ON = {"deterministic": True, "block_size": BLOCK_SIZE}
OFF = {"deterministic": False, "block_size": BLOCK_SIZE}
#: What makes a request one of a kind; `submit` gets it with the prompt.
Request = tuple[list[int], dict[str, Any]]
Transcript = tuple[list[int], list[Any]]
DTYPES = [torch.float32, torch.bfloat16]


def make_requests(count: int, seed: int, *, longest: int = 70) -> list[Request]:
    """Greedy and seeded sampled requests; every third begins as the one before it."""
    source = random.Random(seed)
    prompts = random_prompts([source.randint(1, longest) for _ in range(count)], seed=seed)
    for i in range(2, count, 3):
        prompts[i] = prompts[i - 1][: source.randint(1, len(prompts[i - 1]))] + prompts[i][:20]
    requests = []
    for i, prompt in enumerate(prompts):
        options: dict[str, Any] = {
            "max_new_tokens": source.randint(NEW_TOKENS // 2, NEW_TOKENS),
            "logprobs": 4,
        }
        if i % 4 == 1:
            options |= {"do_sample": True, "seed": i, "temperature": 0.8, "top_p": 0.9, "top_k": 30}
        if i % 4 == 3:
            options |= {"repetition_penalty": 1.3}
        requests.append((prompt, options))
    return requests


def run(model: Any, requests: Iterable[Request]) -> list[Transcript]:
    """All of them at once."""
    engine = hf_paged.engine(model)
    handles = [engine.submit(prompt, **options) for prompt, options in requests]
    results = [handle.result(timeout=120) for handle in handles]
    return [(result.token_ids, result.logprobs) for result in results]


def run_alone(model: Any, requests: Iterable[Request], **options: Any) -> list[Transcript]:
    """One after another, each on an empty cache."""
    options = ON | options
    with hf_paged.enabled(model, prefix_caching=False, **options):
        transcripts = [run(model, [request])[0] for request in requests]
        assert hf_paged.stats(model).peak_running == 1
    return transcripts


def differing(expected: Sequence[Transcript], got: Sequence[Transcript]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]


# --- the conditions ---------------------------------------------------------------------------------------------------


def in_one_batch(model: Any, requests: list[Request], **options: Any) -> list[Transcript]:
    with hf_paged.enabled(model, prefix_caching=False, **options):
        got = run(model, requests)
        assert hf_paged.stats(model).peak_running > len(requests) // 2
    return got


def in_chunks(model: Any, requests: list[Request], **options: Any) -> list[Transcript]:
    with hf_paged.enabled(model, max_num_seqs=5, max_num_batched_tokens=7, prefix_caching=False, **options):
        return run(model, requests)


def preempted(model: Any, requests: list[Request], **options: Any) -> list[Transcript]:
    longest = max(len(prompt) for prompt, _ in requests) + NEW_TOKENS
    dtype = options.get("kv_cache_dtype", "auto")
    with hf_paged.enabled(model, block_size=BLOCK_SIZE, kv_cache_dtype=dtype):
        hf_paged.generate_many(model, [[5]], max_new_tokens=1)
        stats = hf_paged.stats(model)
    blocks = -(-longest // BLOCK_SIZE) + 10
    memory = blocks * stats.kv_bytes // stats.kv_blocks_total
    with hf_paged.enabled(model, kv_cache_memory=memory, **options):
        got = run(model, requests)
        assert hf_paged.stats(model).preemptions > 0
    return got


def with_prefix_hits(model: Any, requests: list[Request], **options: Any) -> list[Transcript]:
    with hf_paged.enabled(model, **options):
        run(model, requests[::2])
        before = hf_paged.stats(model).prefix_hit_tokens
        got = run(model, requests)
        assert hf_paged.stats(model).prefix_hit_tokens > before
    return got


def from_threads(model: Any, requests: list[Request], **options: Any) -> list[Transcript]:
    """In random order from four threads, some of which wait for their results."""
    got: dict[int, Transcript] = {}
    order = list(range(len(requests)))
    random.Random(len(requests)).shuffle(order)

    def work(mine: list[int]) -> None:
        for i in range(0, len(mine), 3):
            part = mine[i : i + 3]
            got.update(zip(part, run(model, [requests[n] for n in part]), strict=True))

    with hf_paged.enabled(model, **options):
        threads = [threading.Thread(target=work, args=(order[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [got[i] for i in range(len(requests))]


def with_drafts(model: Any, requests: list[Request], **options: Any) -> list[Transcript]:
    drafting = [(prompt, kwargs | {"prompt_lookup_num_tokens": 4}) for prompt, kwargs in requests]
    with hf_paged.enabled(model, **options):
        got = run(model, drafting)
        assert hf_paged.stats(model).drafted_tokens > 0
    return got


CONDITIONS = [in_one_batch, in_chunks, preempted, with_prefix_hits, from_threads, with_drafts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_has_the_same_bits_whatever_else_happens(
    family: str, dtype: torch.dtype, parity_seed: int
) -> None:
    model = make_model(family, dtype=dtype, eos_token_id=None)
    requests = make_requests(24, parity_seed)
    expected = run_alone(model, requests)
    for condition in CONDITIONS:
        got = condition(model, requests, **ON)
        assert not differing(expected, got), condition.__name__


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_check_fails_without_the_option(family: str, condition: Any) -> None:
    model = make_model(family, eos_token_id=None)
    requests = make_requests(24, 0)
    expected = run_alone(model, requests, **OFF)
    assert differing(expected, condition(model, requests, **OFF))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(5))
def test_many_schedules(family: str, dtype: torch.dtype, seed: int, parity_seed: int) -> None:
    source = random.Random(f"{parity_seed}:{seed}:{family}")
    shape = (
        {"n_embd": 96, "n_head": 3} if family != "llama" else {"hidden_size": 96, "num_attention_heads": 6}
    )
    model = make_model(family, dtype=dtype, seed=seed, **shape)
    requests = make_requests(64, source.randrange(2**30), longest=80)
    expected = run_alone(model, requests, max_num_batched_tokens=source.choice([None, 300]), block_size=16)
    for size in (2, 7, 33, 64):
        chosen = source.sample(range(64), size)
        options = {
            "max_num_seqs": source.choice([4, 16, 64]),
            "max_num_batched_tokens": source.choice([5, 17, 64, None]),
            "prefix_caching": source.choice([True, False]),
            "deterministic": True,
        }
        with hf_paged.enabled(model, **options):
            for _ in range(2):
                got = run(model, [requests[i] for i in chosen])
                assert not differing([expected[i] for i in chosen], got), (size, options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_threads_changes_no_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    requests = make_requests(12, 3)
    before = torch.get_num_threads()
    parts: set[int] = set()
    launch_parallel = cpu_runtime._launch_parallel

    def counted(kernel: Any, bins: int, arguments: int) -> None:
        parts.add(bins)
        launch_parallel(kernel, bins, arguments)

    expected = in_one_batch(model, requests, **ON)  # too little work for a second thread
    monkeypatch.setattr(cpu_runtime, "_launch_parallel", counted)
    monkeypatch.setattr(cpu_runtime, "_MIN_BYTES_PER_THREAD", 64)
    monkeypatch.setattr(cpu_runtime, "_numba_threads", lambda: 8)
    # numba has as many threads as there are processors; what matters is how the work is cut.
    monkeypatch.setattr(numba, "set_num_threads", lambda count: None)
    try:
        for count in (2, 3, 8):
            torch.set_num_threads(count)  # noqa: TID251 - put back below
            assert not differing(expected, in_one_batch(model, requests, **ON)), count
    finally:
        torch.set_num_threads(before)  # noqa: TID251
    assert {2, 3, 8} <= parts


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("gpt2", {"activation_function": "gelu"}),
    "relu": ("gpt_bigcode", {"activation_function": "relu", "multi_query": False}),
    "odd_sizes": ("gpt2", {"n_embd": 51, "n_head": 3, "n_inner": 77}),
    "odd_vocabulary": ("llama", {"vocab_size": 131, "tie_word_embeddings": True, "intermediate_size": 101}),
    "rope_dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    family, overrides = VARIANTS[name]
    model = make_model(family, **overrides)
    requests = make_requests(12, 5)
    expected = run_alone(model, requests)
    assert not differing(expected, in_one_batch(model, requests, **ON))
    assert not differing(expected, in_chunks(model, requests, **ON))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapters_a_request(family: str, dtype: torch.dtype) -> None:
    adapters = {"a": config(family), "b": config(family, r=16), "c": config(family, "lora_bias", r=5)}
    model = peft_model(family, adapters, dtype=dtype)
    names = ["a", "__base__", "b", "c", ["a", "b"]]
    requests = [
        (prompt, options | {"adapter": names[i % len(names)]})
        for i, (prompt, options) in enumerate(make_requests(20, 7))
    ]
    expected = run_alone(model, requests)
    assert (
        len({tuple(tokens) for tokens, _ in run_alone(model, [(requests[0][0], o) for _, o in requests[:4]])})
        > 1
    )
    for condition in (in_one_batch, in_chunks, preempted, with_prefix_hits):
        assert not differing(expected, condition(model, requests, **ON)), condition.__name__


def test_beams_beside_other_traffic() -> None:
    model = make_model("gpt2")
    prompts = random_prompts([9, 21, 40], seed=4)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}

    def beams(model: Any, prompts: list[list[int]], others: list[Request]) -> list[Any]:
        engine = hf_paged.engine(model)
        handles = [engine.submit(p, **options) for p in prompts]
        run(model, others)
        found = [handle.result(timeout=120).beams for handle in handles]
        return [[(beam.token_ids, beam.score) for beam in one] for one in found]

    with hf_paged.enabled(model, deterministic=True, prefix_caching=False):
        expected = [beams(model, [p], [])[0] for p in prompts]
        assert beams(model, prompts, make_requests(12, 6)) == expected


def test_generate_returns_the_same_scores_in_any_batch() -> None:
    model = make_model("llama", eos_token_id=None)
    prompts = random_prompts([12] * 9, seed=8)
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with hf_paged.enabled(model, deterministic=True):
        alone = [model.generate(torch.tensor([p]), **options) for p in prompts]
        hf_paged.invalidate(model)
        together = model.generate(torch.tensor(prompts), **options)
        assert hf_paged.stats(model).native_calls == 10
    for row, one in enumerate(alone):
        assert torch.equal(one.sequences[0], together.sequences[row])
        for mine, all_rows in zip(one.logits, together.logits, strict=True):
            assert torch.equal(mine[0], all_rows[row])


def test_tokens_are_those_of_upstream() -> None:
    for family in FAMILIES:
        model = make_model(family, eos_token_id=None)
        prompts = random_prompts([5, 30, 64], seed=9)
        expected = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0] for p in prompts]
        with hf_paged.enabled(model, deterministic=True):
            results = hf_paged.generate_many(model, prompts, max_new_tokens=12, do_sample=False)
        for prompt, row, result in zip(prompts, expected, results, strict=True):
            tokens = row[len(prompt) :].tolist()
            assert result.token_ids == (tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


_TRANSCRIPTS = """
from tests.helpers import FAMILIES, make_model
from tests.test_deterministic import ON, in_one_batch, make_requests
for family in FAMILIES:
    print(in_one_batch(make_model(family), make_requests(8, 5), **ON))
"""


def test_a_process_that_compiles_and_one_that_loads_the_kernels_agree(tmp_path: Path) -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", _TRANSCRIPTS],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr
    assert runs[0].stdout == runs[1].stdout
    assert "TokenLogprobs" in runs[0].stdout
