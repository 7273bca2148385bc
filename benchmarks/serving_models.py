"""The models that servers are measured with, as folders that both load: weights, config without an end, tokenizer."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_paged.comparison.models import build_random, parse_dtype

DEMO = Path(__file__).resolve().parent.parent / "examples/models/llama"
NAMES = ("llama-demo", "gpt2-124m")


def save(name: str, folder: Path) -> Any:
    """Saves a model in `folder`; its tokenizer. No token ends a text: both servers end each at its max_tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    if name == "llama-demo":
        model = AutoModelForCausalLM.from_pretrained(DEMO)
    else:
        model = build_random(name, parse_dtype("float32"))
        model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = None
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _widen(folder / "tokenizer.json", model.config.vocab_size)
    return AutoTokenizer.from_pretrained(folder)


def _widen(path: Path, vocab_size: int) -> None:
    """Gives every id of the model a text: those that the tokenizer lacks become words that no text is split into."""
    data = json.loads(path.read_text())
    known = max(max(data["model"]["vocab"].values()), *(t["id"] for t in data["added_tokens"])) + 1
    data["model"]["vocab"] |= {f"Ġw{number}": number for number in range(known, vocab_size)}
    path.write_text(json.dumps(data))


def folder_of(name: str) -> tuple[Path, Any]:
    """A folder in the temporary directory with the model, made where it is not there yet; and its tokenizer."""
    folder = Path(tempfile.gettempdir(), f"hf_paged-serving-{os.getuid()}", name)
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        return folder, save(name, folder)
    return folder, AutoTokenizer.from_pretrained(folder)
