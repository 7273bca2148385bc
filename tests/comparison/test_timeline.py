"""What ran at once and how much KV it took: worked out by hand for small batches, and against a real cache."""

from __future__ import annotations

import pytest
import torch

import hf_paged
from hf_paged.comparison.arm_paged import timeline_of, traced
from hf_paged.comparison.timeline import Moment, Timeline, kv_bytes_per_token, of_batch, of_token_times
from tests.helpers import FAMILIES, make_model


def test_a_padded_batch_keeps_room_for_pads_and_finished_rows() -> None:
    moments = of_batch(1.0, [2.0, 3.0, 4.0], prompts=[2, 5], outputs=[1, 3])
    assert moments == [
        Moment(1.0, 2, 10, 7),  # the prompts, padded to the longest
        Moment(2.0, 2, 10, 7),
        Moment(3.0, 1, 12, 6),  # the first row is finished and goes on
        Moment(4.0, 1, 14, 7),
    ]
    timeline = Timeline(tuple(moments), 100)
    assert timeline.mean_running == 1.5
    assert timeline.waste == pytest.approx(1 - 27 / 46)
    assert timeline.peak_kv_bytes == 1400


def test_requests_of_continuous_batching_hold_whole_pages_while_they_run() -> None:
    moments = of_token_times([3, 20], [(1.0, 2.0, 3.0), (2.0, 4.0)], page_size=16, seconds=10.0)
    at = {round(m.seconds, 4): m for m in moments}
    assert at[0.5025] == Moment(0.5025, 0, 0, 0)
    assert at[1.5025] == Moment(1.5025, 1, 16, 3)
    assert at[2.5025] == Moment(2.5025, 2, 16 + 32, 4 + 20)
    assert at[3.5025] == Moment(3.5025, 1, 32, 20)
    assert at[5.5025].running == 0
    assert Timeline(tuple(moments), 1).mean_running == pytest.approx((1 + 2 + 1) / 3, rel=0.01)


def test_a_long_timeline_is_thinned_and_keeps_its_peak() -> None:
    moments = tuple(Moment(k / 10, 1, 1000 if k == 777 else 5, 5) for k in range(3000))
    data = Timeline(moments, 2).to_dict()
    assert len(data["seconds"]) == len(data["running"]) == len(data["kv_bytes"]) == 150
    assert max(data["kv_bytes"]) == 2000
    assert data["seconds"] == sorted(data["seconds"])


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_token_are_those_of_upstreams_cache(family: str) -> None:
    model = make_model(family)
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model) * 3 == held


def test_the_engine_traces_its_steps_only_when_asked() -> None:
    with hf_paged.enabled(make_model("llama")) as model:
        hf_paged.generate_many(model, [[5, 6, 7]], max_new_tokens=4)
        trace = traced(model)
        hf_paged.generate_many(model, [[5, 6, 7], [8] * 20], max_new_tokens=6, eos_token_id=None)
        steps = len(trace)
        assert [r.num_sequences for r in trace] == [2] * steps
        assert steps == 6
        assert trace[0].tokens_held == 23
        assert trace[-1].tokens_held == 23 + 2 * 5
        assert all(r.blocks_used == 3 for r in trace[:5])
        timeline = timeline_of(trace, trace[0].ended_at, 16, model)
        assert timeline.mean_running == 2
        assert timeline.moments[0].slots == 48
