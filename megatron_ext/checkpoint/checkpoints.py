"""Megatron checkpoint folders, read: found, checked and loaded under any layout.

    <root>/latest_checkpointed_iteration.txt     "100" or "release"
    <root>/iter_0000100/  or  <root>/release/    one torch_dist checkpoint of megatron-core
        .metadata metadata.json __*.distcp     (up to megatron-core 0.18 common.pt too)
        integrity.json         SHA-256 of the files above, in Megatron-LM's schema
        megatron_args.sh       the flags with which Megatron-LM builds this model, if it can
        tokenizer/             of a model that was imported, and of what came of it

``checkpoint.writer`` writes them. Loading compares every tensor's name and shape first, and
unpickles plain data only. Checkpoints of Megatron-LM, Megatron Bridge and NeMo are read too.
"""

import hashlib
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint import foreign_args, safe_load
from megatron_ext.checkpoint.folder import (  # noqa: F401 (checkpoints.find stands beside read)
    INTEGRITY,
    RELEASE,
    TOKENIZER,
    TRACKER,
    Checkpoint,
    find,
    iteration_name,
    iterations,
    locate,
)
from megatron_ext.checkpoint.slices import FIRST_WEIGHT, LAYER_NUMBER, SliceReader
from megatron_ext.cli.size_flags import args_of_sizes
from megatron_ext.runtime.collective_errors import gather, on_all_ranks
from megatron_ext.runtime.errors import CHECKPOINT, UserError, warn
from megatron_ext.runtime.texts import parse_json

MAX_ROWS = 10
# Tensors of a checkpoint that are not weights: a run that does not ask for them may leave them.
NOT_WEIGHTS = (
    "optimizer.",
    "chained_",
    "rng_state",
    "rerun_state",
    "common_state",
    "distillation.",
)

safe_load.install()


def read(root: str, step: int | None = None, sizes: Mapping[str, Any] | None = None) -> Checkpoint:
    """Return the checkpoint under ``root``, its weights still on disk. No collectives.

    Only plain data is unpickled (``safe_load``).

    Args:
        root: a folder as of ``folder.find``.
        step: its iteration; None for the latest.
        sizes: typed sizes (``cli.size_flags``), which hold where nothing beside it says them.

    Raises:
        UserError: there is none, it is damaged, or nothing says the model's sizes.
    """
    folder = locate(root, step)
    try:
        common = safe_load.load_common(folder)
    except Exception as error:
        raise _unread_common(folder, error) from error
    if not isinstance(common, dict):
        raise UserError(
            f"{safe_load.place_of_common(folder)}: holds no table of settings.", CHECKPOINT
        )
    if not isinstance(common.get("args"), Namespace):
        common = {**common, "args": Namespace(**_args_beside(folder, sizes or {}))}
    return Checkpoint(folder, common)


def _unread_common(folder: Path, error: Exception) -> UserError:
    """Return what to say of ``error``, met in reading the part that is not sharded."""
    if isinstance(error, OSError) and error.filename:
        is_absent = isinstance(error, FileNotFoundError)
        reason = "is missing" if is_absent else f"cannot be read: {error.strerror}"
        return UserError(f"{error.filename} {reason}.", CHECKPOINT)
    place = safe_load.place_of_common(folder)
    if place.name != safe_load.COMMON:
        SliceReader(folder)  # it names .metadata, if that is what cannot be read
    # torch's first lines advise to load it without protection.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or repr(error)
    reason = text.splitlines()[0].rstrip(".")
    return UserError(f"{place} cannot be read: {reason}.", CHECKPOINT)


def _args_beside(folder: Path, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the args of a checkpoint that has none, from other files or typed sizes."""
    size, dtype = SliceReader(folder).shapes.get(FIRST_WEIGHT, ((0,), torch.float32))
    try:
        args = foreign_args.read_args(folder, size[0])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: {error}.", CHECKPOINT) from error
    if args is None and sizes:
        args = args_of_sizes(sizes, size[0])
    if args is None:
        raise UserError(
            f"{folder}: no saved args and no {' or '.join(foreign_args.FILES)}: the model's sizes "
            "are not known. Type them: --num-layers and the others.",
            CHECKPOINT,
        )
    return {**args, "params_dtype": dtype}


def verify_integrity(folder: Path) -> None:
    """Compare the files of ``folder`` with integrity.json. Collective: each rank hashes its share.

    Raises:
        UserError: on every rank, naming the first file that differs or is missing.
    """
    if not (folder / INTEGRITY).exists():
        warn(f"{folder}: no {INTEGRITY}; damage would go unnoticed.")
        return
    try:
        expected = parse_json((folder / INTEGRITY).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / INTEGRITY} cannot be read: {reason}.", CHECKPOINT) from error
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problems = []
    for name in sorted(expected)[rank::world_size]:
        path = folder / name
        try:
            if sha256(path) != expected[name]:
                problems.append(f"{path} is damaged: its SHA-256 differs from {INTEGRITY}")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    problems = [problem for part in gather(problems) for problem in part]
    if problems:
        older = [path.name for path in iterations(str(folder.parent)) if path.name < folder.name]
        way_out = f"; --ckpt-step takes an older one, {older[0]}" if older else ""
        raise UserError(f"{problems[0]}{way_out}.", CHECKPOINT)


def load(
    folder: Path, state: ShardedStateDict, *, padded_vocab_size: int | None = None
) -> dict[str, Any]:
    """Read ``state`` (sharded tensors of any layout) in place. Collective.

    Args:
        folder: a checkpoint's.
        state: what is to be read.
        padded_vocab_size: rows of the vocabulary's tables in the checkpoint, if ``state`` may pad
            them otherwise: rows that are only here come out as zeros, those only there stay there.

    Returns:
        The state dict with everything that ``state`` asked for and the common part.

    Raises:
        UserError: on every rank, with a table, if tensors of the checkpoint and of ``state`` are
            not the same, name by name and shape by shape. Nothing is loaded then.
    """
    reader = on_all_ranks(lambda: SliceReader(folder))
    if not _check_tensors(reader, state, padded_vocab_size):
        raise UserError(
            f"{folder} does not stack its layers, or puts {reader.prefix or 'nothing'} in front of "
            "its names: only its weights can be taken, with --finetune.",
            CHECKPOINT,
        )
    return _load(reader, state)


def _load(reader: SliceReader, state: ShardedStateDict) -> dict[str, Any]:
    folder = reader.folder
    absent = _take_out_absent_extra_states(reader, state)
    try:
        loaded = dist_checkpointing.load(state, str(folder))
        on_all_ranks(lambda: _check_extra_states(loaded))
    except (Exception, CheckpointException) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise UserError(f"{folder} cannot be read: {reason}", CHECKPOINT) from error
    for chunk, key in absent:
        loaded[chunk][key] = None
    return loaded


def _extra_states(state: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (chunk, key) of the ``_extra_state`` objects of the models in ``state``."""
    chunks = [name for name in state if name.startswith("model")]
    return [(c, key) for c in chunks for key in state[c] if "_extra_state" in key]


def _take_out_absent_extra_states(
    reader: SliceReader, state: ShardedStateDict
) -> list[tuple[str, str]]:
    """Remove the ``_extra_state`` objects that a checkpoint lacks, and return where they were.

    Transformer Engine's norms have some that local layers have not. They hold what FP8 remembers;
    None stands for nothing.
    """
    found = _extra_states(state)
    absent = [(c, key) for c, key in found if state[c][key].unique_key not in reader.objects]
    for chunk, key in absent:
        del state[chunk][key]
    return absent


def _check_extra_states(loaded: dict[str, Any]) -> None:
    for chunk, key in _extra_states(loaded):
        safe_load.check_extra_state(loaded[chunk][key])


def load_weights(
    folder: Path, state: ShardedStateDict, *, padded_vocab_size: int | None = None
) -> dict[str, Any] | None:
    """Read the weights ``state``, whatever names they have (``slices``). Collective.

    Args:
        folder: a checkpoint's.
        state: weights that share memory with a model's parameters.
        padded_vocab_size: as for ``load``.

    Returns:
        As ``load``; None where names are not megatron-core's, and the parameters are filled.

    Raises:
        UserError: as ``load``.
    """
    reader = on_all_ranks(lambda: SliceReader(folder))
    if _check_tensors(reader, state, padded_vocab_size):
        return _load(reader, state)
    on_all_ranks(lambda: _fill(reader, state))
    return None


@torch.no_grad()
def _fill(reader: SliceReader, state: ShardedStateDict) -> None:
    for shard in sharded_tensors(state):
        part = reader.read_shard(shard)
        shard.data[len(part) :] = 0  # rows of the vocabulary's padding that are only here
        shard.data[: len(part)].copy_(part)


def sharded_tensors(state: ShardedStateDict) -> Iterator[ShardedTensor]:
    """Yield the tensors of ``state`` as they stand on disk: a gated MLP's two halves are two."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors({"parts": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def _check_tensors(
    reader: SliceReader, state: ShardedStateDict, padded_vocab_size: int | None
) -> bool:
    """Compare names and sizes; return whether the names on disk are just those of ``state``.

    A GPTModel's layers are stacked, but may have a name each; a HybridModel's always have.
    """
    wanted = {}
    for tensor in sharded_tensors(state):
        rows, *width = tensor.global_shape
        # megatron-core marks what is padded to the vocabulary so.
        is_padded = padded_vocab_size is not None and tensor.allow_shape_mismatch
        wanted[tensor.key] = (padded_vocab_size if is_padded else rows, *width)
    for others in gather(wanted):
        wanted |= others
    folder, stacked = reader.folder, not any(map(LAYER_NUMBER.match, wanted))
    found = reader.global_shapes if stacked else {key: x for key, (x, _) in reader.shapes.items()}
    keys = [*wanted, *(k for k in found if k not in wanted and not k.startswith(NOT_WEIGHTS))]
    differing = [key for key in keys if found.get(key) != wanted.get(key)]
    if not differing:
        return not reader.prefix and wanted.keys() <= reader.shapes.keys()
    rows = [("tensor", "checkpoint", "this model")]
    rows += [(key, _shape(found.get(key)), _shape(wanted.get(key))) for key in differing[:MAX_ROWS]]
    if len(differing) > MAX_ROWS:
        rows += [(f"... and {len(differing) - MAX_ROWS} more", "", "")]
    hint = ""
    if any(key.startswith("distillation.") for key in differing):
        hint = (
            " Hidden-state losses (--kd-hidden-states) cannot change in a run: begin a new one, "
            "with --load and --finetune and another --save."
        )
    elif all(key.startswith("optimizer.") for key in differing):
        hint = (
            " Only optimizer state differs: give the flags that it was saved with (precision, "
            "--use-distributed-optimizer), or leave it with --no-load-optim or --finetune."
        )
    table = "\n".join(f"  {name:64} {theirs:>16} {ours:>16}" for name, theirs, ours in rows)
    raise UserError(f"{folder} does not fit this model.{hint}\n{table}", CHECKPOINT)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shape(shape: Iterable[int] | None) -> str:
    return "-" if shape is None else str(list(shape))
