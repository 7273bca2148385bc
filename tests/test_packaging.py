"""What is built from the tree: wheel and source distribution hold the whole package and nothing else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from tests.helpers import DEMO_MODELS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_SOURCE = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "examples",
)


def package_sources() -> dict[str, bytes]:
    """Installed path -> content, for each file that a user must get."""
    files = {path: path for path in (ROOT / "hf_paged").rglob("*") if path.suffix in (".py", ".typed")}
    for folder in ("kernels", "patches"):
        files |= {ROOT / "hf_paged" / folder / path.name: path for path in (ROOT / folder).glob("*.py")}
    return {str(target.relative_to(ROOT)): path.read_bytes() for target, path in files.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it; built from a copy, so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("packages")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert content == package_sources()


def test_the_sdist_holds_real_files(built: Path) -> None:
    expected = package_sources()
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
        links = [name for name, member in members.items() if member.issym() or member.islnk()]
        missing = set(expected) - {name for name, member in members.items() if member.isfile()}
    assert links == []
    assert missing == set()
    assert {"README.md", "LICENSE", "pyproject.toml"} <= set(members)
    assert not any(name.startswith("tests") for name in members)


def test_the_metadata_says_what_it_needs(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        fields = metadata(wheel)
        (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        scripts = wheel.read(entry_points).decode()
        licenses = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert fields["Name"] == "hf-paged"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    requirements = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert "transformers<6,>=5.6" in requirements
    assert len(requirements) == len(PROJECT["dependencies"])
    assert set(fields.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert "hf-paged = hf_paged.cli.main:app" in scripts
    assert len(licenses) == 1


@pytest.mark.parametrize("extra, moving", [("test", "newest"), ("clients", "clients")])
def test_the_pins_name_every_dependency(extra: str, moving: str) -> None:
    """Each direct dependency of the package, its tests and their clients has one exact version for `make`."""
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for name in ("base", moving)
        for line in (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    direct = PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]
    names = {requirement.split(";")[0].split("[")[0].strip() for requirement in direct}
    names = {name.split("=")[0].split("<")[0].split(">")[0].strip().lower() for name in names}
    assert names - pinned == set()


def test_the_command_exists() -> None:
    module, _, name = PROJECT["scripts"]["hf-paged"].partition(":")
    assert importlib.util.find_spec(module) is not None
    done = subprocess.run(
        [sys.executable, "-m", "hf_paged", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert name == "app"
    for command in ("compare", "generate", "env"):
        assert command in done.stdout


def test_the_quickstart_of_the_readme_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "check_installed.py", ROOT / "README.md", DEMO_MODELS / "gpt2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quickstart and generate: ok" in done.stdout
