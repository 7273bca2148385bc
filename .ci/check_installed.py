"""Run the README's quickstart, on a demo model, and one checked generate with the hf_paged that is installed.

Usage: check_installed.py README.md MODEL_FOLDER
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

HUB_ID = "openai-community/gpt2"


def quickstart(readme: str, model: str) -> str:
    """The README's Python blocks, in order, with the hub id replaced by a local folder."""
    code = "".join(re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE))
    assert HUB_ID in code, f"the README's Python blocks do not load {HUB_ID}"
    return code.replace(HUB_ID, model)


def check_generate(folder: str) -> None:
    """One greedy call, native and equal to the plain one."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("def read(path):", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    with hf_paged.enabled(model):
        paged = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        calls = hf_paged.stats(model).native_calls
    assert calls == 1, f"{calls} native calls"
    assert torch.equal(plain, paged), (plain, paged)


def main() -> None:
    readme, folder = Path(sys.argv[1]), sys.argv[2]
    print("hf_paged from", hf_paged.__file__)
    code = quickstart(readme.read_text(), folder)
    exec(compile(code, str(readme), "exec"), {"__name__": "__main__"})
    check_generate(folder)
    print("quickstart and generate: ok")


if __name__ == "__main__":
    main()
