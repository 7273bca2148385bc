"""Requests over 1, 8 and 64 LoRA adapters of rank 16 in one continuous batch, against the base model alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch

import hf_paged
from benchmarks.gpu.bench import Bench, Case
from benchmarks.gpu.models import Lent, engine_options
from benchmarks.gpu.results import Row
from benchmarks.gpu.shapes import MODELS, TINY_MODELS
from hf_paged.comparison.workloads import prompt_source

_RANK = 16


def cases(bench: Bench) -> Iterator[Case]:
    counts = (1, 2) if bench.tiny else (64, 8, 1)
    for shape in TINY_MODELS[:1] if bench.tiny else (MODELS[0], MODELS[2]):
        lent = Lent(bench, shape)
        adapters = _Adapters(bench, lent, max(counts))
        yield Case(f"adapters {shape.name} none", adapters.base, 30)
        for count in counts:
            yield Case(
                f"adapters {shape.name} {count} in one batch", functools.partial(adapters.mixed, count), 60
            )
        adapters.drop()
        lent.drop()


class _Adapters:
    """One model, first alone and then with `most` adapters on all linears of its blocks."""

    def __init__(self, bench: Bench, lent: Lent, most: int) -> None:
        self._bench, self._lent, self._most = bench, lent, most
        self._base_rate: float | None = None
        self._peft: Any = None

    def base(self) -> Row:
        self._base_rate = self._rate(self._lent.model, None)
        return {"tokens_per_s": self._base_rate}

    def mixed(self, count: int) -> Row:
        requests = self._num_requests
        rate = self._rate(self._with_adapters(), [f"a{i % count}" for i in range(requests)])
        share = None if self._base_rate is None else 100 * rate / self._base_rate
        return {"tokens_per_s": rate, "percent_of_base": share}

    def drop(self) -> None:
        self._peft = None

    @property
    def _num_requests(self) -> int:
        return 2 if self._bench.tiny else 64

    def _rate(self, model: Any, names: list[str] | None) -> float:
        """New tokens a second; the second of two runs counts."""
        length, new = (5, 3) if self._bench.tiny else (128, 128)
        draw = prompt_source(self._lent.model.config.vocab_size, (), 0)
        prompts = [draw(length) for _ in range(self._num_requests)]
        seconds = 0.0
        with hf_paged.enabled(model, prefix_caching=False, **engine_options(self._bench)):
            for _ in range(2):
                started = time.perf_counter()
                results = hf_paged.generate_many(
                    model, prompts, max_new_tokens=new, do_sample=False, adapters=names
                )
                seconds = time.perf_counter() - started
        return sum(len(r.token_ids) for r in results) / seconds

    def _with_adapters(self) -> Any:
        """The model inside of PEFT, which puts its layers into the model itself."""
        import peft

        if self._peft is None:
            model = self._lent.model
            is_gpt2 = model.config.model_type == "gpt2"
            config = peft.LoraConfig(
                r=_RANK,
                target_modules=["c_attn", "c_proj", "c_fc"] if is_gpt2 else "all-linear",
                fan_in_fan_out=is_gpt2,
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            )
            torch.manual_seed(0)
            self._peft = peft.get_peft_model(model, config, adapter_name="a0").eval()
            for i in range(1, self._most):
                self._peft.add_adapter(f"a{i}", config)
        return self._peft
