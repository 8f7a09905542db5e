"""Index of a stored teacher (``stored``), compared with the run that reads it. Pure."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.runtime.errors import DATA, UserError
from megatron_ext.runtime.texts import parse_json

INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class StoreIndex:
    """Contents of a store."""

    top_k: int
    temperature: float
    """Temperature of the teacher's distributions."""
    seq_length: int
    vocab_size: int
    tokenizer_sha256: str | None
    num_samples: int
    """Samples of the training data set, from its first on."""
    samples_per_file: int
    teacher: str
    """Folder of the teacher's checkpoint; for people."""

    @property
    def firsts(self) -> range:
        """The first sample of each file."""
        return range(0, self.num_samples, self.samples_per_file)


def read_index(folder: str | Path) -> StoreIndex:
    """Return the index of a store.

    Raises:
        UserError: there is none.
    """
    path = Path(folder) / INDEX
    try:
        return StoreIndex(**parse_json(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no index of a stored teacher: {error}.", DATA) from error


def check_store(
    index: StoreIndex,
    *,
    top_k: int | None,
    temperature: float,
    vocab_size: int,
    seq_length: int,
    tokenizer_sha256: str | None,
) -> None:
    """Compare a store with the run that reads it.

    Raises:
        UserError: naming what differs.
    """
    if top_k is not None and top_k > index.top_k:
        raise UserError(
            f"--kd-top-k {top_k}: the stored teacher has the {index.top_k} likeliest tokens.", DATA
        )
    run = {
        "temperature": temperature,
        "vocab_size": vocab_size,
        "seq_length": seq_length,
        "tokenizer_sha256": tokenizer_sha256,
    }
    for name, value in run.items():
        stored = getattr(index, name)
        if value != stored:
            raise UserError(
                f"the stored teacher has {name} {stored}, this run {value}: store again, or run "
                "with the same.",
                DATA,
            )
