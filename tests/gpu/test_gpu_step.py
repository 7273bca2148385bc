"""Whole models on the GPU that is here: parity, graphs, preemption, adapters, a soak. The checks are in `step_checks`,
whose tests without a GPU are in `tests/patches/test_triton_step.py`.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.kernels import ops
from tests.gpu import step_checks
from tests.helpers import FAMILIES, demo_model, demo_tokenizer, make_model, native_calls, random_prompts
from tests.kernels.triton_support import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled"),
]

LENGTHS = [1, 5, 17, 33, 40, 64, 2, 15]


def on_gpu(family: str, **options: Any) -> Any:
    """A tiny model on the device, whose texts end at their limits only."""
    model = make_model(family, **options).to(DEVICE)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_upstreams_on_the_familys_kernels(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    # Without graphs, so that each launch is counted.
    with monkeypatch.context() as patch:
        patch.setattr("hf_paged.engine.runtime.make_graphs", lambda *args: None)
        step_checks.check_parity(monkeypatch, family, on_gpu(family), LENGTHS, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_as_exact_as_upstreams(family: str, dtype: torch.dtype) -> None:
    step_checks.check_low_precision(on_gpu(family, dtype=dtype), random_prompts([60] * 8, seed=3), 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_demo_models_write_the_same_text_in_bf16(family: str) -> None:
    """Up to a near-tie of the 16-bit logits themselves: their spacing there is the size of the gap."""
    model, tokenizer = demo_model(family, dtype=torch.bfloat16).to(DEVICE), demo_tokenizer(family)
    prompts = ["def read(self, size=-1):\n", "Return the", "class Error(Exception):", "import os\n"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(DEVICE)
    options = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options |= {"max_new_tokens": 48, "do_sample": False}
    expected = model.generate(**options, return_dict_in_generate=True, output_logits=True)
    with hf_paged.enabled(model), native_calls(model):
        actual = model.generate(**options)
    width = options["input_ids"].shape[1]
    for row in range(len(prompts)):
        for step in range(min(actual.shape[1], expected.sequences.shape[1]) - width):
            if actual[row, width + step] == expected.sequences[row, width + step]:
                continue
            best = expected.logits[step][row].float().topk(2).values
            near = 4 * torch.finfo(torch.bfloat16).eps * best[0].abs()
            assert best[0] - best[1] <= near, f"row {row}, step {step}"
            break


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_replay_other_lengths_and_edited_weights(family: str) -> None:
    step_checks.check_replays(on_gpu(family), LENGTHS, 30)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_upstreams_with_the_same_seed(family: str) -> None:
    model = on_gpu(family)
    ids = torch.tensor(random_prompts([12] * 3), device=DEVICE)
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "top_k": 20, "eos_token_id": None}
    torch.manual_seed(3)
    expected = model.generate(ids, **options)
    with hf_paged.enabled(model), native_calls(model):
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, **options), expected)


def test_seeded_samples_do_not_depend_on_the_batch() -> None:
    model, prompts = on_gpu("llama"), random_prompts(LENGTHS)
    runs = []
    for rows in (8, 3, 1):
        with hf_paged.enabled(model, max_num_seqs=rows), native_calls(model, len(prompts)):
            torch.manual_seed(5)
            results = hf_paged.generate_many(model, prompts, max_new_tokens=12, do_sample=True)
            runs.append([r.token_ids for r in results])
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("graphs", ["auto", False])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_ahead_give_the_same_and_launch_without_waiting(
    monkeypatch: pytest.MonkeyPatch, family: str, graphs: Any
) -> None:
    if graphs is False:
        monkeypatch.setattr("hf_paged.engine.runtime.make_graphs", lambda *args: None)
    step_checks.check_ahead(monkeypatch, on_gpu(family), LENGTHS, 24)


def test_preempted_sequences_come_out_the_same() -> None:
    step_checks.check_preemption(on_gpu("llama"), [9, 10, 11, 12], 24, 26)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_share_a_batch(family: str) -> None:
    step_checks.check_adapters(family, make_model(family), [3, 9, 14, 6], 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_moved_runs_where_it_is(family: str) -> None:
    step_checks.check_move(family, 8)


def test_a_soak_leaves_nothing_behind() -> None:
    step_checks.check_soak(on_gpu("llama"), 12, 48, 40)


def test_without_triton_torch_does_it_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    ops._warn_once.cache_clear()
    model, prompts = on_gpu("llama"), random_prompts([4, 7])
    expected = step_checks.one_by_one(model, prompts, 5)
    with pytest.warns(RuntimeWarning, match="triton is not installed") as caught:
        with hf_paged.enabled(model), native_calls(model, 2):
            assert step_checks.greedy(model, prompts, 5) == expected
    assert len([w for w in caught if "triton is not installed" in str(w.message)]) == 1


def test_a_graph_step_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with hf_paged.enabled(on_gpu("gpt2"), cuda_graphs=True) as model:
            step_checks.greedy(model, random_prompts([5, 6]), 6)
            assert hf_paged.stats(model).graph_replays > 0
