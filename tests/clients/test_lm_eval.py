"""lm-evaluation-harness on an enabled model: its own `HFLM` and `simple_evaluate`, the scores and texts of plain HF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hf_paged
from tests.helpers import FAMILIES, demo_model, demo_tokenizer

pytestmark = pytest.mark.clients

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

STARTS = [
    "The statement",
    "import os",
    "A list is",
    "If the",
    "class",
    "def f(x):",
    "The value of",
    "Note that",
]
GENERATE = """
task: ends
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n", "."], max_gen_toks: 40}}
metric_list: [{{metric: exact_match}}]
"""
CHOOSE = """
task: chooses
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["is", "import", "object"]
doc_to_target: 0
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of two tasks over eight lines of text, read without a hub."""
    from lm_eval.tasks import TaskManager

    folder: Path = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "answer": "is"}) + "\n" for text in STARTS))
    for name, text in (("ends", GENERATE), ("chooses", CHOOSE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return TaskManager(include_path=str(folder), include_defaults=False)


def harness(model: Any, family: str, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=demo_tokenizer(family), backend="causal", **options)


def evaluate(model: Any, family: str, tasks: Any) -> dict[str, Any]:
    """What the harness answered and scored, document by document."""
    results = lm_eval.simple_evaluate(
        model=harness(model, family, batch_size=4, max_length=200),
        tasks=["ends", "chooses"],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    answers = {
        name: [(s["doc_id"], s["filtered_resps"]) for s in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in results["samples"].items()
    }
    return {"answers": answers, "scores": results["results"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation(family: str, tasks: Any) -> None:
    model = demo_model(family)
    expected = evaluate(model, family, tasks)
    texts = [answers[0] for _doc, answers in expected["answers"]["ends"]]
    assert len(texts) == len(STARTS)
    assert len(set(texts)) > 4
    with hf_paged.enabled(model, fallback="error"):
        got = evaluate(model, family, tasks)
        stats = hf_paged.stats(model)
    # Log-likelihoods are the ordinary forward's: the same numbers to the last bit.
    assert got == expected
    assert stats.native_calls == len(STARTS) / 4
    assert stats.peak_running == 4


def test_stop_strings_end_rows_by_themselves(tasks: Any) -> None:
    from lm_eval.api.instance import Instance

    def requests() -> list[Any]:
        options = {"until": [".", "\n"], "max_gen_toks": 100}
        return [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(STARTS)]

    model = demo_model("llama")
    expected = harness(model, "llama", batch_size=len(STARTS)).generate_until(requests())
    with hf_paged.enabled(model, fallback="error"):
        assert harness(model, "llama", batch_size=len(STARTS)).generate_until(requests()) == expected
        stats = hf_paged.stats(model)
    assert stats.native_calls == 1
    # Rows that had their stop string left the batch: plain HF computes every row of every step.
    assert stats.mean_running < 0.9 * len(STARTS)


def test_log_likelihoods_are_the_ordinary_forwards() -> None:
    from lm_eval.api.instance import Instance

    def requests() -> list[Any]:
        return [Instance("loglikelihood", {}, (text, " the end"), i) for i, text in enumerate(STARTS)]

    model = demo_model("gpt2")
    expected = harness(model, "gpt2", batch_size=3).loglikelihood(requests())
    with hf_paged.enabled(model, fallback="error"):
        assert harness(model, "gpt2", batch_size=3).loglikelihood(requests()) == expected
        assert hf_paged.stats(model).requests == 0
