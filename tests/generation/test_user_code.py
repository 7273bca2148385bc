"""Code of users beside other requests: it waits for nobody, nobody waits for it, and its errors are its caller's."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged.engine.model_runner import ModelRunner
from hf_paged.errors import EngineStateError, FallbackError
from tests.helpers import (
    PAD,
    assert_same_tokens,
    demo_model,
    demo_tokenizer,
    left_pad,
    make_model,
    native_calls,
    random_prompts,
)
from tests.user_code import KeepingStreamer, RowCounter, assert_same_calls

BATCH = left_pad(random_prompts([3, 12, 7]), PAD)
ONE = left_pad(random_prompts([9], seed=4), PAD)
PLAIN = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
PATIENCE_S = 60.0


@pytest.fixture
def model() -> Iterator[Any]:
    model = make_model("llama")
    hf_paged.enable(model, block_size=4, backend="reference", fallback="error", kv_cache_memory="4MiB")
    yield model
    hf_paged.disable(model)


def expected(batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    return make_model("llama").generate(**batch, **(PLAIN | kwargs))


class Boom(Exception):
    pass


class Hook(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Runs `action` at call number `at` of one of the four hooks."""

    def __init__(self, action: Callable[[], Any], at: int = 3) -> None:
        self.action, self.at, self.count = action, at, 0

    def _call(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.action()

    def __call__(self, first: Any, second: Any, **kwargs: Any) -> Any:
        self._call()
        if isinstance(first, int):  # a prefix function
            return list(range(3, 60))
        if second is None:  # a criterion
            return torch.zeros(len(first), dtype=torch.bool)
        return second

    def put(self, value: torch.Tensor) -> None:
        self._call()

    def end(self) -> None:
        self.ended = True


class AsProcessor(Hook):
    # Upstream passes keyword arguments on to a processor that takes any.
    def __call__(self, input_ids: Any, scores: Any) -> Any:  # type: ignore[override]
        return super().__call__(input_ids, scores)


HOOKS: dict[str, Callable[[Callable[[], Any]], dict[str, Any]]] = {
    "processor": lambda action: {"logits_processor": LogitsProcessorList([AsProcessor(action)])},
    "criterion": lambda action: {"stopping_criteria": StoppingCriteriaList([Hook(action)])},
    "prefix function": lambda action: {"prefix_allowed_tokens_fn": AsProcessor(action, at=5)},
    "streamer": lambda action: {"streamer": Hook(action)},
}


def boom() -> None:
    raise Boom("mine")


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("hook", HOOKS)
def test_what_user_code_raises_is_its_callers(hook: str, error: type[BaseException], model: Any) -> None:
    def fail() -> None:
        raise error("mine")

    with pytest.raises(error, match="mine"):
        model.generate(**BATCH, **(PLAIN | HOOKS[hook](fail)))
    with native_calls(model):
        assert_same_tokens(model.generate(**BATCH, **PLAIN), expected(BATCH))


@pytest.mark.parametrize("hook", HOOKS)
def test_others_are_not_harmed_by_what_it_raises(hook: str, model: Any) -> None:
    started, handle_came = threading.Event(), threading.Event()

    def fail() -> None:
        started.set()
        assert handle_came.wait(PATIENCE_S)
        raise Boom("mine")

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(lambda: model.generate(**BATCH, **(PLAIN | HOOKS[hook](fail))))
        assert started.wait(PATIENCE_S)
        handle = hf_paged.engine(model).submit(ONE["input_ids"][0], **PLAIN | {"max_new_tokens": 60})
        next(iter(handle))
        handle_came.set()
        with pytest.raises(Boom):
            failing.result(PATIENCE_S)
        assert handle.result(PATIENCE_S).token_ids == expected(ONE, max_new_tokens=60)[0, 9:].tolist()


@pytest.mark.parametrize("hook", HOOKS)
def test_nobody_waits_for_user_code(hook: str, model: Any) -> None:
    """While one request's code stands still, others run from their first token to their last."""
    inside, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        inside.set()
        assert go_on.wait(PATIENCE_S)

    with ThreadPoolExecutor(4) as pool:
        slow = pool.submit(lambda: model.generate(**BATCH, **(PLAIN | HOOKS[hook](stand_still))))
        assert inside.wait(PATIENCE_S)
        others = [pool.submit(lambda: model.generate(**ONE, **PLAIN)) for _ in range(3)]
        for other in others:
            assert_same_tokens(other.result(PATIENCE_S), expected(ONE))
        submitted = hf_paged.engine(model).submit(ONE["input_ids"][0], **PLAIN)
        assert submitted.result(PATIENCE_S).token_ids == expected(ONE)[0, 9:].tolist()
        assert not slow.done()
        go_on.set()
        kwargs = HOOKS[hook](lambda: None)
        assert_same_tokens(slow.result(PATIENCE_S), expected(BATCH, **kwargs))


@pytest.mark.parametrize("hook", HOOKS)
def test_user_code_may_generate_itself(hook: str) -> None:
    """Also where its own call holds every block: those are taken, and computed again later."""
    model = make_model("llama")
    block = 2 * 2 * 2 * 16 * 4 * 4
    with hf_paged.enabled(
        model, block_size=4, backend="reference", fallback="error", kv_cache_memory=7 * block
    ):
        inner: list[torch.Tensor] = []

        def generate() -> None:
            inner.append(model.generate(**ONE, **PLAIN))

        outer = model.generate(**BATCH, **(PLAIN | HOOKS[hook](generate)))
        assert_same_tokens(outer, expected(BATCH, **HOOKS[hook](lambda: None)))
        assert_same_tokens(inner[0], expected(ONE))


@pytest.mark.parametrize("hook", HOOKS)
def test_waiting_for_oneself_is_an_error(hook: str, model: Any) -> None:
    def pause() -> None:
        with hf_paged.paused(model):
            raise AssertionError("came in")

    with pytest.raises(EngineStateError, match="very call"):
        model.generate(**BATCH, **(PLAIN | HOOKS[hook](pause)))


@pytest.mark.parametrize("hook", HOOKS)
def test_disabling_from_inside_fails_the_call(hook: str) -> None:
    model = make_model("llama")
    hf_paged.enable(model, backend="reference", fallback="error")
    with pytest.raises(EngineStateError, match="disabled"):
        model.generate(**BATCH, **(PLAIN | HOOKS[hook](lambda: hf_paged.disable(model))))
    assert not hf_paged.is_enabled(model)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_it_runs_in_the_thread_and_context_of_its_call(hook: str, alone: bool, model: Any) -> None:
    variable = contextvars.ContextVar("variable", default=0)
    seen: list[tuple[int, int, bool, bool]] = []

    def look() -> None:
        from hf_paged.step import current_step

        seen.append((threading.get_ident(), variable.get(), torch.is_grad_enabled(), current_step() is None))

    def work(number: int) -> int:
        variable.set(number)
        model.generate(**BATCH, **(PLAIN | HOOKS[hook](look)))
        return threading.get_ident()

    with ThreadPoolExecutor(3) as pool:
        idents = list(pool.map(work, range(1, 2 if alone else 4)))
    assert sorted(number for _, number, _, _ in seen) == list(range(1, len(idents) + 1))
    for ident, number, grad, outside in seen:
        assert (ident, grad, outside) == (idents[number - 1], False, True)


def test_a_lone_call_makes_no_thread(model: Any) -> None:
    names: list[list[str]] = []
    for hook in HOOKS.values():
        model.generate(
            **BATCH, **(PLAIN | hook(lambda: names.append([t.name for t in threading.enumerate()])))
        )
    assert len(names) == 4
    assert not [name for part in names for name in part if name == "hf_paged-engine"]


def test_an_autocast_around_the_call_is_around_its_code(model: Any) -> None:
    seen: list[bool] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(
            **BATCH, **(PLAIN | HOOKS["processor"](lambda: seen.append(torch.is_autocast_enabled("cpu"))))
        )
    assert seen == [True]


def test_different_code_from_many_threads(model: Any) -> None:
    kinds = [*HOOKS, "counter", "streamer and counter", "none"]
    batches = [left_pad(random_prompts([2 + i, 5, 11 - i], seed=i), PAD) for i in range(len(kinds))]

    def options(kind: str) -> tuple[dict[str, Any], list[Any]]:
        if kind in HOOKS:
            return HOOKS[kind](lambda: None), []
        made = [RowCounter(), KeepingStreamer()]
        if kind == "none":
            return {}, []
        given = {"logits_processor": LogitsProcessorList([made[0]])}
        return (given | {"streamer": made[1]}, made) if "streamer" in kind else (given, made[:1])

    plain = make_model("llama")
    wanted = []
    for kind, batch in zip(kinds, batches, strict=True):
        kwargs, recorders = options(kind)
        wanted.append((plain.generate(**batch, **(PLAIN | kwargs)), recorders))

    def work(i: int) -> tuple[torch.Tensor, list[Any]]:
        kwargs, recorders = options(kinds[i])
        return model.generate(**batches[i], **(PLAIN | kwargs)), recorders

    rounds = 4
    with native_calls(model, rounds * len(kinds)), ThreadPoolExecutor(len(kinds)) as pool:
        for _ in range(rounds):
            results = list(pool.map(work, range(len(kinds))))
            for (tokens, recorders), (want, theirs) in zip(results, wanted, strict=True):
                assert_same_tokens(tokens, want)
                for mine, other in zip(recorders, theirs, strict=True):
                    assert_same_calls(mine, other)


def test_a_forward_that_fails_reaches_the_caller_and_ends_the_stream(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [0], ModelRunner.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("out of memory, say")
        return forward(*args, **kwargs)

    for kind in ("processor", "streamer"):
        calls[0] = 0
        streamer = KeepingStreamer()
        kwargs = HOOKS["processor"](lambda: None) if kind == "processor" else {}
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "forward", failing)
            with pytest.raises(RuntimeError, match="out of memory"):
                model.generate(**BATCH, **(PLAIN | kwargs), streamer=streamer)
        assert [call[0] for call in streamer.calls] == ["put"] * 4 + ["end"]
    assert_same_tokens(model.generate(**BATCH, **PLAIN), expected(BATCH))


def test_requests_without_a_thread_of_their_own_say_so(model: Any) -> None:
    for kwargs in (HOOKS["processor"](boom), HOOKS["criterion"](boom), HOOKS["prefix function"](boom)):
        with pytest.raises(FallbackError, match="processors"):
            hf_paged.engine(model).submit([5, 6, 7], **(PLAIN | kwargs))
        with pytest.raises(FallbackError, match="processors"):
            hf_paged.generate_many(model, [[5, 6, 7]], **(PLAIN | kwargs))
    with pytest.raises(FallbackError, match="streamer"):
        hf_paged.engine(model).submit([5, 6, 7], **PLAIN, streamer=KeepingStreamer())


# --- streamers of transformers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    model = demo_model("gpt2")
    hf_paged.enable(model, backend="reference", fallback="error")
    yield model
    hf_paged.disable(model)


def text_inputs() -> tuple[Any, dict[str, torch.Tensor]]:
    tokenizer = demo_tokenizer("gpt2")
    return tokenizer, dict(tokenizer("def add(a, b):\n", return_tensors="pt"))


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer_prints_the_same(
    demo: Any, skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, inputs = text_inputs()
    printed = []
    for model in (demo_model("gpt2"), demo):
        model.generate(**inputs, max_new_tokens=24, streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_text_iterator_streamer_gives_the_same_pieces(demo: Any) -> None:
    tokenizer, inputs = text_inputs()

    def pieces(model: Any) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=PATIENCE_S)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(lambda: model.generate(**inputs, max_new_tokens=24, streamer=streamer))
            got = list(streamer)
            running.result()
        return got

    want = pieces(demo_model("gpt2"))
    assert len(want) > 3
    with native_calls(demo, 5), ThreadPoolExecutor(5) as pool:
        assert list(pool.map(lambda _: pieces(demo), range(5))) == [want] * 5


def test_async_text_iterator_streamer(demo: Any) -> None:
    tokenizer, inputs = text_inputs()

    async def pieces(model: Any) -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=PATIENCE_S)
        running = asyncio.get_running_loop().run_in_executor(
            None, lambda: model.generate(**inputs, max_new_tokens=24, streamer=streamer)
        )
        got = [piece async for piece in streamer]
        await running
        return got

    async def three() -> list[list[str]]:
        return list(await asyncio.gather(*(pieces(demo) for _ in range(3))))

    want = asyncio.run(pieces(demo_model("gpt2")))
    assert asyncio.run(three()) == [want] * 3


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_new_tokns": 3},
        {"max_new_tokens": 4, "stopping_criteria": StoppingCriteriaList([Hook(boom, at=2)])},
        {"max_new_tokens": 4, "use_cache": False},
        {"max_new_tokens": 4, "num_beams": 2},
    ],
    ids=["refused by upstream", "user code", "refused as a fallback", "no streams with beams"],
)
def test_whoever_reads_a_stream_does_not_wait_for_ever(kwargs: dict[str, Any], demo: Any) -> None:
    tokenizer, inputs = text_inputs()
    streamer = TextIteratorStreamer(tokenizer, timeout=PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: demo.generate(**inputs, **kwargs, streamer=streamer))
        list(streamer)  # raises queue.Empty after the timeout
        with pytest.raises((ValueError, Boom, FallbackError)):
            running.result()


def test_a_stream_of_sampled_beams_is_the_prompt_and_an_end(model: Any) -> None:
    """Upstream refuses a streamer with beam search, and shows it the prompt alone with beam sampling."""
    streamer = KeepingStreamer()
    model.generate(**ONE, **PLAIN | {"do_sample": True}, streamer=streamer, num_beams=2)
    assert [call[0] for call in streamer.calls] == ["put", "end"]


def test_an_end_that_raises_is_called_once(model: Any) -> None:
    class Bad(KeepingStreamer):
        def end(self) -> None:
            super().end()
            raise Boom("mine")

    streamer = Bad()
    with pytest.raises(Boom):
        model.generate(**ONE, **PLAIN, streamer=streamer)
    assert [call[0] for call in streamer.calls].count("end") == 1


def test_a_batch_is_refused_by_text_streamers_themselves(demo: Any) -> None:
    tokenizer, inputs = text_inputs()
    twice = {name: value.repeat(2, 1) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="batch size 1"):
        demo.generate(**twice, max_new_tokens=3, streamer=TextStreamer(tokenizer))
