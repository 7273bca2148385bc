"""Every example runs as it stands, offline on the demo models, and is served natively."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest

import hf_paged
from tests.helpers import ROOT

EXAMPLES = sorted(
    path.name
    for path in (ROOT / "examples").glob("*.py")
    if path.name not in ("demo_corpus.py", "train_demo_models.py")  # these make the demo models
)
#: What its output must say.
SAYS = {
    "batch.py": "4 requests at once",
    "chat_prefix_reuse.py": "prompt tokens were in the cache",
    "compare_ab.py": "hf_paged",
    "grpo.py": "16 rollouts, no fallbacks",
    "multi_lora.py": "shout",
    "pipeline_dataset.py": "32 requests, up to",
    "quickstart.py": "native_calls=1",
    "streaming.py": "\n",
}


def test_every_example_is_here() -> None:
    assert set(EXAMPLES) == set(SAYS)


@pytest.mark.parametrize("name", sorted(SAYS.keys() - {"grpo.py", "multi_lora.py"}))
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "examples" / name)
    monkeypatch.setattr(sys, "argv", [path])
    variables = runpy.run_path(path, run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
    if name == "compare_ab.py":
        assert not hf_paged.is_enabled(variables["model"])
        return
    stats = hf_paged.stats(variables["model"])
    assert stats.native_calls > 0
    assert stats.fallback_calls == {}
    if name == "chat_prefix_reuse.py":
        assert stats.prefix_hit_tokens > 0


#: In a process of their own: what they import from their folder, and what accelerate keeps of a first trainer.
ALONE = {"grpo.py": [], "multi_lora.py": ["--steps", "2"]}


@pytest.mark.parametrize(
    "name",
    [
        "multi_lora.py",
        "grpo.py",
    ],
)
def test_example_alone(name: str) -> None:
    if name == "grpo.py":
        pytest.importorskip("trl")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *ALONE[name]],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
