"""Threads, processes and ambient state: right results, no abort, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hf_paged
from tests.helpers import (
    FAMILIES,
    PAD,
    ROOT,
    assert_same_tokens,
    left_pad,
    make_model,
    native_calls,
    random_prompts,
)

KWARGS = {"max_new_tokens": 12, "do_sample": False}


def inputs(seed=0, lengths=(5, 17, 9)):
    return left_pad(random_prompts(lengths, seed=seed), PAD)


def engine_threads() -> list[threading.Thread]:
    """Not the threads of the servers that other tests of this session keep, nor the one that loads kernels."""
    return [t for t in threading.enumerate() if t.name.startswith("hf_paged-engine")]


def test_two_enabled_models_from_two_threads():
    models = [hf_paged.enable(make_model(f)) for f in ("gpt2", "llama")]
    expected = [make_model(f).generate(**inputs(), **KWARGS) for f in ("gpt2", "llama")]
    barrier = threading.Barrier(2)

    def work(model):
        barrier.wait()
        return [model.generate(**inputs(), **KWARGS) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, models))
    for want, got in zip(expected, results, strict=True):
        for one in got:
            assert_same_tokens(one, want)
    for model in models:
        assert hf_paged.stats(model).native_calls == 5
        hf_paged.disable(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_threads_share_one_model(family):
    model, plain = make_model(family), make_model(family)
    expected = [plain.generate(**inputs(i), **KWARGS) for i in range(8)]
    hf_paged.enable(model)
    with native_calls(model, 32), ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            results = pool.map(lambda i: model.generate(**inputs(i), **KWARGS), range(8))
            for want, got in zip(expected, results, strict=True):
                assert_same_tokens(got, want)
    hf_paged.disable(model)
    assert not engine_threads()


def test_submitted_requests_make_progress_unwaited():
    model, plain = make_model("llama"), make_model("llama")
    prompts = random_prompts([4, 20, 11])
    hf_paged.enable(model)
    handles = [hf_paged.engine(model).submit(p, **KWARGS) for p in prompts]
    caller = model.generate(**inputs(3), **KWARGS)
    assert_same_tokens(caller, plain.generate(**inputs(3), **KWARGS))
    for prompt, handle in zip(prompts, handles, strict=True):
        want = plain.generate(torch.tensor([prompt]), **KWARGS)[0, len(prompt) :].tolist()
        assert handle.result(timeout=30).token_ids == want
        assert list(handle) == want
    hf_paged.disable(model)


def test_cancelled_request_gives_its_blocks_back():
    model = hf_paged.enable(make_model("llama"))
    options = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None}
    handle = hf_paged.engine(model).submit(random_prompts([10])[0], **options)
    handle.cancel()
    with pytest.raises(hf_paged.RequestCancelledError):
        handle.result(timeout=30)
    hf_paged.engine(model).submit([5, 6], max_new_tokens=2).result(timeout=30)
    assert hf_paged.stats(model).kv_blocks_used == 0
    hf_paged.disable(model)


def test_disable_while_requests_run_fails_them():
    model = hf_paged.enable(make_model("gpt2"))
    handles = [
        hf_paged.engine(model).submit([4 + i], max_new_tokens=120, do_sample=False, eos_token_id=None)
        for i in range(4)
    ]
    hf_paged.disable(model)
    for handle in handles:
        with pytest.raises(hf_paged.EngineStateError, match="disabled"):
            handle.result(timeout=30)
    assert not engine_threads()


def test_inference_mode_then_no_grad_and_the_reverse():
    model = make_model("llama")
    want = model.generate(**inputs(), **KWARGS)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode]
    hf_paged.enable(model)
    with native_calls(model, 4):
        for mode in modes:
            with mode():
                assert_same_tokens(model.generate(**inputs(), **KWARGS), want)
    hf_paged.disable(model)


def test_autocast_and_plain_callers_at_once():
    model, plain = make_model("gpt2"), make_model("gpt2")
    want = plain.generate(**inputs(), **KWARGS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want_cast = plain.generate(**inputs(), **KWARGS)
    hf_paged.enable(model)

    def work(cast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            return [model.generate(**inputs(), **KWARGS) for _ in range(4)]

    with native_calls(model, 8), ThreadPoolExecutor(2) as pool:
        cast, uncast = pool.map(work, [True, False])
    for got in uncast:
        assert_same_tokens(got, want)
    for got in cast:
        assert got.shape == want_cast.shape
        assert_same_tokens(got, cast[0])
    hf_paged.disable(model)


def test_error_in_one_forward_leaves_the_engine_working():
    model = make_model("gpt2")
    want = model.generate(**inputs(), **KWARGS)
    hf_paged.enable(model)
    mlp = model.transformer.h[1].mlp.c_fc
    good, count = mlp.weight, [0]

    class Broken(torch.nn.Module):
        def forward(self, x):
            count[0] += 1
            raise RuntimeError("device on fire")

    model.transformer.h[1].mlp.c_fc = Broken()
    with pytest.raises(RuntimeError, match="device on fire"):
        model.generate(**inputs(), **KWARGS)
    assert count[0] == 1
    model.transformer.h[1].mlp.c_fc = mlp
    assert mlp.weight is good
    with native_calls(model):
        assert_same_tokens(model.generate(**inputs(), **KWARGS), want)
    assert hf_paged.stats(model).kv_blocks_used == 0
    hf_paged.disable(model)


def test_interrupt_in_the_middle_of_a_call():
    model = make_model("gpt2")
    want = model.generate(**inputs(), **KWARGS)
    hf_paged.enable(model)
    layer, count = model.transformer.h[1].mlp, [0]
    act = layer.act

    class Interrupting(torch.nn.Module):
        def forward(self, x):
            count[0] += 1
            if count[0] == 3:
                raise KeyboardInterrupt
            return act(x)

    layer.act = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs(), **KWARGS)
    layer.act = act
    assert_same_tokens(model.generate(**inputs(), **KWARGS), want)
    assert hf_paged.stats(model).kv_blocks_used == 0
    hf_paged.disable(model)


def run_script(text: str, **environment: str | None) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{k: v for k, v in environment.items() if v is not None}}
    for name, value in environment.items():
        if value is None:
            env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_generate_in_a_forked_child_with_the_parent_running():
    output = run_script(
        """
        import os, torch, hf_paged
        from tests.helpers import left_pad, make_model, random_prompts
        model = make_model("llama")
        kwargs = left_pad(random_prompts([5, 17, 9])) | {"max_new_tokens": 12, "do_sample": False}
        want = model.generate(**kwargs)
        hf_paged.enable(model)
        assert torch.equal(model.generate(**kwargs), want)
        busy = hf_paged.engine(model).submit([5], max_new_tokens=120, do_sample=False, eos_token_id=None)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            ok = torch.equal(model.generate(**kwargs), want)
            os._exit(0 if ok and hf_paged.stats(model).native_calls >= 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(busy.result(timeout=60).token_ids) == 120
        assert torch.equal(model.generate(**kwargs), want)
        print("right")
        """
    )
    assert "right" in output


def test_read_only_install_without_home(tmp_path):
    output = run_script(
        """
        import torch, hf_paged
        from tests.helpers import make_model
        model = hf_paged.enable(make_model("gpt2"))
        print(model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False).shape)
        print(hf_paged.stats(model).native_calls)
        """,
        HOME="/nonexistent",
        NUMBA_CACHE_DIR=None,
        XDG_CACHE_HOME=None,
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert output.split()[-1] == "1"


def test_interpreter_exit_with_requests_running():
    run_script(
        """
        import hf_paged
        from tests.helpers import make_model
        model = hf_paged.enable(make_model("gpt2"))
        for i in range(4):
            hf_paged.engine(model).submit([5 + i], max_new_tokens=120, do_sample=False, eos_token_id=None)
        """
    )


@pytest.mark.parametrize("raises", [False, True])
def test_no_step_runs_while_upstream_shortens_the_model(monkeypatch, raises):
    """Early exit sets the number of layers of the shared config while it drafts, and leaves it so when it raises."""
    from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

    from hf_paged.generation import speculation
    from hf_paged.generation.fallback import reason

    # Early exit itself is served; with anything that is not, upstream's own runs.
    monkeypatch.setattr(speculation, "speculation_reasons", lambda *args: [reason("assisted_decoding")])
    model, plain = make_model("llama"), make_model("llama")
    layers, prompt = model.config.num_hidden_layers, inputs(lengths=(9,))
    assert layers > 1
    expected = plain.generate(**prompt, **KWARGS)
    drafting, seen, results = threading.Event(), [], []
    original = EarlyExitCandidateGenerator.get_candidates

    def slow(self, *args, **kwargs):
        model.config.num_hidden_layers = 1
        drafting.set()
        seen.append(hf_paged.stats(model).running)
        other.join(0.3)
        if raises:
            raise RuntimeError("no drafts today")
        model.config.num_hidden_layers = layers
        return original(self, *args, **kwargs)

    def work():
        drafting.wait(30)
        results.append(model.generate(**prompt, **KWARGS))

    monkeypatch.setattr(EarlyExitCandidateGenerator, "get_candidates", slow)
    other = threading.Thread(target=work)
    with hf_paged.enabled(model):
        other.start()
        if raises:
            with pytest.raises(RuntimeError, match="no drafts"):
                model.generate(**prompt, **KWARGS, assistant_early_exit=1)
        else:
            assert_same_tokens(model.generate(**prompt, **KWARGS, assistant_early_exit=1), expected)
        other.join(60)
        assert hf_paged.stats(model).native_calls == 1
        with hf_paged.paused(model):  # no second pause by the same thread
            if not raises:
                model.generate(**prompt, **KWARGS, assistant_early_exit=1)
    assert seen == [0] * len(seen) != []
    assert model.config.num_hidden_layers == layers
    assert_same_tokens(results[0], expected)
