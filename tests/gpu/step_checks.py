"""Checks of whole models on the Triton backend: on a GPU by `test_gpu_step.py`, on tiny models in the interpreter by
`tests/patches/test_triton_step.py`, so that what runs on the day a GPU is there has run before.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

import hf_paged
from hf_paged.engine import runtime
from hf_paged.engine.loop import StepLoop
from hf_paged.errors import RequestCancelledError
from hf_paged.kernels import triton_activation, triton_backend, triton_launch, triton_rms_norm  # noqa: F401
from tests.helpers import VOCAB_SIZE, assert_same_tokens, left_pad, make_model, native_calls, random_prompts
from tests.integrations import peft_models
from tests.kernels.triton_support import DEVICE
from tests.parity.test_half_precision import engine_logits

_ATTENTION = {"paged_decode_kernel", "paged_prefill_kernel"}
#: Kernels that greedy steps of a family launch.
LAUNCHED = {
    "gpt2": {"store_kv_kernel", *_ATTENTION},
    "gpt_bigcode": {"store_kv_kernel", *_ATTENTION},
    "llama": {"store_kv_rope_kernel", "rms_norm_kernel", "silu_mul_kernel", *_ATTENTION},
}


@contextlib.contextmanager
def counted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts launches by the kernel's name while it is open."""
    counts: Counter[str] = Counter()
    launch = triton_launch.launch

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counts[kernel.fn.__name__] += 1
        launch(kernel, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("hf_paged.kernels.triton_") and getattr(module, "launch", None) is launch:
                patch.setattr(module, "launch", counting)
        yield counts


def check_parity(
    monkeypatch: pytest.MonkeyPatch, family: str, model: Any, lengths: list[int], new: int
) -> None:
    """Greedy `generate` of ragged rows in float32 equals upstream's, and the family's own kernels did it."""
    batch = {name: part.to(DEVICE) for name, part in left_pad(random_prompts(lengths)).items()}
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    with counted_launches(monkeypatch) as launches, hf_paged.enabled(model, backend="triton"):
        with native_calls(model):
            assert_same_tokens(model.generate(**batch, **options), expected)
    assert set(launches) == LAUNCHED[family] | (set(launches) & {"combine_splits_kernel"})
    layers = model.config.num_hidden_layers
    assert launches["paged_decode_kernel"] == layers * (new - 1)
    assert launches["paged_prefill_kernel"] == layers
    if family == "llama":
        # Two norms a layer, the second with its sum, and one at the end, each step.
        assert launches["rms_norm_kernel"] == new * (2 * layers + 1)


def greedy(model: Any, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """New tokens of each prompt by `generate_many`, none ending before its limit."""
    results = hf_paged.generate_many(
        model, prompts, max_new_tokens=new, do_sample=False, eos_token_id=None, **options
    )
    assert all(r.finish_reason == "length" for r in results)
    return [r.token_ids for r in results]


def one_by_one(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The same by plain `generate`."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        output = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        rows.append(output[0, len(prompt) :].tolist())
    return rows


def check_low_precision(low: Any, texts: list[list[int]], prompt_len: int) -> None:
    """Logits in 16 bits are as near to those in float32 as upstream's own, at prompts and at decode steps."""
    exact = copy.deepcopy(low).float()
    ids = torch.tensor(texts, device=DEVICE)
    kept = slice(prompt_len - 1, len(texts[0]) - 1)
    with torch.no_grad():
        truth = exact(input_ids=ids).logits[:, kept]
        upstream = low(input_ids=ids).logits[:, kept].float()
    ours = engine_logits(low, texts, prompt_len, backend="triton")
    error, allowed = (ours - truth).pow(2).mean().sqrt(), (upstream - truth).pow(2).mean().sqrt()
    assert allowed > 0
    assert error <= 2 * allowed, f"root mean square error {error:.2e}, upstream's {allowed:.2e}"


def check_replays(model: Any, lengths: list[int], new: int) -> None:
    """With graphs and without, the same tokens, for lengths in another order and for weights that were edited."""
    model.generation_config.eos_token_id = None
    prompts = random_prompts(lengths)
    with hf_paged.enabled(model, backend="triton") as model:
        for turn in range(3):
            order = prompts[turn:] + prompts[:turn]
            with native_calls(model, len(order)):
                ours = greedy(model, order, new)
            with hf_paged.paused(model), torch.no_grad():
                assert ours == plain_greedy(model, order, new), f"turn {turn}"
                for parameter in model.parameters():
                    parameter.mul_(0.9)
        stats = hf_paged.stats(model)
        if DEVICE.type == "cuda":
            assert stats.graph_captures == 1, "in-place edits and other lengths need no new graph"
            assert stats.graph_replays == 3 * (new - 1) - 1
        with hf_paged.paused(model), torch.no_grad():
            weight = next(p for p in model.parameters() if p.dim() == 2)
            weight.data = weight.data.clone()
            del weight
        greedy(model, prompts, new)
        if DEVICE.type == "cuda":
            assert hf_paged.stats(model).graph_captures == 2, "a tensor that moved"


def plain_greedy(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """By the model's own forward over the whole text each time: what it computes outside of steps."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        for _ in range(new):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        rows.append(ids[0, len(prompt) :].tolist())
    return rows


def check_preemption(model: Any, lengths: list[int], new: int, blocks: int) -> None:
    """A pool of too few blocks of 4 tokens: sequences are computed again, and come out the same."""
    model.generation_config.eos_token_id = None
    prompts = random_prompts(lengths)
    expected = one_by_one(model, prompts, new)
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = config.hidden_size // config.num_attention_heads
    block_bytes = 4 * 2 * kv_heads * head_size * config.num_hidden_layers * model.dtype.itemsize
    options = {"block_size": 4, "kv_cache_memory": blocks * block_bytes, "backend": "triton"}
    with hf_paged.enabled(model, **options), native_calls(model, len(prompts)):
        assert greedy(model, prompts, new) == expected
        assert hf_paged.stats(model).preemptions > 0


def check_adapters(family: str, model: Any, lengths: list[int], new: int) -> None:
    """Rows of two adapters and of none in one batch are what each is alone."""
    model.generation_config.eos_token_id = None
    wrapped = peft.get_peft_model(model, peft_models.config(family), adapter_name="first").to(DEVICE)
    wrapped.add_adapter("second", peft_models.config(family))
    wrapped.to(DEVICE).eval()
    prompts = random_prompts(lengths)
    names = [("first", "second")[i % 2] for i in range(len(prompts))]
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        wrapped.set_adapter(name)
        expected += one_by_one(wrapped, [prompt], new)
    with hf_paged.enabled(wrapped, backend="triton"), native_calls(wrapped, len(prompts)):
        assert greedy(wrapped, prompts, new, adapters=names) == expected


@contextlib.contextmanager
def unwaited_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU: what launches a step, and the choice of its tokens, raises where it waits for the device."""

    def unwaited(launch: Any) -> Any:
        def run(*args: Any) -> Any:
            if DEVICE.type != "cuda":
                return launch(*args)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(*args)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return run

    with monkeypatch.context() as patch:
        for name in ("_forward", "_choose"):
            patch.setattr(StepLoop, name, unwaited(getattr(StepLoop, name)))
        yield


def check_ahead(monkeypatch: pytest.MonkeyPatch, model: Any, lengths: list[int], new: int) -> None:
    """Steps one ahead of the device give what steps in turn give, some texts ending early, and none of them waits."""
    prompts = random_prompts(lengths)
    kinds: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3},
        {"do_sample": True, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 4},
    ]
    found = []
    for ahead in (False, True):
        with monkeypatch.context() as patch:
            if not ahead:
                patch.setattr(runtime, "make_ahead", lambda backend, devices: None)
            with (
                hf_paged.enabled(model, backend="triton", block_size=8),
                native_calls(model, 2 * len(prompts)),
            ):
                _submit_all(model, prompts, kinds, new)  # compiles, and captures
                with unwaited_launches(monkeypatch) if ahead else contextlib.nullcontext():
                    found.append(_submit_all(model, prompts, kinds, new))
                stats = hf_paged.stats(model)
                assert (stats.steps_ahead > 0) == ahead
                assert stats.kv_blocks_used == 0
    assert found[0] == found[1]


def _submit_all(
    model: Any, prompts: list[list[int]], kinds: list[dict[str, Any]], new: int
) -> list[tuple[list[int], Any]]:
    client = hf_paged.engine(model)
    options = {"max_new_tokens": new, "eos_token_id": list(range(3, VOCAB_SIZE, 16))}
    handles = [client.submit(prompt, **options, **kinds[i % len(kinds)]) for i, prompt in enumerate(prompts)]
    results = [handle.result(timeout=120) for handle in handles]
    hf_paged.invalidate(model)
    return [(result.token_ids, result.finish_reason) for result in results]


def check_soak(model: Any, rounds: int, requests: int, new: int) -> None:
    """Rounds of ragged requests, a third of them cancelled; afterwards nothing is held and memory is as it was."""
    model.generation_config.eos_token_id = None
    source = random.Random(0)
    held = []
    with hf_paged.enabled(model, backend="triton", block_size=8) as model:
        client = hf_paged.engine(model)
        for _ in range(rounds):
            lengths = [source.randrange(1, 40) for _ in range(requests)]
            handles = [
                client.submit(
                    prompt, max_new_tokens=source.randrange(1, new), do_sample=False, eos_token_id=None
                )
                for prompt in random_prompts(lengths, seed=source.randrange(1000))
            ]
            for handle in source.sample(handles, requests // 3):
                handle.cancel()
            cancelled = 0
            for handle in handles:
                try:
                    assert handle.result(timeout=120).finish_reason == "length"
                except RequestCancelledError:
                    cancelled += 1
            assert cancelled <= requests // 3
            hf_paged.release_memory(model)
            assert hf_paged.stats(model).kv_blocks_used == 0
            gc.collect()
            held.append(torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0)
    assert held[-1] <= held[min(1, len(held) - 1)] + 2**20, f"allocated after each round: {held}"


def check_move(family: str, new: int, **shape: Any) -> None:
    """A model enabled on the CPU and moved afterwards runs where it is now, in the dtype it has now."""
    model = make_model(family, **shape)
    model.generation_config.eos_token_id = None
    prompts = random_prompts([5, 3])
    with hf_paged.enabled(model) as model:
        greedy(model, prompts, 2)
        model.to(DEVICE)
        with native_calls(model, 2):
            ours = greedy(model, prompts, new)
        with hf_paged.paused(model), torch.no_grad():
            assert ours == plain_greedy(model, prompts, new)
        model.half()
        with native_calls(model, 2):
            greedy(model, prompts, new)
