"""Documents for the demo models, from the text that ships with Python itself.

Three kinds, all short enough that a small model can learn where they end:
  code    one function or method of the standard library, or two neighbours, dedented
  prose   neighbouring paragraphs of a `pydoc` topic, or of a module's docstring
  answer  "What does textwrap.fill do?" with the first paragraph of its docstring

Nothing is downloaded. The text depends on the Python version, so the digest of the corpus is part of what the
training script prints. The prompts under `examples/prompts/` are of the held-out share, which no model was
trained on; to write them again:

    python examples/demo_corpus.py examples/prompts
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import pydoc_data.topics
import random
import re
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

USER, ASSISTANT = "<|user|>", "<|assistant|>"
_MIN_CHARS, _MAX_CHARS = 60, 560
# Tables and test data teach a small model nothing but digits.
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
_HELD_OUT_ONE_IN = 40

Kind = Literal["code", "prose", "answer"]


@dataclass(frozen=True)
class Document:
    """One text a model should learn to write from start to end."""

    kind: Kind
    text: str


def load_corpus() -> tuple[list[Document], list[Document]]:
    """Collect and split the documents.

    Returns:
        (train, held_out), each without duplicates and in an order that only the texts decide. A document is
        held out by its checksum, so adding a source moves no document from one side to the other.
    """
    unique = {doc.text: doc for doc in _collect() if _MIN_CHARS <= len(doc.text) <= _MAX_CHARS}
    documents = [unique[text] for text in sorted(unique)]
    held_out = [doc for doc in documents if _is_held_out(doc)]
    train = [doc for doc in documents if not _is_held_out(doc)]
    return train, held_out


def corpus_digest(documents: Iterable[Document]) -> str:
    """Return 12 hexadecimal digits that name these texts in this order."""
    digest = hashlib.sha256()
    for doc in documents:
        digest.update(doc.text.encode() + b"\0")
    return digest.hexdigest()[:12]


def question(name: str) -> str:
    """Return the user's side of an `answer` document."""
    return f"What does {name} do?"


def _is_held_out(doc: Document) -> bool:
    return zlib.crc32(doc.text.encode()) % _HELD_OUT_ONE_IN == 0


def _collect() -> Iterator[Document]:
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield from _prose(text)
    for path in _standard_library():
        source = path.read_text(encoding="utf-8", errors="replace")
        with warnings.catch_warnings():
            # Old escape sequences in the library's own strings.
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(source)
            except SyntaxError:
                # A few templates and fixtures are no Python by intent.
                continue
        yield from _prose(ast.get_docstring(tree) or "")
        module = path.parent.name if path.stem == "__init__" else path.stem
        yield from _answers(tree, module)
        yield from _code(tree, source.splitlines())


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(paths) if not _SKIPPED_FOLDERS.intersection(path.parts)]


def _prose(text: str) -> Iterator[Document]:
    """Join neighbouring paragraphs until the next one would make the document too long."""
    joined = ""
    for paragraph in text.expandtabs().split("\n\n"):
        paragraph = "\n".join(line.rstrip() for line in paragraph.splitlines()).strip("\n")
        if joined and len(joined) + len(paragraph) > _MAX_CHARS:
            yield Document("prose", joined)
            joined = ""
        joined = f"{joined}\n\n{paragraph}" if joined else textwrap.dedent(paragraph)
    yield Document("prose", joined)


def _answers(tree: ast.Module, module: str) -> Iterator[Document]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring and not node.name.startswith("_"):
            answer = docstring.split("\n\n")[0].rstrip()
            yield Document("answer", f"{USER}{question(f'{module}.{node.name}')}{ASSISTANT}{answer}")


def _code(tree: ast.Module, lines: list[str]) -> Iterator[Document]:
    """Yield the functions of every body, two of three joined by a blank line where they fit."""
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.Module | ast.ClassDef):
            continue
        functions = [node for node in scope.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        sources = [_source(node, lines) for node in functions]
        for index in range(0, len(sources), 3):
            pair, single = sources[index : index + 2], sources[index + 2 : index + 3]
            joined = "\n\n".join(pair)
            yield from (Document("code", text) for text in ([joined] if len(joined) <= _MAX_CHARS else pair))
            yield from (Document("code", text) for text in single)


def _source(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]).expandtabs())
    return "\n".join(line.rstrip() for line in source.splitlines())


def write_prompts(held_out: list[Document], folder: Path, seed: int = 0) -> None:
    """Write the prompt files: one prompt a line, none twice.

    `prose.txt` and `code.txt` hold beginnings of one line, `chat.txt` questions for the chat template, and
    `mixed.jsonl` 64 objects with "kind", "prompt" (one word to most of a document) and "reference", the rest.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(held_out, len(held_out))
    first_lines = [doc.text.split("\n")[0] for doc in shuffled if doc.kind == "code"]
    signatures = [line for line in first_lines if re.fullmatch(r"def .*:", line)]
    questions = [doc.text.removeprefix(USER).split(ASSISTANT)[0] for doc in shuffled if doc.kind == "answer"]
    prose = [doc.text.split() for doc in shuffled if doc.kind == "prose"]
    openings = [" ".join(words[: rng.randint(3, 24)]) for words in prose]
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("code", signatures), ("chat", questions), ("prose", openings)):
        chosen = list(dict.fromkeys(prompts))[:32]
        (folder / f"{name}.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    mixed: dict[str, str] = {}
    for doc in shuffled:
        if doc.kind == "answer":
            continue
        # A byte-level BPE joins a space to the word after it, so a prompt ends before one.
        ends = [match.start() for match in re.finditer(r"(?<=\S)\s", doc.text)]
        cut = ends[int(rng.random() ** 2 * len(ends) * 0.9)]
        record = {"kind": doc.kind, "prompt": doc.text[:cut], "reference": doc.text[cut:]}
        mixed.setdefault(doc.text[:cut], json.dumps(record, ensure_ascii=False))
    (folder / "mixed.jsonl").write_text("\n".join(list(mixed.values())[:64]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the prompt files.")
    parser.add_argument("folder", type=Path, help="where to write the prompt files")
    write_prompts(load_corpus()[1], parser.parse_args().folder)
