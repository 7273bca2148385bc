"""`hf-paged run`: scripts run as python would run them, with their models enabled and a line about it at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import DEMO_MODELS, ROOT

LOAD = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(DEMO_MODELS / "llama")!r})
tokenizer = AutoTokenizer.from_pretrained({str(DEMO_MODELS / "llama")!r})
ids = tokenizer("import", return_tensors="pt")
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(source: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(source)
        return path

    return write


def execute(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )


def plain_and_run(
    script: Path, *arguments: str
) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    return execute(script, *arguments), execute("-m", "hf_paged", "run", script, *arguments)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


def test_every_way_to_generate_is_served_and_counted(write) -> None:
    script = write(
        LOAD
        + """
import warnings
warnings.simplefilter("ignore")
from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM, pipeline
options = dict(max_new_tokens=6, do_sample=False)
print(model.generate(**ids, **options).tolist())
print(model.generate(**ids, **options, use_cache=False).tolist())
print(pipeline("text-generation", model=model, tokenizer=tokenizer)(["a", "b", "c"], **options))
config = GenerationConfig(**options, eos_token_id=1)
from transformers import ContinuousBatchingConfig
small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
print([o.generated_tokens for o in model.generate_batch([[5, 6], [7]], config, small).values()])
torch = __import__("torch")
torch.manual_seed(0)
shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=1024)
print(GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).generate(**ids, **options).shape)
"""
    )
    plain, run = plain_and_run(script)
    assert run.returncode == plain.returncode == 0, run.stderr
    assert run.stdout == plain.stdout
    line = last_line(run)
    assert line.startswith(
        "hf_paged: 6 native calls of LlamaForCausalLM; 1 on the original generate (use_cache 1); "
        "GPTNeoXForCausalLM not enabled ("
    )


def test_nothing_is_imported_for_a_script(write) -> None:
    script = write(
        """
import os, sys
print(sys.argv[1:], __name__, __file__, os.path.samefile(sys.path[0], os.path.dirname(__file__)))
print("transformers" in sys.modules)
"""
    )
    plain, run = plain_and_run(script, "--help", "-m", "--max", "3", "x y")
    assert run.returncode == 0
    assert run.stdout == plain.stdout
    assert run.stdout.startswith("['--help', '-m', '--max', '3', 'x y'] __main__")
    assert last_line(run) == "hf_paged: 0 native calls"


@pytest.mark.parametrize(
    "ending", ["raise LookupError('gone')", "import sys; sys.exit(7)", "import sys; sys.exit('words')", "1 +"]
)
def test_exceptions_and_exit_codes_are_the_scripts(write, ending: str) -> None:
    plain, run = plain_and_run(write(f"def end():\n    pass\nprint('begun')\n{ending}\n"))
    assert run.returncode == plain.returncode != 0
    assert run.stdout == plain.stdout
    assert run.stderr == plain.stderr + "hf_paged: 0 native calls\n"


def test_ctrl_c_has_the_exit_code_a_shell_shows(write) -> None:
    run = execute("-m", "hf_paged", "run", write("raise KeyboardInterrupt"))
    assert run.returncode == 130


def test_a_script_that_is_not_there() -> None:
    run = execute("-m", "hf_paged", "run", "/no/such/script.py")
    assert run.returncode != 0
    assert "/no/such/script.py" in run.stderr


def test_a_module(tmp_path: Path) -> None:
    (tmp_path / "a_module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    run = execute("-m", "hf_paged", "run", "-m", "a_module", "-m", "--x", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert run.stdout == "__main__ ['-m', '--x']\n", run.stderr


def test_the_environment_turns_everything_off(write) -> None:
    script = write(LOAD + "model.generate(**ids, max_new_tokens=2)\nprint(sorted(vars(model)))")
    plain = execute(script)
    run = execute("-m", "hf_paged", "run", script, HF_PAGED_DISABLE="1")
    assert run.stdout == plain.stdout
    assert last_line(run) == "hf_paged: HF_PAGED_DISABLE is set: nothing was enabled"


def test_a_class_with_a_generate_of_its_own_runs_it_once_a_call(write) -> None:
    script = write(
        LOAD
        + """
class Mine(type(model)):
    def generate(self, *args, **kwargs):
        print("mine")
        return super().generate(*args, **kwargs)
model.__class__ = Mine
for _ in range(2):
    print(model.generate(**ids, max_new_tokens=4, do_sample=False).tolist())
"""
    )
    plain, run = plain_and_run(script)
    assert run.stdout == plain.stdout
    assert run.stdout.count("mine") == 2
    assert last_line(run) == "hf_paged: 1 native calls of Mine"
