"""The `hf-paged` command: what it prints, what it refuses and how, and that asking for help loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_paged.cli.main import app
from tests.helpers import DEMO_MODELS, ROOT

FAST = ["--repeats", "1", "--arms", "loop,hf_paged", "--num-requests", "3"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: str | Path) -> str:
    """The one line on standard error of a command that exits with 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("import os\n\nThe statement\n", encoding="utf-8")
    return path


def test_compare_prints_the_table_and_writes_the_report(tmp_path: Path) -> None:
    output = tmp_path / "compare.json"
    result = run("compare", "random:gpt2-tiny", *FAST, "--output", output)
    assert result.exit_code == 0, result.output
    assert "HF loop, batch 1" in result.stdout
    assert "equal (3)" in result.stdout
    data = json.loads(output.read_text())
    assert data["complete"]
    assert data["model"]["name"] == "random:gpt2-tiny"
    assert [a["name"] for a in data["arms"]] == ["loop", "hf_paged"]
    assert data["ratios"][0]["against"] == "loop"


def test_compare_takes_prompts_from_a_file(tmp_path: Path, prompt_file: Path) -> None:
    output = tmp_path / "c.json"
    arguments = [
        "--prompts",
        prompt_file,
        "--max-new-tokens",
        "6",
        "--repeats",
        "1",
        "--arms",
        "loop,hf_paged",
    ]
    result = run("compare", DEMO_MODELS / "gpt2", *arguments, "--json", output)
    assert result.exit_code == 0, result.output
    work = json.loads(output.read_text())["workload"]
    assert work["num_requests"] == 2
    assert work["max_new_tokens"]["max"] == 6


def test_compare_exits_with_1_when_an_arm_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_paged.comparison.arm_paged import PagedArm

    def broken(self: PagedArm) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(PagedArm, "warm_up", broken)
    result = run("compare", "random:gpt2-tiny", *FAST)
    assert result.exit_code == 1
    assert "hf_paged FAILED: RuntimeError: broken" in result.stdout


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, prompt_file: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    tiny = "random:gpt2-tiny"
    assert "no config.json" in refused("compare", tmp_path)
    assert "no config.json" in refused("compare", "./no/such/folder")
    assert "no prompts in" in refused("compare", tiny, "--prompts", empty)
    assert "cannot read prompts" in refused("compare", tiny, "--prompts", tmp_path / "absent.txt")
    assert "there is no tokenizer" in refused("compare", tiny, "--prompts", prompt_file)
    assert "random:gpt9: unknown shape" in refused("compare", "random:gpt9")
    assert "lengths='chat'" in refused("compare", tiny, "--lengths", "chat")
    assert "not both" in refused("compare", tiny, "--lengths", "design", "--prompts", prompt_file)
    assert "arm 'vllm'" in refused("compare", tiny, "--arms", "loop,vllm")
    assert "dtype='int3'" in refused("compare", tiny, "--dtype", "int3")
    assert "--padded-sizes='4,x'" in refused("compare", tiny, "--padded-sizes", "4,x")
    assert "cannot write" in refused("compare", tiny, "--output", tmp_path / "absent" / "c.json")
    assert "suite='huge'" in refused("bench", "--suite", "huge")
    assert "line 'nothing'" in refused("bench", "--only", "nothing")
    assert "has no tokenizer" in refused("generate", tiny, "hello")
    assert "a prompt is empty" in refused("generate", tiny, "")
    assert "needs sampling" in refused("generate", tiny, "hello", "--num-return-sequences", "2")


def test_generate_prints_text_and_speed() -> None:
    result = run("generate", DEMO_MODELS / "gpt2", "import os\n", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert "tokens/s" in result.stderr
    assert "not native" not in result.stderr


def test_generate_is_repeatable_with_a_seed_and_gives_as_many_texts_as_asked() -> None:
    arguments = (
        "generate",
        DEMO_MODELS / "gpt2",
        "import os\n",
        "--max-new-tokens",
        "8",
        "--temperature",
        "1.0",
    )
    several = ("--num-return-sequences", "3", "--seed")
    first, again, other = (run(*arguments, *several, seed) for seed in ("1", "1", "2"))
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout
    assert first.stdout.count("[1] import os") == 3


def test_env_prints_the_environment() -> None:
    result = run("env")
    assert result.exit_code == 0
    assert "transformers: " in result.stdout
    facts = json.loads(run("env", "--json").stdout)
    assert {"python", "packages", "cpu", "backends"} <= set(facts)


def test_help_of_every_command_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hf_paged.cli.main import app\n"
        "for command in ('compare', 'bench', 'generate', 'env'):\n"
        "    result = CliRunner().invoke(app, [command, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_paged", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "Usage: hf-paged" in done.stdout
