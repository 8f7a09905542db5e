"""The file of scores: written, read and checked (``scores`` says what is in it)."""

import json
import os
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import SIZES
from megatron_ext.pruning.scores import FORMAT, Scores, arch_from_json, lengths
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from megatron_ext.runtime.files import written_aside
from megatron_ext.runtime.texts import parse_json


def save_scores(path: str | os.PathLike, scores: Scores) -> None:
    """Write ``scores`` to ``path``, aside first and then renamed. Call it on one rank."""
    vectors = {
        name: vector.detach().to("cpu", torch.float32).contiguous()
        for name, vector in scores.vectors.items()
    }
    metadata = {
        "format": FORMAT,
        "aggregation": scores.aggregation,
        "samples": str(scores.samples),
        "seq_length": str(scores.seq_length),
        "depth": scores.depth,
        "removal_order": json.dumps(scores.removal_order),
        "source": json.dumps(asdict(scores.source)),
    }
    with written_aside(path) as aside:
        save_file(vectors, aside, metadata)


def load_scores(path: str | os.PathLike) -> Scores:
    """Read the file of ``save_scores``. Every rank may call it; no collectives.

    Raises:
        UserError: the file cannot be read or is of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            return Scores(
                vectors={name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                source=arch_from_json(parse_json(metadata["source"])),
                aggregation=metadata["aggregation"],
                samples=int(metadata["samples"]),
                seq_length=int(metadata["seq_length"]),
                depth=metadata.get("depth", "block"),
                removal_order=tuple(
                    tuple(map(int, layers))
                    for layers in parse_json(metadata.get("removal_order", "[]"))
                ),
            )
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--scores {path} cannot be read as scores ({error}); remove it to score again.",
            CHECKPOINT,
        ) from error


def check_scores(scores: Scores, arch: Arch) -> None:
    """Raise ``UserError`` unless ``scores`` are complete, finite and of a model like ``arch``."""
    for size in (*SIZES, "kv_channels", "hybrid_layer_pattern", "by_layer"):
        theirs, ours = getattr(scores.source, size), getattr(arch, size)
        if theirs != ours:
            raise _refused(f"were made for another model: {size} {theirs}, this one has {ours}")
    for name, length in lengths(arch).items():
        vector = scores.vectors.get(name)
        if vector is None:
            raise _refused(f"have no vector {name!r}")
        if vector.dtype != torch.float32 or vector.shape != (length,):
            found = f"{vector.dtype} {list(vector.shape)}"
            raise _refused(f"have {found} as vector {name!r}, expected torch.float32 [{length}]")
        if not vector.isfinite().all():
            raise _refused(f"have NaN or infinite values in vector {name!r}")
    removed = [layer for layers in scores.removal_order for layer in layers]
    if len(set(removed)) < len(removed) or not set(removed) < set(range(arch.num_layers)):
        raise _refused(f"remove layers {removed} of {arch.num_layers}")


def _refused(problem: str) -> UserError:
    return UserError(f"the scores {problem}; remove the --scores file to score again.", CHECKPOINT)
