"""Packages that only some of what this project does needs: extras of pyproject.toml."""

import importlib
from types import ModuleType

from megatron_ext.runtime.errors import USAGE, UserError


def need(module: str, extra: str, wanted_by: str) -> ModuleType:
    """Import and return ``module``.

    Args:
        module: a module of a package that may not be installed.
        extra: the extra of pyproject.toml that has the package.
        wanted_by: the flag or the task that cannot do without it.

    Raises:
        UserError: the package, or one that it needs itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise UserError(
            f"{wanted_by} needs {package}, of the extra {extra}: pip install "
            f"'megatron-minitron[{extra}]', or pip install -e '.[{extra}]' in a checkout.",
            USAGE,
        ) from error
