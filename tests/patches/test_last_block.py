"""The last block's short form: the tokens and logits of the whole block, and only where nothing is lost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_paged
from hf_paged.engine import batch, registry
from hf_paged.kernels import ops
from hf_paged.step import StepInputs
from tests.helpers import FAMILIES, make_model, native_calls, random_prompts

NEVER = 1 << 62


def watch_steps(monkeypatch: pytest.MonkeyPatch, least_cut: int) -> list[StepInputs]:
    """What steps are given from now on, with the short form from `least_cut` tokens on."""
    seen: list[StepInputs] = []
    build = batch.build

    def recorded(*args: Any, **kwargs: Any) -> StepInputs:
        seen.append(build(*args, **kwargs | {"least_cut": least_cut}))
        return seen[-1]

    monkeypatch.setattr(batch, "build", recorded)
    return seen


def watch_queries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the queries of each layer's attention from now on."""
    rows: list[int] = []
    attention: Callable[..., Any] = ops.paged_attention

    def counted(query: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(query))
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(ops, "paged_attention", counted)
    return rows


def options(num_rows: int, width: int, **more: Any) -> dict[str, Any]:
    mask = torch.ones(num_rows, width, dtype=torch.int64)
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    return {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, **wanted, **more}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_prefixes_and_decodes_give_the_tokens_of_the_whole_block(
    family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts([40, 3, 57, 24, 33])
    config = hf_paged.PagedConfig(backend=backend, max_num_batched_tokens=48, max_num_seqs=4, block_size=8)
    runs = []
    for least in (NEVER, 2):
        with monkeypatch.context() as patch:
            steps = watch_steps(patch, least)
            model = make_model(family)
            with hf_paged.enabled(model, config=config):
                first = hf_paged.generate_many(model, prompts, max_new_tokens=6)
                long = hf_paged.generate_many(model, random_prompts([70], seed=1), max_new_tokens=6)
                again = hf_paged.generate_many(model, [prompts[2][:32] + prompts[0][:20]], max_new_tokens=6)
                assert hf_paged.stats(model).prefix_hit_tokens >= 32
        runs.append([list(result.token_ids) for result in (*first, *long, *again)])
        cut = [step for step in steps if step.tail is not None]
        assert bool(cut) == (least == 2)
    assert any(step.metadata.num_decodes for step in cut), "no step had decodes beside prompts"
    assert any(not len(step.logits_indices) for step in cut), "no chunk ended before its prompt"
    assert runs[0] == runs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_attends_for_last_tokens_only_and_equals_upstream(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    ids = torch.tensor(random_prompts([48, 48]))
    expected = model.generate(ids, **options(2, 48))
    watch_steps(monkeypatch, 2)
    queries = watch_queries(monkeypatch)
    with hf_paged.enabled(model), native_calls(model, 1):
        output = model.generate(ids, **options(2, 48))
    assert queries[:2] == [96, 2]
    assert set(queries[2:]) == {2}
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_recorded_steps_and_autocast_run_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    ids = torch.tensor(random_prompts([48, 48]))
    watch_steps(monkeypatch, 2)
    queries = watch_queries(monkeypatch)
    with hf_paged.enabled(model), native_calls(model, 2):
        states = model.generate(ids, **options(2, 48, output_hidden_states=True)).hidden_states
        assert [tuple(layer.shape[:2]) for layer in states[0]] == [(2, 48)] * 3
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.generate(ids[:, :40], **options(2, 40))
    assert queries.count(96) == 2
    assert queries.count(80) == 2


@pytest.mark.parametrize("replaced", [False, True])
def test_a_block_with_a_forward_of_its_own_is_left_alone(replaced: bool) -> None:
    model = make_model("llama")
    block: Any = model.model.layers[-1]
    if replaced:
        block.forward = functools.partial(type(block).forward, block)
    with hf_paged.enabled(model):
        engine = registry.get(model)
        assert engine is not None
        assert (engine.patch.least_cut is None) == replaced
