"""The command with PEFT checkpoints: a folder as the model, and adapters by name."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from typer.testing import CliRunner, Result

from hf_paged.cli.main import app
from tests.helpers import DEMO_MODELS, demo_model, demo_tokenizer

PROMPTS = ["def main(", "The statement"]
LLAMA = DEMO_MODELS / "llama"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints for the demo LLaMA, large enough to change its texts."""
    folders = {}
    for seed, name in enumerate(("loud", "quiet")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = peft.LoraConfig(
                r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
            )
            model = peft.get_peft_model(demo_model("llama"), config)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def text_of(folder: Path | None, prompt: str) -> str:
    model = demo_model("llama")
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    tokenizer = demo_tokenizer("llama")
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_with_a_checkpoint_as_the_model(adapters: dict[str, Path]) -> None:
    result = run("generate", adapters["loud"], PROMPTS[0], "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert "not native" not in result.stderr
    expected = text_of(adapters["loud"], PROMPTS[0])
    assert expected != text_of(None, PROMPTS[0])
    assert result.stdout.rstrip("\n") == expected.rstrip("\n")


def test_each_prompt_with_each_adapter(adapters: dict[str, Path]) -> None:
    options = [f"--adapter={name}={folder}" for name, folder in adapters.items()] + ["--adapter=__base__"]
    result = run("generate", LLAMA, *PROMPTS, "--max-new-tokens", 12, *options)
    assert result.exit_code == 0, result.output
    assert "not native" not in result.stderr
    expected = ""
    for number, prompt in enumerate(PROMPTS, start=1):
        for name, folder in (*adapters.items(), ("__base__", None)):
            expected += f"[{number}] {prompt}  ({name})\n{text_of(folder, prompt)}\n"
    assert result.stdout == expected


def test_compare_runs_on_an_adapter(adapters: dict[str, Path]) -> None:
    options = ["--repeats", 1, "--arms", "loop,hf_paged", "--num-requests", 3, "--lengths", "alpaca"]
    result = run("compare", LLAMA, *options, "--max-new-tokens", 8, f"--adapter=loud={adapters['loud']}")
    assert result.exit_code == 0, result.output
    assert "equal (3)" in result.stdout


@pytest.mark.parametrize(
    "value, message",
    [("loud", "must be NAME=PATH"), ("a/b={}", "adapter name"), ("new=/nowhere", "no adapter_config.json")],
)
@pytest.mark.parametrize("command", [["generate", LLAMA, "x"], ["compare", LLAMA]])
def test_bad_adapters_are_one_line(
    command: list, value: str, message: str, adapters: dict[str, Path]
) -> None:
    result = run(*command, f"--adapter={value.format(adapters['loud'])}")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
