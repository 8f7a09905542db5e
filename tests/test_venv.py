"""tools/venv.sh: which Python it takes, and when it makes .venv and installs again.

Pythons here are shell scripts that write down how they were called.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.programs import ROOT

# Usable or not (too old, a shim of pyenv, without ensurepip); a .venv of it has a copy of it.
PYTHON = """#!/usr/bin/env bash
usable={usable}
echo "$0 $*" >>{log}
case "$1 $2" in
"-c "*) $usable ;;
"-m venv")
    rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
    echo "PATH='$4/bin':\\$PATH" >"$4/bin/activate"
    ;;
"-m pip") [ ! -e {log}.offline ] ;;
esac
"""
NAMES = ("python3.13", "python3.12", "python3", "python")


class Checkout:
    """A checkout with nothing but tools/venv.sh, on a machine without a usable Python."""

    def __init__(self, folder: Path):
        """Make it below ``folder``."""
        self.root, self.bin, self.home = folder / "a checkout", folder / "bin", folder / "home"
        self.log, self.venv = folder / "log", self.root / ".venv"
        (self.root / "tools").mkdir(parents=True)
        self.home.mkdir()
        shutil.copy(ROOT / "tools/venv.sh", self.root / "tools")
        (self.root / "pyproject.toml").write_text("needs a")
        (self.root / "constraints.txt").write_text("a==1")
        for name in NAMES:
            self.add(self.bin / name, usable=False)
        self.say("uv", None)
        self.say("pyenv", None)

    def add(self, path: Path, *, usable: bool = True) -> Path:
        """Write a Python."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PYTHON.format(usable=str(usable).lower(), log=f"'{self.log}'"))
        path.chmod(0o755)
        return path

    def say(self, name: str, line: str | None) -> None:
        """Write a command of the PATH that says a line, or fails."""
        said = "exit 1" if line is None else f"echo '{line}'"
        self.add(self.bin / name).write_text(f"#!/bin/sh\n{said}\n")

    def source(self, extras: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Source tools/venv.sh as a launcher does, and say which Python is the active one."""
        self.log.unlink(missing_ok=True)
        script = f"set -euo pipefail; source tools/venv.sh '{extras}'; command -v python"
        environment |= {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home)}
        environment |= {"CONDA_PREFIX": str(self.home / "conda")}
        return subprocess.run(
            ["bash", "-c", script, "launcher", "argument"],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def succeed(self, extras: str = "", **environment: str) -> list[str]:
        """Source it and return what pip and venv were asked for."""
        ran = self.source(extras, **environment)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[-1] == f"{self.venv}/bin/python"
        return self.calls()

    def calls(self) -> list[str]:
        """Return the calls of -m, since sourced last."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if " -m " in line]

    def installations(self) -> list[str]:
        """Return the installations of the project among them."""
        return [call for call in self.calls() if " -e " in call]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_python_on_the_path_that_runs(checkout, name):
    python = checkout.add(checkout.bin / name)
    assert checkout.succeed()[0] == f"{python} -m venv --clear {checkout.venv}"


@pytest.mark.parametrize(
    "place",
    [
        "home/.pyenv/versions/3.12.1/bin/python",
        "home/.pyenv/versions/3.13.0/bin/python",
        "home/miniforge3/bin/python",
        "home/conda/envs/new/bin/python",
    ],
)
def test_pythons_that_are_not_on_the_path(checkout, tmp_path, place):
    """python3 may be 3.11 and pyenv hold 3.12; pyenv's shims for it fail."""
    python = checkout.add(tmp_path / place)
    assert checkout.succeed()[0].startswith(f"{python} -m venv ")


def test_pythons_that_uv_and_pyenv_know_of(checkout, tmp_path):
    python = checkout.add(tmp_path / "uv/bin/python3.14")
    checkout.say("uv", str(python))
    assert checkout.succeed()[0].startswith(f"{python} -m venv ")
    shutil.rmtree(checkout.venv)
    python = checkout.add(tmp_path / "pyenv root/versions/3.12.9/bin/python")
    checkout.say("pyenv", str(tmp_path / "pyenv root"))
    assert checkout.succeed()[0].startswith(f"{python} -m venv ")


def test_the_python_of_the_user(checkout, tmp_path):
    checkout.add(checkout.bin / "python3.13")
    python = checkout.add(tmp_path / "mine/python")
    assert checkout.succeed(PYTHON=str(python))[0].startswith(f"{python} -m venv ")


def test_no_python(checkout):
    ran = checkout.source()
    assert ran.returncode == 1
    assert ran.stderr.startswith("ERROR: no Python 3.12 or newer found: install one (apt install")
    assert ran.stderr.count("\n") == 1
    assert not checkout.venv.exists()


def test_the_python_of_the_user_is_too_old(checkout):
    checkout.add(checkout.bin / "python3.13")
    old = str(checkout.bin / "python3")
    ran = checkout.source(PYTHON=old)
    assert (ran.returncode, ran.stderr) == (
        1,
        f"ERROR: PYTHON={old}: not Python 3.12 or newer with its module venv.\n",
    )


def test_it_installs_once_for_what_is_needed(checkout):
    checkout.add(checkout.bin / "python3.13")
    _, upgrade, install = checkout.succeed("test")
    assert upgrade.endswith("--upgrade pip")
    assert install.endswith(f"-c {checkout.root}/constraints.txt -e {checkout.root}[test]")
    assert checkout.succeed("test") == []
    assert len(checkout.succeed("hf,plot")) == 1
    assert checkout.succeed("test") == []
    (checkout.root / "constraints.txt").write_text("a==2")
    assert [call.rpartition("[")[2] for call in checkout.succeed("test")] == ["test]"]
    assert checkout.succeed()[0].endswith(f"-e {checkout.root}")


def test_an_installation_that_failed_is_repeated(checkout):
    checkout.add(checkout.bin / "python3.13")
    offline = Path(f"{checkout.log}.offline")
    offline.touch()
    for _ in range(2):
        ran = checkout.source("test")
        assert ran.returncode == 1
        assert ran.stderr == "ERROR: the installation failed; see the lines above.\n"
        assert len(checkout.installations()) == 1
    offline.unlink()
    checkout.succeed("test")
    assert len(checkout.installations()) == 1


@pytest.mark.parametrize("damage", ["older python", "interrupted", "moved"])
def test_a_venv_that_cannot_be_used_is_made_anew(checkout, damage):
    checkout.add(checkout.bin / "python3.13")
    checkout.succeed("test")
    if damage == "older python":
        checkout.add(checkout.venv / "bin/python", usable=False)
    elif damage == "interrupted":
        (checkout.venv / "bin/activate").unlink()
    else:
        (checkout.venv / "bin/activate").write_text("PATH=/elsewhere/.venv/bin:$PATH")
    ran = checkout.source("test")
    assert ran.stdout.startswith("making .venv anew")
    assert ran.returncode == 0
    assert len(checkout.installations()) == 1
    assert checkout.succeed("test") == []


def test_two_launchers_at_the_same_time_install_once(checkout):
    checkout.add(checkout.bin / "python3.13")
    command = ["bash", "-euc", "source tools/venv.sh test"]
    environment = {"PATH": f"{checkout.bin}:/usr/bin:/bin", "HOME": str(checkout.home)}
    both = [subprocess.Popen(command, cwd=checkout.root, env=environment) for _ in range(2)]
    assert [launcher.wait(60) for launcher in both] == [0, 0]
    if shutil.which("flock", path=os.defpath):
        assert len(checkout.installations()) == 1


def test_nothing_is_made_in_an_image(checkout):
    ran = checkout.source(NO_VENV="1")
    assert ran.returncode == 0
    assert not checkout.venv.exists()
