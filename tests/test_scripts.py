"""Shell scripts and the Dockerfile: linted, and what they say of versions."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT

FOLDERS = (".ci", "examples", "tests", "tools")
SCRIPTS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path == ROOT / ".ci/run"
)


def linter(name):
    """Return a linter of pyproject.toml's test extra."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    assert found, f"{name} is not installed: pip install -e '.[test]'"
    return found


has_wheels = pytest.mark.skipif(platform.machine() == "aarch64", reason="no wheels on aarch64")


@has_wheels
def test_shellcheck():
    assert len(SCRIPTS) > 10
    command = [linter("shellcheck"), *map(str, SCRIPTS)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@has_wheels
def test_hadolint():
    command = [linter("hadolint"), "Dockerfile"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_programs_find_what_is_not_installed():
    """Regression: tools/bench/convert.py did not find the package tools, where it was started."""
    texts = {path: path.read_text() for path in (ROOT / "tools").rglob("*.py")}
    lost = [
        path.name
        for path, text in texts.items()
        if "__main__" in text and re.search(r"^(from|import) (tools|tests)\b", text, re.M)
        if "sys.path.insert" not in text
    ]
    assert lost == []


def test_the_images_copy_what_an_installation_needs():
    """Files that setup.py and pyproject.toml name are there before pip is called."""
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (pyproject.*) \./$", text, re.M)
    assert len(copied) == 2
    for line in copied:
        assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= set(line.split())
    assert "-c constraints.txt" in text
    assert "constraints.txt" in copied[0]


def test_what_the_image_of_nvidia_keeps():
    """Packages that were built for each other; the project's other needs may be installed."""
    text = (ROOT / "Dockerfile").read_text()
    pattern = re.compile(re.search(r'grep -iE "(.*?)"', text)[1], re.IGNORECASE)
    kept = (
        "torch==2.13.0a0+8145d630e8.nv26.6 torchvision==1 pytorch-triton==3 triton==3 numpy==2.1.0 "
        "transformer_engine==2.16.0+4220403e transformer-engine==2 flash_attn==2 flash-attn==2 "
        "apex==0.1 nvidia-cublas==13 cuda-bindings==13"
    )
    assert all(pattern.match(line) for line in kept.split())
    free = "safetensors==0.1 transformers==5.0 tqdm==4 sentencepiece==0.1 setuptools==81 psutil==5"
    assert not any(pattern.match(line) for line in free.split())
