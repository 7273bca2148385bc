"""`pytest -m gpu` finds its tests on any machine."""

from __future__ import annotations

import pytest

from tests.helpers import ROOT

#: What the suite must have tests of, by a part of their names.
SUBJECTS = [
    "test_decode[",
    "test_prefill[",
    "test_quantised_cache[shape0-cache_dtype1",
    "test_graph_replay_with_changed_lengths_and_tables",
    "test_sampler",
    "upstreams_on_the_familys_kernels[gpt2]",
    "upstreams_on_the_familys_kernels[gpt_bigcode]",
    "upstreams_on_the_familys_kernels[llama]",
    "low_precision_is_as_exact_as_upstreams[llama-torch.bfloat16]",
    "graphs_replay_other_lengths_and_edited_weights",
    "preempted_sequences",
    "adapters_share_a_batch",
    "a_soak_leaves_nothing_behind",
]


class Collected:
    """A plugin that keeps what a session has found."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.name for item in session.items]


def test_the_gpu_suite_is_collected(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    collected = Collected()
    options = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    code = pytest.main([*options, str(ROOT / "tests" / "gpu")], plugins=[collected])
    assert code == pytest.ExitCode.OK, capsys.readouterr().out
    for subject in SUBJECTS:
        assert any(subject in name for name in collected.names), f"no test of {subject}"
