"""TRL's GRPO and RLOO trainers on an enabled model: the losses, gradients and weights of plain HF."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import set_seed

import hf_paged
from tests.helpers import demo_model, demo_tokenizer

pytestmark = pytest.mark.clients

trl = pytest.importorskip("trl", reason="trl is not installed")

PROMPTS = ["import", "The", "class", "A list is"]
#: Rows generated at once, in groups; each optimizer step takes a part of a group. Of a whole group of equal (greedy)
#: texts the gradient is zero, since its advantages add up to nothing.
ROUNDS, ROWS, GENERATIONS, ROWS_A_STEP = 2, 16, 8, 4
STEPS = ROUNDS * ROWS // ROWS_A_STEP
#: What of a trainer's log must be the same; the rest are times.
LOGGED = ("loss", "grad_norm", "reward", "reward_std", "completions/mean_length", "kl", "entropy")
#: So small that transformers' own continuous batching needs little memory.
POOL = {"num_blocks": 64, "max_batch_tokens": 128}


class Reward:
    """Keeps the texts it saw. Differs between equal texts, so that greedy decoding has something to learn from."""

    __name__ = "reward"

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, completions: list[str], **columns: object) -> list[float]:
        self.seen.append(completions)
        return [float(i % GENERATIONS) - 0.1 * len(text) for i, text in enumerate(completions)]


class Training(NamedTuple):
    """What a trainer did."""

    logged: list[dict[str, float]]  # one entry an optimizer step
    texts: list[list[str]]  # one list a round of generation
    weights: dict[str, torch.Tensor]
    stats: Any  # None of a plain model


def train(kind: str, family: str, folder: Path, *, enabled: bool, **options: Any) -> Training:
    """Two rounds of generation with a trainer of TRL's, unedited but for the folder and the number of steps."""
    from datasets import Dataset

    model, reward = demo_model(family), Reward()  # they have no dropout
    if enabled:
        hf_paged.enable(model, fallback="error")
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS_A_STEP,
        "generation_batch_size": ROWS,
        "num_generations": GENERATIONS,
        "max_completion_length": 16,
        "logging_steps": 1,
        # Adam's first steps are signs of the gradient: it would make rounding as large as anything else.
        "optim": "sgd",
        "learning_rate": 0.01,
        "beta": 0.1,
        "seed": 7,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    set_seed(7)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        processing_class=demo_tokenizer(family),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        args=getattr(trl, f"{kind}Config")(**(defaults | options)),
    )
    trainer.train()
    logged = [{name: entry[name] for name in LOGGED if name in entry} for entry in trainer.state.log_history]
    stats = hf_paged.stats(model) if enabled else None
    hf_paged.disable(model)
    return Training([entry for entry in logged if "loss" in entry], reward.seen, model.state_dict(), stats)


def assert_same(got: Training, expected: Training) -> None:
    """Both generated the same texts, logged the same and ended with the same weights, to rounding."""
    assert got.texts == expected.texts
    assert len(got.texts) == ROUNDS
    assert len(got.logged) == len(expected.logged) == STEPS
    for ours, theirs in zip(got.logged, expected.logged, strict=True):
        assert {"loss", "grad_norm"} <= theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert sum("reward" in entry for entry in expected.logged) == ROUNDS
    assert max(abs(entry["loss"]) for entry in expected.logged) > 1e-2
    assert sorted(entry["grad_norm"] for entry in expected.logged)[STEPS // 2] > 1e-2
    for name, weight in expected.weights.items():
        torch.testing.assert_close(got.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_is_the_same(family: str, kind: str, sample: bool, tmp_path: Path) -> None:
    options = {"generation_kwargs": {"do_sample": sample}}
    expected = train(kind, family, tmp_path, enabled=False, **options)
    got = train(kind, family, tmp_path, enabled=True, **options)
    assert_same(got, expected)
    texts = [len(set(seen)) for seen in got.texts]
    assert min(texts) > GENERATIONS if sample else max(texts) == ROWS // GENERATIONS
    assert got.stats.native_calls == ROUNDS
    assert got.stats.requests == ROUNDS * ROWS


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_the_continuous_batching_flag(kind: str, tmp_path: Path) -> None:
    # Greedy: transformers draws its samples here in an order of its own. Shuffles of rows are the same with both.
    options = {
        "generation_kwargs": {"do_sample": False},
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": POOL,
    }
    expected = train(kind, "llama", tmp_path, enabled=False, **options)
    got = train(kind, "llama", tmp_path, enabled=True, **options)
    assert_same(got, expected)
    assert got.stats.native_calls == ROUNDS * ROWS
