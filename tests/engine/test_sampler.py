"""The sampler over rows of many calls: what is shared, what is recorded, and whose fault a failure is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as upstream
from transformers.generation.stopping_criteria import EosTokenCriteria

from hf_paged.engine import sampler as sampler_module
from hf_paged.engine.draws import LockstepDraws, SeededDraws
from hf_paged.engine.request import Call, FinishReason
from hf_paged.engine.sampler import Sampler
from hf_paged.engine.sampling import SamplingSpec
from tests.engine.sampling_runs import Replay, record, run
from tests.helpers import left_pad, make_model, random_prompts

VOCAB = 40


class CountingArgmax:
    """`torch.argmax` that notes what it was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.given.append(rows)
        return rows.argmax(-1)


def make_call(
    prompts: list[list[int]], *processors: Any, draws: Any = None, run_on: bool = False, **spec: Any
) -> Call:
    width = max(map(len, prompts))
    columns = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    call = Call(
        SamplingSpec(columns, list(processors), do_sample=draws is not None, draws=draws, **spec),
        run_on=run_on,
    )
    for prompt in prompts:
        call.add_row(prompt, 50, num_pad=width - len(prompt))
    return call


def logits_of(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_rows_are_one_argmax_in_their_own_dtype(dtype: torch.dtype) -> None:
    argmax = CountingArgmax()
    calls = [make_call([[1], [2, 3]]), make_call([[4]])]
    logits = logits_of(3, dtype=dtype)
    tokens = Sampler(argmax).sample(logits, [s for call in calls for s in call.sequences])
    assert tokens == logits.float().argmax(-1).tolist()
    assert all(type(token) is int for token in tokens)
    assert [rows.data_ptr() for rows in argmax.given] == [logits.data_ptr()]


def test_float64_is_rounded_before_the_argmax_as_upstream_does() -> None:
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)
    logits[0, 3], logits[0, 9] = 1.0, 1.0 + 1e-12
    assert Sampler().sample(logits, make_call([[1]]).sequences) == [3]


def test_plain_and_other_rows_in_one_step() -> None:
    plain, banning, sampling = (
        make_call([[1], [2]]),
        make_call([[3], [4, 5]], upstream.SuppressTokensLogitsProcessor(range(0, VOCAB, 2))),
        make_call([[6]], draws=SeededDraws(0)),
    )
    logits = logits_of(5)
    before = logits.clone()
    a, b, c, d, e = plain.sequences + banning.sequences + sampling.sequences
    order = [c, a, e, d, b]
    tokens = Sampler().sample(logits, order)
    odd = logits.clone()
    odd[:, ::2] = -math.inf
    best, best_odd = logits.argmax(-1).tolist(), odd.argmax(-1).tolist()
    assert tokens[:2] + tokens[3:] == [best_odd[0], best[1], best_odd[3], best[4]]
    assert Sampler().sample(logits[2:3], [e]) == [tokens[2]]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("has_eos", [False, True])
@pytest.mark.parametrize("output_scores", [False, True])
def test_finished_rows_that_run_on(has_eos: bool, output_scores: bool) -> None:
    """Upstream gives them pads if some criterion knows an end of sequence, else what the model says."""
    criteria = [EosTokenCriteria(7)] if has_eos else []
    call = make_call(
        [[1], [2]],
        run_on=True,
        criteria=criteria,
        pad_token_id=39,
        output_scores=output_scores,
        output_logits=True,
    )
    call.sequences[0].finish_reason = FinishReason.STOP
    logits = logits_of(2)
    best = logits.argmax(-1).tolist()
    assert Sampler().sample(logits, call.sequences) == ([39, best[1]] if has_eos else best)
    assert torch.equal(torch.stack(call.sampling.take_logits()), logits[None])
    assert len(call.sampling.take_scores()) == output_scores


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", seed=2)


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_that_end_when_they_are_finished(model: Any, do_sample: bool) -> None:
    """No records, so finished rows leave at once; the draws made for them are upstream's all the same."""
    recording = record(
        model,
        left_pad(random_prompts([3, 8, 1, 5, 5])),
        do_sample=do_sample,
        top_k=20,
        repetition_penalty=1.2,
        max_new_tokens=20,
        eos_token_id=list(range(1, 12)),
    )
    torch.set_rng_state(recording.rng_before)
    replay = Replay.of(recording, records=False)
    assert not replay.call.run_on
    run([replay])
    replay.check()
    lengths = [s.num_generated for s in replay.call.sequences]
    assert min(lengths) < max(lengths) == recording.num_steps
    assert not replay.call.sampling._histories
    if do_sample:
        replay.call.sampling.draws.finish(max(lengths))
    assert torch.equal(torch.get_rng_state(), recording.rng_after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_processed_in_float32(dtype: torch.dtype) -> None:
    recording = record(
        make_model("gpt2", dtype=dtype),
        left_pad(random_prompts([4, 6])),
        do_sample=True,
        top_p=0.8,
        max_new_tokens=8,
    )
    torch.set_rng_state(recording.rng_before)
    replay = Replay.of(recording)
    run([replay])
    replay.check()
    assert replay.recording.logits[0].dtype is dtype


def test_a_group_larger_than_a_chunk(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "_CHUNK_BYTES", 4 * 128 * 3)
    recording = record(model, left_pad(random_prompts([3] * 8)), do_sample=True, top_k=20, max_new_tokens=10)
    torch.set_rng_state(recording.rng_before)
    replay = Replay.of(recording)
    run([replay], lag=0.1)
    replay.check()


def test_seeded_rows_do_not_depend_on_the_batch(model: Any) -> None:
    def replays() -> list[Replay]:
        made = []
        for index in range(6):
            recording = record(
                model,
                left_pad(random_prompts([2 + index], seed=index)),
                do_sample=True,
                top_k=30,
                max_new_tokens=10,
            )
            # Ours draw other tokens than the recording, and may go on longer: its logits serve all the same.
            recording.logits += recording.logits
            made.append(Replay.of(recording, SeededDraws(11, index), records=False))
        return made

    alone, together = replays(), replays()
    for replay in alone:
        run([replay])
    run(together, seed=4)
    assert [r.tokens() for r in alone] == [r.tokens() for r in together]
    assert len({tuple(r.tokens()[0]) for r in alone}) > 1


class Failing(Exception):
    pass


class FailsAbove(upstream.WatermarkLogitsProcessor):
    """Stands in for a built-in that raises for some rows only; its rule is that of its base."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if (input_ids > 30).any():
            raise Failing("a token above 30")
        return super().__call__(input_ids, scores)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> FailsAbove:
    from hf_paged.engine import processors

    monkeypatch.setitem(processors._RULES, FailsAbove, processors._RULES[upstream.WatermarkLogitsProcessor])
    return FailsAbove(VOCAB, "cpu")


def test_a_processor_that_raises_fails_its_call_alone(failing: FailsAbove) -> None:
    def calls() -> list[Call]:
        prompts = [[[1], [2]], [[3], [35]], [[4]]]
        return [
            make_call(
                p, failing, draws=LockstepDraws(len(p), torch.Generator().manual_seed(i)), output_scores=True
            )
            for i, p in enumerate(prompts)
        ]

    logits = logits_of(5)
    first, bad, last = calls()
    tokens = Sampler().sample(logits, first.sequences + bad.sequences + last.sequences)
    assert [type(token) for token in tokens] == [int, int, Failing, Failing, int]
    assert tokens[2] is tokens[3]
    alone_first, _, alone_last = calls()
    alone = Sampler().sample(logits[:2], alone_first.sequences) + Sampler().sample(
        logits[4:], alone_last.sequences
    )
    assert tokens[:2] + tokens[4:] == alone
    assert torch.equal(first.sampling.take_scores()[0], alone_first.sampling.take_scores()[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [1, 3])
def test_probabilities_that_are_no_numbers_raise_upstreams_error(value: float, rows: int) -> None:
    logits = logits_of(rows + 2)
    logits[rows - 1, 5] = value
    with pytest.raises(RuntimeError) as theirs:
        torch.multinomial(torch.softmax(logits[:rows], -1), 1)
    bad = make_call([[1]] * rows, draws=LockstepDraws(rows, torch.Generator()))
    good = make_call([[1]] * 2, draws=LockstepDraws(2, torch.Generator().manual_seed(0)))
    tokens = Sampler().sample(logits, bad.sequences + good.sequences)
    assert all(isinstance(t, RuntimeError) and str(t) == str(theirs.value) for t in tokens[:rows])
    probs = torch.softmax(logits[rows:], -1)
    assert (
        tokens[rows:]
        == torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(0)).flatten().tolist()
    )


def test_nothing_left_to_draw_raises_upstreams_error() -> None:
    call = make_call([[1]], upstream.SuppressTokensLogitsProcessor(range(VOCAB)), draws=SeededDraws(0))
    (token,) = Sampler().sample(logits_of(1), call.sequences)
    assert isinstance(token, RuntimeError)
    assert "probability tensor" in str(token)


def test_greedy_rows_take_the_first_nan_as_upstream_does() -> None:
    logits = logits_of(1)
    logits[0, [5, 9]] = math.nan
    call = make_call([[1]], upstream.TemperatureLogitsWarper(0.5))
    assert Sampler().sample(logits, call.sequences) == [int(logits.argmax())] == [5]


@pytest.mark.parametrize("draws", [None, SeededDraws(0)])
def test_logprobs_are_those_of_the_processed_scores(draws: SeededDraws | None) -> None:
    few = make_call([[1], [2]], upstream.TopKLogitsWarper(4), draws=draws, logprobs=2)
    none_besides = make_call([[3]], upstream.TopKLogitsWarper(4), draws=draws, logprobs=0)
    logits = logits_of(3)
    tokens = Sampler().sample(logits, few.sequences + none_besides.sequences)
    expected = torch.log_softmax(upstream.TopKLogitsWarper(4)(None, logits), -1)
    records = [
        few.sampling.token_logprobs[0],
        few.sampling.token_logprobs[1],
        none_besides.sampling.token_logprobs[0],
    ]
    for row, ((record_,), token) in enumerate(zip(records, tokens, strict=True)):
        assert record_.token_id == token
        assert record_.logprob == pytest.approx(float(expected[row, token]))
        values, ids = expected[row].topk(2 if row < 2 else 0)
        assert [i for i, _ in record_.top] == ids.tolist()
        assert [v for _, v in record_.top] == pytest.approx(values.tolist())


def test_what_is_recorded_is_not_what_is_worked_on() -> None:
    processor = upstream.TemperatureLogitsWarper(0.5)
    call = make_call([[1], [2]], processor, draws=SeededDraws(0), output_scores=True, output_logits=True)
    logits = logits_of(2)
    kept = logits.clone()
    Sampler().sample(logits, call.sequences)
    logits.zero_()
    assert torch.equal(call.sampling.take_logits()[0], kept)
    assert torch.equal(call.sampling.take_scores()[0], kept / 0.5)
    assert not call.sampling.take_scores()


def test_records_of_unequal_rows_are_refused() -> None:
    call = make_call([[1], [2]], output_scores=True)
    Sampler().sample(logits_of(1), call.sequences[:1])
    with pytest.raises(RuntimeError, match="did not run on"):
        call.sampling.take_scores()


def test_specs_that_make_no_sense_are_refused() -> None:
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="needs draws"):
        SamplingSpec(ids, do_sample=True)
    with pytest.raises(ValueError, match="needs draws"):
        SamplingSpec(ids, draws=SeededDraws(0))
    with pytest.raises(ValueError, match="int64"):
        SamplingSpec(ids[0])
    with pytest.raises(ValueError, match="row by row: logits processor function"):
        SamplingSpec(ids, [lambda ids, scores: scores])
    assert SamplingSpec(ids).plain
