"""Constraints and criteria of other libraries work unchanged on an enabled model, natively, with upstream's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_paged
from tests.helpers import assert_same_tokens, demo_model, demo_tokenizer, native_calls

pytestmark = pytest.mark.clients

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
PROMPTS = ["import json\n", "def parse(text):\n    return ", "x = "]
NEW = 40


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = demo_model("gpt2")
    hf_paged.enable(model, backend="reference", fallback="error")
    yield model
    hf_paged.disable(model)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return demo_tokenizer("gpt2")


def batch(tokenizer: Any, prompts: list[str] = PROMPTS) -> dict[str, torch.Tensor]:
    return dict(tokenizer(prompts, return_tensors="pt", padding=True))


def compare(model: Any, inputs: dict[str, torch.Tensor], make: Any, **kwargs: Any) -> torch.Tensor:
    """The output, greedy and sampled, for fresh objects of the library each time; returns the greedy one."""
    outputs = []
    for sample in (True, False):
        arguments = {**inputs, "max_new_tokens": NEW, "do_sample": sample, **kwargs}
        torch.manual_seed(1)
        expected = demo_model("gpt2").generate(**arguments, **make())
        torch.manual_seed(1)
        with native_calls(model):
            actual = model.generate(**arguments, **make())
        assert_same_tokens(actual, expected)
        outputs.append(actual)
    return outputs[-1]


# --- xgrammar ---------------------------------------------------------------------------------------------------------


def grammar(tokenizer: Any, model: Any) -> Any:
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    return xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)


def test_xgrammar(model: Any, tokenizer: Any) -> None:
    compiled = grammar(tokenizer, model)
    from xgrammar.contrib.hf import LogitsProcessor

    inputs = batch(tokenizer)
    output = compare(
        model, inputs, lambda: {"logits_processor": LogitsProcessorList([LogitsProcessor(compiled)])}
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ended = [text for text in texts if text.rstrip().endswith("}")]
    assert ended, f"no row came to an end: {texts}"
    for text in ended:
        assert json.loads(text).keys() == {"n", "ok"}


def test_xgrammar_from_several_threads(model: Any, tokenizer: Any) -> None:
    compiled = grammar(tokenizer, model)
    from xgrammar.contrib.hf import LogitsProcessor

    def run(target: Any, number: int) -> torch.Tensor:
        inputs = batch(tokenizer, PROMPTS[: 1 + number % 3])
        return target.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            logits_processor=LogitsProcessorList([LogitsProcessor(compiled)]),
        )

    plain = demo_model("gpt2")
    with native_calls(model, 6), ThreadPoolExecutor(6) as pool:
        for number, output in enumerate(pool.map(lambda i: run(model, i), range(6))):
            assert_same_tokens(output, run(plain, number))


# --- criteria of evaluation harnesses ---------------------------------------------------------------------------------


class MultiTokenEOSCriteria(StoppingCriteria):
    """One stop sequence for a batch, in the shape evaluation harnesses give it; true once every row has it."""

    def __init__(self, sequence: str, tokenizer: Any, prompt_width: int, num_rows: int) -> None:
        self.sequence, self.tokenizer = sequence, tokenizer
        self.initial_decoder_input_length = prompt_width
        self.sequence_id_len = len(tokenizer.encode(sequence, add_special_tokens=False)) + 2
        self.done_tracker = [False] * num_rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        tails = input_ids[:, self.initial_decoder_input_length :][:, -self.sequence_id_len :]
        texts = self.tokenizer.batch_decode(tails)
        self.done_tracker = [
            done or self.sequence in text for done, text in zip(self.done_tracker, texts, strict=True)
        ]
        return all(self.done_tracker)


def own(sequence: str, tokenizer: Any, width: int, rows: int) -> StoppingCriteria:
    return MultiTokenEOSCriteria(sequence, tokenizer, width, rows)


def of_lm_eval(sequence: str, tokenizer: Any, width: int, rows: int) -> StoppingCriteria:
    try:
        from lm_eval.models.utils_hf import MultiTokenEOSCriteria as Theirs
    except ImportError:
        pytest.skip("lm_eval is not installed")
    return Theirs(sequence, tokenizer, width, rows)


@pytest.mark.parametrize("make", [own, of_lm_eval])
def test_harness_criteria_stop_each_row_by_itself(make: Any, model: Any, tokenizer: Any) -> None:
    stops = ["\n\n", "return"]
    inputs = batch(tokenizer)
    rows, width = inputs["input_ids"].shape

    def criteria() -> StoppingCriteriaList:
        return StoppingCriteriaList([make(stop, tokenizer, width, rows) for stop in stops])

    def cut(output: torch.Tensor) -> list[str]:
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    common = {**inputs, "max_new_tokens": 60, "do_sample": False}
    expected = demo_model("gpt2").generate(**common, stopping_criteria=criteria())
    with native_calls(model):
        actual = model.generate(**common, stopping_criteria=criteria())
    assert cut(actual) == cut(expected)
    assert any(len(text) for text in cut(expected))
    pads = (actual[:, width:] == tokenizer.pad_token_id).sum()
    before = (expected[:, width:] == tokenizer.pad_token_id).sum()
    assert actual.shape[1] < expected.shape[1] or pads > before, "no row stopped before the others"
    # One row: the same to the last token.
    alone = {name: value[:1, -int(inputs["attention_mask"][0].sum()) :] for name, value in inputs.items()}

    def for_one() -> StoppingCriteriaList:
        return StoppingCriteriaList([make(stop, tokenizer, alone["input_ids"].shape[1], 1) for stop in stops])

    common = {**alone, "max_new_tokens": 60, "do_sample": False}
    with native_calls(model):
        actual = model.generate(**common, stopping_criteria=for_one())
    assert_same_tokens(actual, demo_model("gpt2").generate(**common, stopping_criteria=for_one()))


def test_harness_criteria_with_scores_are_upstreams_whole(model: Any, tokenizer: Any) -> None:
    inputs = batch(tokenizer)
    rows, width = inputs["input_ids"].shape

    def run(target: Any) -> Any:
        given = StoppingCriteriaList([MultiTokenEOSCriteria("\n\n", tokenizer, width, rows)])
        return target.generate(
            **inputs,
            max_new_tokens=30,
            do_sample=False,
            stopping_criteria=given,
            return_dict_in_generate=True,
            output_logits=True,
        )

    with native_calls(model):
        actual = run(model)
    expected = run(demo_model("gpt2"))
    assert_same_tokens(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
