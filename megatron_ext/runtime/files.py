"""Files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from megatron_ext.runtime.errors import UserError


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside ``path``; what was written there takes its name if nothing went wrong.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.umask(umask := os.umask(0))
        aside.chmod(0o666 & ~umask)  # safetensors writes what nobody else may read
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
    finally:
        with suppress(OSError):
            aside.unlink()
