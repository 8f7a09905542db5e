"""Scores: one float per prunable unit, and the file that holds them.

A unit's score says how much it matters: higher means keep. Vectors are float32, over the whole
model, in global numbering from 0:

    hidden        [hidden_size]          channels of the residual stream
    ffn.{layer}   [ffn_hidden_size]      neurons of one layer
    heads.{layer} [num_attention_heads]  query heads of one layer
    layers        [num_layers]           whole layers
    experts.{layer}           [num_experts]            in a mixture of experts, instead of ffn:
    moe_ffn.{layer}.{expert}  [moe_ffn_hidden_size]    neurons of one expert
    shared_ffn.{layer}        [moe_shared_expert_intermediate_size]  of the shared experts
    layer_blocks.{n} [num_layers - n + 1]  n layers from each on, where blocks were scored

The file is safetensors; its metadata tell how the scores were made and for which sizes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.errors import CHECKPOINT, UserError

FORMAT = "minitron-scores-1"

# The sizes that must agree between scores and the model they are used for.
SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one model and how they were made."""

    vectors: Mapping[str, Tensor]
    """Name to float32 vector, as in the module's table."""
    source: Arch
    """The model that was scored."""
    aggregation: str
    """How token scores became one score, e.g. ``batch=l2,seq=mean``."""
    samples: int
    """Calibration samples."""
    seq_length: int
    """Tokens per sample."""
    depth: str = "block"
    """How layers were scored, see ``depth_method``. (Single layers beside blocks of several: by
    block importance.)"""
    removal_order: tuple[tuple[int, ...], ...] = ()
    """Layers to remove together, the first to go first; empty: one by one, by their scores."""


def depth_method(importance: str, block: int, *, rescore: bool) -> str:
    """Return how layers are scored in words: ``kl, blocks of 2, rescored``."""
    return importance + f", blocks of {block}" * (block > 1) + ", rescored" * rescore


def lengths(arch: Arch) -> dict[str, int]:
    """Return the name and length of every score vector of ``arch``."""
    vectors = {"hidden": arch.hidden_size, "layers": arch.num_layers}
    for layer in range(arch.num_layers):
        vectors[f"heads.{layer}"] = arch.num_attention_heads
        if arch.num_experts is None:
            vectors[f"ffn.{layer}"] = arch.ffn_hidden_size
            continue
        vectors[f"experts.{layer}"] = arch.num_experts
        for expert in range(arch.num_experts):
            vectors[f"moe_ffn.{layer}.{expert}"] = arch.moe_ffn_hidden_size
        if arch.moe_shared_expert_intermediate_size is not None:
            vectors[f"shared_ffn.{layer}"] = arch.moe_shared_expert_intermediate_size
    return vectors


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
                source=arch_from_json(json.loads(metadata["source"])),
                aggregation=metadata["aggregation"],
                samples=int(metadata["samples"]),
                seq_length=int(metadata["seq_length"]),
                depth=metadata.get("depth", "block"),
                removal_order=tuple(
                    tuple(map(int, layers))
                    for layers in json.loads(metadata.get("removal_order", "[]"))
                ),
            )
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--scores {path} cannot be read as scores ({error}); remove it to score again.",
            CHECKPOINT,
        ) from error


def check_scores(scores: Scores, arch: Arch) -> None:
    """Raise ``UserError`` unless ``scores`` are complete, finite and of a model like ``arch``."""
    for size in SIZES:
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


def arch_from_json(values: Any) -> Arch:
    """Return the ``Arch`` whose ``asdict`` was written as JSON.

    Raises ``ValueError`` or ``TypeError`` on an unknown name or a value of another type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"sizes of a model are a JSON object, not {type(values).__name__}")
    types = {field.name: field.type for field in fields(Arch)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"unknown size {name!r}")
        expected = (int, float) if types[name] is float else types[name]
        if not isinstance(value, expected):
            raise TypeError(f"{name} is {value!r}, expected a value of {types[name]}")
    return Arch(**values)


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
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
    finally:
        with suppress(OSError):
            aside.unlink()
