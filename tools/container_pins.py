"""What an image has to install, without touching what it came with. Used by the Dockerfile.

    python tools/container_pins.py pyproject.toml requirements.txt constraints.txt [EXTRA]

NVIDIA's images hold torch, Triton, Transformer Engine and others that were built for each other.
requirements.txt gets the project's pins but for those; constraints.txt holds those at the versions
that are installed, so that pip fails rather than replace one.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

# Left as the image has them, where it has them.
KEPT = re.compile(
    r"(torch|torchvision|torchaudio|torchao|pytorch-triton|triton|numpy|apex|flash-attn|flash-attn-3"
    r"|transformer-engine.*|nvidia-.*|cuda-.*|cupy.*|numba)"
)


def normalised(name: str) -> str:
    """Return a distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(project: str, extra: str | None, installed: Iterable[str]) -> list[str]:
    """Return the pins of a pyproject.toml, with those of ``extra``, but for what is kept.

    Args:
        project: the text of the file.
        extra: one of its optional dependencies, or None.
        installed: names of distributions; of them, those that match KEPT are left out.
    """
    table = tomllib.loads(project)["project"]
    pins = table["dependencies"] + (table["optional-dependencies"][extra] if extra else [])
    there = {normalised(name) for name in installed}
    names = [normalised(re.match(r"[\w.-]+", pin)[0]) for pin in pins]
    return [
        pin
        for pin, name in zip(pins, names, strict=True)
        if not (KEPT.fullmatch(name) and name in there)
    ]


def constraints(installed: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each of the (name, version) that has to stay."""
    return sorted(f"{n}=={v}" for n, v in installed if KEPT.fullmatch(normalised(n)))


def main(project: str, to_install: str, to_keep: str, extra: str | None = None) -> None:
    """Write both files."""
    installed = {d.name: d.version for d in metadata.distributions() if d.name}
    pins = requirements(Path(project).read_text(), extra, installed)
    Path(to_install).write_text("".join(f"{line}\n" for line in pins))
    kept = constraints(installed.items())
    Path(to_keep).write_text("".join(f"{line}\n" for line in kept))


if __name__ == "__main__":
    main(*sys.argv[1:])
