"""The part of a wheel that pyproject.toml cannot name: programs of the root and of tools/.

They go to megatron_ext/programs, with the paths that they have here: ``minitron`` finds them there,
and they find each other as in a checkout.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from megatron_ext.__main__ import PROGRAMS  # noqa: E402


class BuildWithPrograms(build_py):
    """Copy the programs into what is built; an editable installation has them in the checkout."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        for program, _ in PROGRAMS.values():
            target = Path(self.build_lib, "megatron_ext", "programs", program)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / program), str(target))


setup(cmdclass={"build_py": BuildWithPrograms})
