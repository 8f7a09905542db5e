"""Each folder of the package imports only what it may, and says what it holds."""

import ast
from collections import defaultdict

from tests.programs import ROOT

PACKAGE = ROOT / "megatron_ext"
BASE = {"arch", "runtime"}
# From the ground up. Each may import BASE; what points upwards has its reason behind it.
MAY_IMPORT = {
    "arch": set(),
    "runtime": set(),
    # model: features that bring their own flags.
    "cli": {"model"},
    "checkpoint": {"cli"},
    "data": {"cli"},
    "model": {"cli", "checkpoint", "data"},
    # convert: whether a target can be exported. distillation: the divergence by which layers are
    # scored. rehearsal: the plan that a run executes.
    "pruning": {
        "cli",
        "checkpoint",
        "convert",
        "data",
        "distillation",
        "model",
        "rehearsal",
    },
    # pruning: the plan, which says whose layers the student's were.
    "distillation": {"cli", "checkpoint", "model", "pruning"},
    # rehearsal: the plan that a run executes.
    "training": {"cli", "checkpoint", "data", "model", "distillation", "rehearsal"},
    "inference": {"cli", "checkpoint", "data", "model", "distillation", "training"},
    # model: a checkpoint is computed beside transformers.
    "convert": {"cli", "checkpoint", "data", "model", "pruning"},
    # training: the rules of going on.
    "rehearsal": {
        "cli",
        "checkpoint",
        "convert",
        "data",
        "distillation",
        "model",
        "pruning",
        "training",
    },
    # data: the samples of a masked language model.
    "certify": {
        "cli",
        "checkpoint",
        "data",
        "distillation",
        "model",
        "pruning",
        "rehearsal",
        "training",
    },
    "report": {"pruning"},
    "__main__": {"__version__"},
}


def imports():
    """Return {folder or module of the root: those it imports}."""
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            package, _, rest = node.module.partition(".")
            if package == "megatron_ext":
                found[here] |= {rest.partition(".")[0]} if rest else {x.name for x in node.names}
    return {here: there - {here} for here, there in found.items()}


def test_no_folder_imports_what_it_may_not():
    for here, there in imports().items():
        assert there - BASE <= MAY_IMPORT[here], (here, there - BASE - MAY_IMPORT[here])


def test_what_may_be_imported_is():
    """A reason that is no longer needed goes."""
    found = imports()
    for here, allowed in MAY_IMPORT.items():
        assert allowed <= found.get(here, set()), (here, allowed - found.get(here, set()))


def test_every_folder_says_what_it_holds():
    folders = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(folders) > 10
    for folder in folders:
        text = (folder / "README.md").read_text()
        assert 5 <= len(text.splitlines()) <= 20, folder
        assert "ay import" in text, folder
        for module in folder.glob("*.py"):
            if module.name != "__init__.py":
                assert f"`{module.name}`" in text, (
                    f"{folder.name}/README.md does not name {module.name}"
                )
