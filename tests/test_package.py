"""The package: what a wheel and an sdist hold, the command minitron, extras, constraints."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_ext
from megatron_ext import __main__ as command
from megatron_ext import report
from megatron_ext.cli.megatron_flags import Data
from megatron_ext.data import datasets
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.extras import need
from tests.programs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_INSTALLED = ("gpu_check.py",)  # runs in a checkout, with tests/ and tools/bench
BUILD = """
from setuptools import build_meta
build_meta.build_wheel("out")
build_meta.build_sdist("out")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of a wheel and an sdist, built from a copy without a network."""
    copy = tmp_path_factory.mktemp("package") / "copy"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for name in (".ci", ".shellcheckrc", ".dockerignore"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    (copy / "out").mkdir()
    ran = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return copy / "out"


@pytest.fixture(scope="module")
def wheel(built):
    """Return the wheel's files: name, bytes."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_holds_the_package_and_the_programs(wheel):
    package = [
        path.relative_to(ROOT)
        for path in (ROOT / "megatron_ext").rglob("*")
        if path.suffix in (".py", ".c", ".h", ".typed")
    ]
    expected = {str(path): (ROOT / path).read_bytes() for path in package}
    for program, _ in command.PROGRAMS.values():
        expected[f"megatron_ext/programs/{program}"] = (ROOT / program).read_bytes()
    assert {k: v for k, v in wheel.items() if ".dist-info/" not in k} == expected
    assert sum(name.endswith(".c") for name in wheel) == 2


def test_every_program_has_a_command():
    tools = {
        f"tools/{path.name}"
        for path in (ROOT / "tools").glob("*.py")
        if "run_main(" in path.read_text() and path.name not in NOT_INSTALLED
    }
    assert {file for file, _ in command.PROGRAMS.values()} == tools | {
        "prune.py",
        "pretrain_distill.py",
    }


def test_metadata(wheel):
    folder = f"megatron_minitron-{megatron_ext.__version__}.dist-info"
    meta = email.message_from_bytes(wheel[f"{folder}/METADATA"])
    assert meta["Name"] == "megatron-minitron"
    assert meta["Requires-Python"] == ">=3.12"
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Description-Content-Type"] == "text/markdown"
    assert b"Apache License" in wheel[f"{folder}/licenses/LICENSE"]
    assert b"minitron = megatron_ext.__main__:main" in wheel[f"{folder}/entry_points.txt"]
    assert set(meta.get_all("Provides-Extra")) == set(EXTRAS)


def test_one_version_of_one_package_is_asked_for():
    """Who asks for == of everything cannot be installed beside anything."""
    pinned = [need for need in PROJECT["dependencies"] if "==" in need or "<" in need]
    assert [Requirement(need).name for need in pinned] == ["megatron-core"]


def test_an_sdist_holds_what_builds_and_tests_it(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git here")
    left_out = {name for name in listed.stdout.split() if (ROOT / name).exists()} - names
    assert left_out == {".gitignore"}


def run_wheel(built, *arguments, cwd):
    """Run ``python -m megatron_ext`` of the wheel, unpacked, from a folder that has nothing."""
    (path,) = built.glob("*.whl")
    place = cwd / "site"
    if not place.exists():
        with zipfile.ZipFile(path) as archive:
            archive.extractall(place)
    return subprocess.run(
        [sys.executable, "-m", "megatron_ext", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
    )


def test_programs_of_an_installed_wheel(built, tmp_path):
    assert run_wheel(built, "--version", cwd=tmp_path).stdout.split()[1] == megatron_ext.__version__
    ran = run_wheel(built, "rank-candidates", "--help", cwd=tmp_path)
    assert (ran.returncode, ran.stdout.splitlines()[0]) == (
        0,
        "usage: minitron rank-candidates [flags]",
    )
    ran = run_wheel(built, "plot-scores", "--scores", "a", "--out", "b.txt", cwd=tmp_path)
    assert ran.returncode == USAGE
    assert "ERROR: --out b.txt: end it in one of" in ran.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prunes", "minitron prunes: no such command; did you mean prune?"),
        ("x", "minitron x: no such command; choose from prune, distill, convert, "),
    ],
)
def test_unknown_commands(monkeypatch, capsys, name, said):
    monkeypatch.setattr(sys, "argv", ["minitron", name])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == USAGE
    assert capsys.readouterr().err.startswith(f"ERROR: {said}")


def test_the_list_of_commands_imports_nothing_heavy():
    script = "import sys, megatron_ext.__main__ as m; print(m.overview()); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    *listed, modules = ran.stdout.splitlines()
    assert sum(line.startswith("  ") for line in listed) == len(command.PROGRAMS)
    assert not {"torch", "numpy", "megatron.core", "argparse"} & set(modules.split())


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("transformers", "hf", lambda: datasets.build_tokenizer(Data(**HUGGING_FACE))),
        ("matplotlib", "plot", lambda: report.new_figure(1, 1)),
        ("tensorboard", "log", lambda: need("torch.utils.tensorboard", "log", "--tensorboard-dir")),
    ],
)
def test_an_extra_that_is_missing_is_named(monkeypatch, module, extra, call):
    for name in [*sys.modules]:
        if name.split(".")[0] == module or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UserError, match=f" needs {module}, of the extra {extra}: pip ") as caught:
        call()
    assert caught.value.code == USAGE
    assert any(re.match(r"[\w-]+", one)[0] == module for one in EXTRAS[extra])


HUGGING_FACE = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "somewhere"}


def test_constraints_are_versions_that_the_project_takes():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(line.split("==") for line in lines if not line.startswith("#"))
    needs = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    for one in map(Requirement, needs):
        if one.name != PROJECT["name"]:
            name = re.sub(r"[-_.]+", "-", one.name).lower()
            assert one.specifier.contains(exact[name]), one


def test_one_version_everywhere():
    version = megatron_ext.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["dynamic"] == ["version"]


def test_no_code_imports_an_extra_at_its_top():
    """Regression: the examples ended in a traceback without transformers."""
    extras = "transformers|tokenizers|matplotlib|tensorboard|wandb|lm_eval|datasets"
    files = [
        path
        for top in ("megatron_ext", "tools", "examples")
        for path in Path(ROOT, top).rglob("*.py")
    ]
    top = re.compile(rf"^(import|from) ({extras})\b", re.M)
    assert [path.name for path in files if top.search(path.read_text())] == []
