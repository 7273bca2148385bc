"""`hf_paged.compare` on tiny models: all arms run and agree, the report says what it must, the model is left alone."""

from __future__ import annotations

import json

import pytest
import torch

import hf_paged
from hf_paged.comparison.arm_budget import TokenBudgetArm
from hf_paged.comparison.arm_generate import LoopArm, PaddedArm
from hf_paged.comparison.arms import ArmContext
from hf_paged.comparison.equality import compare_outputs
from hf_paged.comparison.report import write_json
from hf_paged.comparison.workloads import Request
from tests.helpers import DEMO_MODELS, EOS, FAMILIES, demo_model, make_model

ALL = ("loop", "padded", "padded_budget", "generate_batch", "hf_paged", "hf_paged_loop")
SMALL = {"padded_sizes": (2,), "padded_orders": ("prompt",), "pool_rows": (4,)}
PROMPTS = [[5, 6, 7], list(range(10, 40)), [9] * 12, [3, 4]]


@pytest.fixture(scope="module")
def report() -> hf_paged.CompareReport:
    model = make_model("llama")
    return hf_paged.compare(model, PROMPTS, max_new_tokens=12, ignore_eos=True, arms=ALL, repeats=3, **SMALL)


def test_all_arms_run_and_give_the_same_tokens(report: hf_paged.CompareReport) -> None:
    assert [a.error for a in report.arms] == [None] * len(ALL)
    assert report.complete
    assert {e.arm for e in report.equality} == set(ALL) - {"loop"}
    for entry in report.equality:
        assert (entry.num_requests, entry.num_equal) == (4, 4), entry
    assert all(a.repeats_equal for a in report.arms)
    assert {r.tokens for a in report.arms for r in a.runs} == {48}


def test_the_hf_paged_arms_are_native(report: hf_paged.CompareReport) -> None:
    for run in report.arm("hf_paged").runs:
        assert run.extra["stats"]["native_calls"] == 4
        assert run.extra["stats"]["fallback_calls"] == {}
        assert 0 <= run.kv_waste < 1


def test_ratios_are_paired_by_repeat(report: hf_paged.CompareReport) -> None:
    for ratio in report.ratios:
        ours, theirs = report.arm("hf_paged").runs, report.arm(ratio.against).runs
        by_repeat = {r.repeat: r.tokens_per_second for r in theirs}
        assert ratio.pairs == [r.tokens_per_second / by_repeat[r.repeat] for r in ours]
        assert len(ratio.pairs) == 3
        values = ratio.to_dict()
        assert values["minimum"] <= values["median"] <= values["maximum"]


def test_first_tokens_come_within_the_run_and_memory_is_measured(report: hf_paged.CompareReport) -> None:
    for name in ("loop", "padded", "generate_batch", "hf_paged"):
        for run in report.arm(name).runs:
            assert 0 < run.first_token_seconds < run.seconds, name
            assert run.peak_memory_bytes is not None
    assert report.arm("hf_paged_loop").runs[0].first_token_note is not None


def test_the_json_has_the_documented_keys(report: hf_paged.CompareReport, tmp_path) -> None:
    report.save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    documented = (
        "schema_version complete model scenario workload options environment arms rates ratios equality"
    )
    assert set(data) == set(documented.split())
    assert data["model"]["model_type"] == "llama"
    assert data["workload"]["num_requests"] == 4
    arm_keys = {"name", "title", "settings", "runs", "calibration", "repeats_equal", "timeline", "error"}
    run_keys = {
        "repeat",
        "seconds",
        "tokens",
        "tokens_per_second",
        "relative_error",
        "requests_run",
        "first_token_seconds",
    }
    run_keys |= {"first_token_note", "peak_memory_bytes", "memory_method", "kv_waste", "extra"}
    run_keys |= {"mean_running", "peak_kv_bytes", "latency", "latency_note", "goodput"}
    for arm in data["arms"]:
        assert set(arm) == arm_keys
        assert {frozenset(run) for run in arm["runs"]} == {frozenset(run_keys)}
    assert not list(tmp_path.glob("*.partial"))


def test_lists_of_numbers_take_one_line_and_nothing_is_changed(tmp_path) -> None:
    data = {
        "a": [1, -2.5, 3e-09, 1e21],
        "b": [[1, 2], []],
        "c": ["[\n  1\n]", "x, y"],
        "d": [[1], "2"],
        "e": [True, 1],
    }
    write_json(tmp_path / "n.json", data)
    text = (tmp_path / "n.json").read_text()
    assert json.loads(text) == data
    assert '"a": [1, -2.5, 3e-09, 1e+21]' in text


def test_the_table_has_a_row_for_each_arm(report: hf_paged.CompareReport) -> None:
    text = str(report)
    for arm in report.arms:
        assert arm.title in text
    assert "equal (4)" in text
    assert "reference" in text


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("gpt2")
    model.train()
    config, attributes = model.generation_config, set(model.__dict__)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    hf_paged.compare(model, PROMPTS, max_new_tokens=4, repeats=1, **SMALL)
    assert model.generation_config is config
    assert model.training
    assert set(model.__dict__) == attributes
    assert model.config._attn_implementation == "sdpa"
    assert not hf_paged.is_enabled(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_demo_models_end_by_their_eos(family: str) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = demo_model(family), AutoTokenizer.from_pretrained(DEMO_MODELS / family)
    result = hf_paged.compare(
        model,
        ["import os\n", "The"],
        tokenizer=tokenizer,
        max_new_tokens=24,
        repeats=1,
        arms=("loop", "hf_paged"),
    )
    assert result.complete, [a.error for a in result.arms]
    assert result.workload["eos_ids"]
    assert [e.equal for e in result.equality] == [True]


def test_eos_ends_a_request_in_every_arm_alike() -> None:
    """The EOS is made the third token of a prompt's own greedy text, so that it must come early."""
    model = make_model("gpt2")
    context = ArmContext(model, [Request(tuple(PROMPTS[1]), 12)])
    free = hf_paged.compare(
        model, PROMPTS[1:2], max_new_tokens=12, ignore_eos=True, repeats=1, arms=("loop",)
    )
    assert free.arms[0].runs[0].tokens == 12
    model.generation_config.eos_token_id = None
    text = LoopArm(context).run(lambda count: None).outputs[0]
    model.generation_config.eos_token_id = text[2]
    early = hf_paged.compare(model, PROMPTS[1:2], max_new_tokens=12, repeats=1, arms=ALL, **SMALL)
    expected = text.index(text[2]) + 1
    assert {a.name: a.runs[0].tokens for a in early.arms} == dict.fromkeys(ALL, expected)


def test_limits_of_each_request_hold_in_every_arm() -> None:
    prompts = [Request((5, 6, 7), 3), Request((8,) * 9, 11), Request((9, 1), 1)]
    result = hf_paged.compare(make_model("llama"), prompts, ignore_eos=True, repeats=1, arms=ALL, **SMALL)
    assert [a.error for a in result.arms] == [None] * len(ALL)
    assert {a.runs[0].tokens for a in result.arms} == {15}


def test_the_best_settings_are_chosen_and_all_are_reported() -> None:
    options = {"padded_sizes": (1, 2), "padded_orders": ("dataset", "oracle"), "pool_rows": (2, 4)}
    result = hf_paged.compare(
        make_model("llama"),
        PROMPTS,
        max_new_tokens=3,
        repeats=1,
        arms=("padded", "generate_batch"),
        **options,
    )
    padded, continuous = result.arms
    assert len(padded.calibration) == 4
    assert len(continuous.calibration) == 2
    best = max(padded.calibration, key=lambda c: c["tokens_per_second"])["settings"]
    assert {k: padded.settings[k] for k in ("batch_size", "order")} == {
        k: best[k] for k in ("batch_size", "order")
    }


def test_an_arm_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such thing here")

    model = make_model("gpt2")
    monkeypatch.setattr(type(model), "continuous_batching_context_manager", broken)
    result = hf_paged.compare(
        model, PROMPTS, max_new_tokens=2, repeats=1, arms=("loop", "generate_batch"), **SMALL
    )
    assert result.arm("loop").runs
    assert result.arm("generate_batch").error == "RuntimeError: no such thing here"
    assert not result.complete
    assert "generate_batch FAILED: RuntimeError: no such thing here" in str(result)


def test_padded_batches_fit_the_positions_and_cover_every_request() -> None:
    model = make_model("gpt2")  # 128 positions
    requests = [Request((1,) * 100, 5), Request((1, 2), 100), Request((3,), 4), Request((4,) * 90, 30)]
    arm = PaddedArm(ArmContext(model, requests, pad_id=2), batch_size=4)
    assert [u.indices for u in arm.units] == [(0,), (1, 2), (3,)]
    outputs = arm.run(lambda count: None).outputs
    assert sorted(outputs) == [0, 1, 2, 3]
    assert all(0 < len(outputs[i]) <= r.max_new_tokens for i, r in enumerate(requests))


def test_vllms_protocol_grows_batches_in_order_to_its_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")  # 128 positions
    lengths = [(10, 20), (30, 5), (20, 30), (4, 4), (50, 10), (6, 6)]
    context = ArmContext(model, [Request((1,) * p, o) for p, o in lengths], pad_id=2)
    monkeypatch.setattr(TokenBudgetArm, "budget", 60)
    # 30 + 30 fills the budget; the fourth fits beside it, the fifth does not: 50 + 30.
    assert [u.indices for u in TokenBudgetArm(context, batch_size=8).units] == [(0, 1, 2, 3), (4, 5)]
    arm = TokenBudgetArm(context, batch_size=3)
    assert [u.indices for u in arm.units] == [(0, 1, 2), (3, 4, 5)]
    assert arm.settings["token_budget"] == 60
    monkeypatch.setattr(TokenBudgetArm, "budget", 2048)
    assert TokenBudgetArm(context, batch_size=8).token_limit() == 128


def test_every_run_has_latencies_running_batch_and_goodput(report: hf_paged.CompareReport) -> None:
    for arm in report.arms:
        for run in arm.runs:
            assert run.latency["e2e"]["p99"] <= run.seconds + 1e-6, arm.name
            assert run.latency_note
            if arm.name != "hf_paged_loop":  # a streamer would change how it runs
                assert 0 < run.latency["ttft"]["p50"] <= run.latency["e2e"]["p50"]
                assert run.latency["tpot"]["mean"] > 0
                assert run.goodput["share"] == 1
                assert run.peak_kv_bytes > 0
                assert 1 <= run.mean_running <= 4
    assert report.arm("hf_paged").runs[0].mean_running > report.arm("loop").runs[0].mean_running == 1
    assert set(report.arm("hf_paged").timeline) == {"seconds", "running", "kv_bytes"}


def test_a_difference_is_told_from_a_near_tie() -> None:
    model = make_model("gpt2")
    context = ArmContext(model, [Request((5, 6, 7), 4)])
    with torch.no_grad():
        order = model(torch.tensor([[5, 6, 7]])).logits[0, -1].argsort(descending=True).tolist()
    right, wrong = {0: [order[0], 1]}, {0: [order[-1], 1]}
    real = compare_outputs(context, "b", wrong, "a", right)
    assert (real.num_equal, real.near_ties, real.equal) == (0, 0, False)
    assert real.differences[0].position == 0
    assert real.differences[0].gap > 1
    with torch.no_grad():  # now the two embeddings, and so the two logits, are the same
        model.transformer.wte.weight[order[-1]] = model.transformer.wte.weight[order[0]]
    tie = compare_outputs(context, "b", wrong, "a", right)
    assert (tie.num_equal, tie.near_ties, tie.equal) == (0, 1, True)


def test_an_output_that_just_ends_early_is_a_difference() -> None:
    context = ArmContext(make_model("gpt2"), [Request((5,), 4)])
    entry = compare_outputs(context, "b", {0: [1, 2]}, "a", {0: [1, 2, 3]})
    assert not entry.equal
    assert (entry.differences[0].position, entry.differences[0].gap) == (2, None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"arms": ("loop", "vllm")}, "arm 'vllm': must be one of loop, padded"),
        ({"arms": ()}, "at least one arm"),
        ({"arms": ("loop", "loop")}, "each once"),
        ({"repeats": 0}, "repeats=0"),
        ({"lengths": "design"}, "prompts or lengths, not both"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"speed": 9}, "unexpected keyword argument 'speed'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_paged.compare(make_model("gpt2"), PROMPTS, **arguments)


def test_an_enabled_model_is_refused() -> None:
    model = hf_paged.enable(make_model("gpt2"))
    with pytest.raises(ValueError, match="disable"):
        hf_paged.compare(model, PROMPTS)
    hf_paged.disable(model)


def test_the_eos_of_the_tiny_models_is_what_the_tests_assume() -> None:
    assert make_model("gpt2").generation_config.eos_token_id == EOS
