"""Arms under Poisson arrivals: every request is served with the right tokens, none before it came."""

from __future__ import annotations

import pytest

import hf_paged
from hf_paged.comparison.arm_continuous import ContinuousBatchingArm
from hf_paged.comparison.arm_generate import LoopArm, PaddedArm, PagedLoopArm
from hf_paged.comparison.arm_paged import PagedArm
from hf_paged.comparison.arms import Arm, ArmContext
from hf_paged.comparison.rates import fell_behind
from hf_paged.comparison.timing import RequestTiming
from hf_paged.comparison.workloads import Request
from tests.helpers import make_model

REQUESTS = [Request(tuple(range(5, 5 + n)), limit) for n, limit in ((3, 6), (9, 4), (2, 8), (5, 5), (7, 3))]
ARRIVALS = [0.0, 0.01, 0.02, 0.2, 0.21]
SMALL = {"padded_sizes": (2,), "padded_orders": ("prompt",), "pool_rows": (4,), "repeats": 1}


@pytest.mark.parametrize(
    "make",
    [
        LoopArm,
        PagedLoopArm,
        lambda context: PaddedArm(context, batch_size=2),
        lambda context: ContinuousBatchingArm(context, pool_rows=4),
        PagedArm,
    ],
    ids=["loop", "hf_paged_loop", "padded", "generate_batch", "hf_paged"],
)
def test_every_arm_serves_requests_as_they_come(make: type[Arm]) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    context = ArmContext(model, REQUESTS)
    expected = LoopArm(context).run(lambda count: None).outputs
    finished: list[int] = []
    run = make(context).serve(ARRIVALS, finished.append)
    assert sum(finished) == 5
    assert run.outputs == expected
    assert [t.arrival for t in run.timings] == ARRIVALS
    for timing, request in zip(run.timings, REQUESTS, strict=True):
        assert timing.num_tokens == request.max_new_tokens
        assert timing.end > timing.arrival
        assert timing.first_token is None or timing.arrival < timing.first_token <= timing.end
        assert len(timing.token_times) in (0, timing.num_tokens)
    assert run.seconds >= 0.21
    assert not hf_paged.is_enabled(model)


def test_rates_are_run_upwards_until_an_arm_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    behind = RequestTiming(0, 0.0, 9.0, 9.0, 1)
    original = LoopArm.serve

    def slow(self, arrivals, progress):
        run = original(self, arrivals, progress)
        run.timings = [behind] * 8
        return run

    monkeypatch.setattr(LoopArm, "serve", slow)
    report = hf_paged.compare(
        model,
        REQUESTS,
        arms=("loop", "hf_paged"),
        rates=(400.0, 200.0),
        rate_requests=3,
        ignore_eos=True,
        **SMALL,
    )
    assert [(r.arm, r.rate, r.saturated) for r in report.rates] == [
        ("loop", 200.0, True),
        ("hf_paged", 200.0, False),
        ("hf_paged", 400.0, False),
    ]
    assert report.complete


def test_fractions_are_of_what_hf_paged_serves_at_once() -> None:
    report = hf_paged.compare(
        make_model("gpt2"),
        scenario="poisson",
        scale=0.1,
        num_requests=4,
        arms=("hf_paged",),
        rate_fractions=(0.5, 0.25),
        rate_requests=4,
        ignore_eos=True,
        repeats=1,
    )
    most = 4 / report.arms[0].runs[0].seconds
    assert [r.rate for r in report.rates] == [0.25 * most, 0.5 * most]
    assert report.rates[0].goodput["share"] <= 1
    assert report.scenario["name"] == "poisson"


def test_falling_behind_is_a_quarter_without_a_token_at_the_end() -> None:
    early = [RequestTiming(i, i, i + 0.5, i + 1.0, 2) for i in range(12)]
    assert not fell_behind(early)
    assert fell_behind([RequestTiming(i, i, 3.0 * i + 1, 3.0 * i + 2, 2) for i in range(12)])
    assert not fell_behind([RequestTiming(i, i * 0.01, 1.0, 1.0, 2) for i in range(3)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rates": (0.0,)}, "rates=.*each must be above 0"),
        ({"rate_requests": 1}, "rate_requests=1"),
        ({"limits": {"speed": 1}}, "limit 'speed'"),
        ({"scenario": "x"}, "scenario='x'"),
        ({"scenario": "design"}, "a scenario, prompts or lengths"),
        ({"scale": 0.5}, "belongs to a scenario"),
        ({"rate_fractions": (0.5,), "arms": ("loop",)}, "name it among the arms"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_paged.compare(make_model("gpt2"), REQUESTS, **options)
