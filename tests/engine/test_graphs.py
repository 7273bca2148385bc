"""Decode steps as graphs: which one a step takes, what its buffers hold, when graphs go. A fake stands for CUDA's: it
runs again what was captured, on the same tensors, whose host copies say nothing about any step.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import hf_paged
from hf_paged.engine import graphs, runtime
from hf_paged.engine.batch import StepArrays
from hf_paged.engine.step_buffers import StepBuffers
from hf_paged.errors import ConfigError
from hf_paged.kernels import triton_activation, triton_backend, triton_rms_norm  # noqa: F401  # before the env may change
from tests.helpers import make_model, native_calls, random_prompts

MOST = 8
PROMPTS = random_prompts([5, 2])
#: As small as can be: the interpreter takes a millisecond a program.
SHAPE = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}


class FakeGraph:
    """Runs what it captured, into one output, as a replay does."""

    error: Exception | None = None

    def __init__(self, device: torch.device, pool: Any) -> None:
        self.output: torch.Tensor | None = None

    def capture(self, run: Any) -> None:
        if self.error is not None:
            raise self.error
        self.run = run

    def replay(self) -> torch.Tensor:
        output = self.run()
        self.output = output if self.output is None else self.output.copy_(output)
        return self.output


@pytest.fixture(autouse=True)
def _fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(config: Any, device: torch.device, backend: str, cache: Any) -> graphs.DecodeGraphs | None:
        return None if config.cuda_graphs is False else graphs.DecodeGraphs(device, backend, cache, MOST)

    monkeypatch.setattr(runtime, "make_graphs", make)
    monkeypatch.setattr(graphs, "_new_graph", FakeGraph)
    monkeypatch.setattr(graphs, "_new_pool", lambda device: object())
    monkeypatch.setattr(graphs, "_LEAST_WIDTH", 1)


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = make_model("llama", **SHAPE)
    model.generation_config.eos_token_id = None
    with hf_paged.enabled(model, backend="triton", fallback="error") as model:
        yield model


def tokens(model: Any, limits: tuple[int, ...] = (3, 2), **options: Any) -> list[list[int]]:
    configs = [{"max_new_tokens": n, "do_sample": False, "eos_token_id": None} | options for n in limits]
    from transformers import GenerationConfig

    prompts = PROMPTS[: len(limits)]
    results = hf_paged.generate_many(
        model, prompts, generation_config=[GenerationConfig(**c) for c in configs]
    )
    return [r.token_ids for r in results]


def upstream(model: Any, limits: tuple[int, ...] = (3, 2)) -> list[list[int]]:
    rows = []
    with hf_paged.paused(model), torch.no_grad():
        for prompt, limit in zip(PROMPTS, limits, strict=False):
            ids = torch.tensor([prompt])
            for _ in range(limit):
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
            rows.append(ids[0, len(prompt) :].tolist())
    return rows


def counts(model: Any) -> tuple[int, int]:
    stats = hf_paged.stats(model)
    return stats.graph_captures, stats.graph_replays


@pytest.mark.parametrize(
    "rows, size",
    [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (64, 64), (65, 80), (250, 256), (257, 300)],
)
def test_a_step_takes_the_next_size(rows: int, size: int) -> None:
    assert graphs.size_for(rows, 300) == size


def test_a_step_beyond_the_largest_size_has_no_graph() -> None:
    assert graphs.size_for(9, MOST) is None
    assert graphs.size_for(7, 7) == 7


@pytest.mark.parametrize("blocks, width", [(1, 64), (64, 64), (65, 128), (1000, 1024)])
def test_tables_are_as_wide_as_the_next_power_of_two(
    blocks: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_LEAST_WIDTH", 64)
    assert graphs.width_for(blocks) == width


def step_of(rows: int, columns: int) -> StepArrays:
    longs = np.arange(3 * rows, dtype=np.int64).reshape(3, rows) + 100
    return StepArrays(
        ids=longs[0],
        positions=longs[1],
        slots=longs[2],
        tables=np.full((rows, columns), 7, np.int32),
        seq_lens=np.arange(1, rows + 1, dtype=np.int32),
        starts=np.arange(rows + 1, dtype=np.int32),
        logits_indices=np.arange(rows),
    )


def test_buffers_stay_and_padding_is_cleared_of_the_step_before() -> None:
    buffers = StepBuffers(4, 6, torch.device("cpu"))
    inputs = buffers.inputs(owner=None, backend="triton", kv_layer=lambda layer: None)
    static = (
        inputs.input_ids,
        inputs.position_ids,
        inputs.metadata.slot_mapping,
        inputs.metadata.block_tables,
    )
    before = [tensor.data_ptr() for tensor in static]
    buffers.fill(step_of(4, 5))
    buffers.fill(step_of(2, 3))
    assert [tensor.data_ptr() for tensor in static] == before
    assert inputs.input_ids.tolist() == [[100, 101, 0, 0]]
    assert inputs.position_ids.tolist() == [[102, 103, 0, 0]]
    assert inputs.metadata.slot_mapping.tolist() == [104, 105, -1, -1]
    assert inputs.metadata.block_tables.tolist() == [[7, 7, 7, 0, 0, 0]] * 2 + [[0] * 6] * 2
    assert inputs.metadata.seq_lens.tolist() == [1, 2, 0, 0]
    assert inputs.metadata.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert inputs.logits_indices.tolist() == [0, 1, 2, 3]


def test_a_shrinking_batch_is_replayed_and_right(enabled: Any) -> None:
    with native_calls(enabled, 2):
        assert tokens(enabled) == upstream(enabled)
    # 2 rows, then 1: each size is captured at its first step, and none of these steps was a replay.
    assert counts(enabled) == (2, 0)
    # The other way round, and longer.
    assert tokens(enabled, (3, 5)) == upstream(enabled, (3, 5))
    assert counts(enabled) == (2, 4)


def test_an_edit_in_place_keeps_graphs_and_counts(enabled: Any) -> None:
    tokens(enabled)
    with hf_paged.paused(enabled), torch.no_grad():
        for parameter in enabled.parameters():
            parameter.mul_(0.5)
    assert tokens(enabled) == upstream(enabled)
    assert counts(enabled) == (2, 2)


def replace_data(model: Any) -> None:
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data * 0.5


def replace_parameter(model: Any) -> None:
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 0.5)


def replace_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = type(model.model.layers[0].mlp.act_fn)()


def move_cache(model: Any) -> None:
    hf_paged.engine.registry.get(model)._loop.runtime.cache.generation += 1


@pytest.mark.parametrize(
    "change",
    [
        replace_data,
        move_cache,
        pytest.param(replace_parameter, marks=pytest.mark.slow),
        pytest.param(replace_module, marks=pytest.mark.slow),
    ],
)
def test_what_lies_elsewhere_is_captured_again(enabled: Any, change: Any) -> None:
    tokens(enabled)
    with hf_paged.paused(enabled):
        change(enabled)
    assert tokens(enabled) == upstream(enabled)
    assert counts(enabled) == (4, 0)


def test_no_tensor_of_the_model_is_held_when_idle(enabled: Any) -> None:
    import weakref

    tokens(enabled, (2,))
    layer = enabled.model.layers[0].mlp.down_proj
    old = weakref.ref(layer.weight)
    with hf_paged.paused(enabled):
        replace_parameter(enabled)
    assert old() is None


def test_what_cannot_be_captured_runs_as_it_is_and_says_so_once(
    enabled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "error", RuntimeError("operation not permitted\nwhen capturing"))
    with pytest.warns(
        RuntimeWarning, match=r"could not be captured \(RuntimeError: operation not permitted\)"
    ):
        assert tokens(enabled) == upstream(enabled)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert tokens(enabled) == upstream(enabled)
    assert counts(enabled) == (0, 0)


def test_steps_that_hand_out_more_than_logits_are_no_graphs(enabled: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with native_calls(enabled):
        enabled.generate(
            ids, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True, eos_token_id=None
        )
    assert counts(enabled) == (0, 0)


def test_steps_under_autocast_are_no_graphs(enabled: Any) -> None:
    with torch.autocast("cpu", dtype=torch.float16), native_calls(enabled):
        enabled.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, eos_token_id=None)
    assert counts(enabled) == (0, 0)


def test_scores_of_a_step_outlive_the_next_replays(enabled: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    options = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
    runs = [
        enabled.generate(ids, return_dict_in_generate=True, output_logits=True, **options).logits
        for _ in range(2)
    ]
    assert counts(enabled)[1] > 0
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second)


def test_adapters_run_as_they_are() -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama", **SHAPE), config)
    with hf_paged.enabled(model.eval(), backend="triton"), native_calls(model):
        tokens(model, (3,))
        assert counts(model) == (0, 0)


def test_graphs_asked_for_where_they_are_not_possible_are_refused() -> None:
    config = hf_paged.PagedConfig(cuda_graphs=True)
    with pytest.raises(ConfigError, match="cuda_graphs=True: not possible on cpu with backend 'cpu'"):
        graphs.make_graphs(config, torch.device("cpu"), "cpu", None)
    for value in ("auto", False):
        assert (
            graphs.make_graphs(hf_paged.PagedConfig(cuda_graphs=value), torch.device("cpu"), "cpu", None)
            is None
        )
    made = graphs.make_graphs(
        hf_paged.PagedConfig(), torch.device("cuda"), "triton", type("C", (), {"generation": 0})
    )
    assert isinstance(made, graphs.DecodeGraphs)
