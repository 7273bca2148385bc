"""Length distributions have the means they are named for, and are the same for the same seed."""

from __future__ import annotations

import statistics

import pytest

from hf_paged.comparison.lengths import DISTRIBUTIONS, find_distribution

# Means of prompt and output: the project's workload, and those published in the vLLM paper.
PUBLISHED = {"design": (80, 60), "sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45), "uniform": (80, 60)}
PUBLISHED |= {"azure-code": (2048, 28), "azure-chat": (1155, 211)}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("count, tolerance", [(32, 0.05), (1000, 0.01)])
def test_means_are_the_published_ones(name: str, count: int, tolerance: float) -> None:
    if (name, count) == ("azure-code", 32):
        tolerance = 0.15  # one of 32 outputs carries a sixth of all tokens
    pairs = DISTRIBUTIONS[name].draw(count, seed=3)
    prompt, output = (statistics.mean(column) for column in zip(*pairs, strict=True))
    assert prompt == pytest.approx(PUBLISHED[name][0], rel=tolerance)
    assert output == pytest.approx(PUBLISHED[name][1], rel=tolerance)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_lengths_stay_within_their_limits(name: str) -> None:
    distribution = DISTRIBUTIONS[name]
    for prompt, output in distribution.draw(500, seed=0):
        assert 1 <= prompt <= distribution.prompt.maximum
        assert 1 <= output <= distribution.output.maximum


def test_the_seed_decides() -> None:
    design = find_distribution("design")
    assert design.draw(50, seed=1) == design.draw(50, seed=1)
    assert design.draw(50, seed=1) != design.draw(50, seed=2)


def test_ragged_lengths_are_ragged_and_prompt_and_output_independent() -> None:
    prompts, outputs = zip(*find_distribution("design").draw(2000, seed=0), strict=True)
    assert statistics.stdev(prompts) > 30
    assert abs(statistics.correlation(prompts, outputs)) < 0.1


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="lengths='chat': must be one of design, sharegpt"):
        find_distribution("chat")
