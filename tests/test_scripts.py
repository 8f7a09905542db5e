"""Shell scripts and the Dockerfile: linted, and what the Dockerfile installs."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT
from tools.container_pins import constraints, requirements

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


pinned = pytest.mark.skipif(platform.machine() == "aarch64", reason="no wheels on aarch64")


@pinned
def test_shellcheck():
    assert len(SCRIPTS) > 10
    command = [linter("shellcheck"), *map(str, SCRIPTS)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pinned
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


PROJECT = """
[project]
dependencies = ["megatron-core==0.16.1", "numpy==2.4.6", "torch==2.13.0", "safetensors==0.8.0"]
[project.optional-dependencies]
test = ["pytest==9.2.0", "triton==3.9.0; platform_system == 'Linux'"]
"""


def test_what_an_image_came_with_stays():
    image = {"torch": "2.10.0a0+1.nv25.11", "triton": "3.5", "transformer_engine": "2.9"}
    kept = {"numpy": "1.26.4", "nvidia-cublas": "13", "safetensors": "0.1"}
    installed = image | kept
    assert requirements(PROJECT, None, installed) == ["megatron-core==0.16.1", "safetensors==0.8.0"]
    assert requirements(PROJECT, "test", installed)[2:] == ["pytest==9.2.0"]
    assert constraints(installed.items()) == [
        "numpy==1.26.4",
        "nvidia-cublas==13",
        "torch==2.10.0a0+1.nv25.11",
        "transformer_engine==2.9",
        "triton==3.5",
    ]


def test_what_an_image_lacks_is_installed():
    assert requirements(PROJECT, "test", ["safetensors"])[1:3] == ["numpy==2.4.6", "torch==2.13.0"]


def test_the_project_has_pins_that_can_be_read():
    pins = requirements((ROOT / "pyproject.toml").read_text(), "test", ["torch", "triton"])
    assert "megatron-core==0.16.1" in pins
    assert not any(pin.startswith(("torch==", "triton")) for pin in pins)
