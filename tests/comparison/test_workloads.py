"""Workloads: reading prompts, drawing them, cutting them to the model, refusing what cannot be run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_paged.comparison.workloads import (
    Request,
    Workload,
    fit,
    read_prompts,
    workload_from_lengths,
    workload_from_prompts,
)


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "one\n\n  \ntwo words\n")
    assert [row["prompt"] for row in read_prompts(path)] == ["one", "two words"]


def test_json_lines_bring_text_or_ids_and_limits(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"prompt": "hi", "max_new_tokens": 7}\n{"prompt": [1, 2, 3]}\n')
    rows = read_prompts(path)
    assert rows == [{"prompt": "hi", "max_new_tokens": 7}, {"prompt": [1, 2, 3], "max_new_tokens": None}]
    work = workload_from_prompts(rows[1:], max_new_tokens=9)
    assert work.requests == (Request((1, 2, 3), 9),)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "\n \n", "no prompts in"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', "line 2: not JSON"),
        ("p.jsonl", '{"text": "a"}\n', 'line 1: needs an object with a non-empty "prompt"'),
        ("p.jsonl", '{"prompt": ""}\n', 'line 1: needs an object with a non-empty "prompt"'),
        ("p.jsonl", '{"prompt": "a", "max_new_tokens": 0}\n', "line 1: max_new_tokens=0"),
        ("p.jsonl", '{"prompt": "a", "max_new_tokens": true}\n', "line 1: max_new_tokens=True"),
    ],
)
def test_a_bad_file_names_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_a_missing_or_binary_file_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read prompts"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="cannot read prompts"):
        read_prompts(tmp_path / "binary.txt")


def test_prompts_may_be_ids_tensors_or_requests() -> None:
    request = Request((4, 5), 3)
    work = workload_from_prompts([[1, 2], torch.tensor([3]), request], max_new_tokens=6)
    assert work.requests == (Request((1, 2), 6), Request((3,), 6), request)


@pytest.mark.parametrize("bad", [[], [[]], [[1], "text"], [[1], [[2]]], [torch.ones(1, 2)], [[True]]])
def test_bad_prompts_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="prompt"):
        workload_from_prompts(bad)


def test_drawn_ids_are_in_the_vocabulary_and_never_special() -> None:
    work = workload_from_lengths("alpaca", 40, vocab_size=50, max_positions=None, special_ids=(0, 49))
    ids = {i for r in work.requests for i in r.prompt}
    assert ids <= set(range(1, 49))
    assert work == workload_from_lengths("alpaca", 40, vocab_size=50, max_positions=None, special_ids=(0, 49))


def test_requests_are_cut_to_the_positions_and_the_workload_says_so() -> None:
    work = Workload("w", (Request((1,) * 10, 5), Request((1,) * 10, 50), Request(tuple(range(40)), 4)))
    cut = fit(work, 20)
    assert [(len(r.prompt), r.max_new_tokens) for r in cut.requests] == [(10, 5), (10, 10), (19, 1)]
    assert cut.requests[2].prompt == tuple(range(21, 40))
    assert cut.notes == ("2 of 3 requests cut to the model's 20 positions",)
    assert fit(work, None) is work
    assert fit(work, 100) is work


def test_the_description_has_counts_means_and_maxima() -> None:
    facts = Workload("w", (Request((1, 2), 3), Request((1, 2, 3, 4), 5)), seed=7).describe()
    assert facts["num_requests"] == 2
    assert facts["prompt_tokens"] == {"mean": 3, "max": 4}
    assert facts["max_new_tokens"] == {"mean": 4, "max": 5}
