"""A Megatron checkpoint as a Hugging Face folder, shard by shard, each written by one rank."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_ext.arch import Arch
from megatron_ext.checkpoint import Checkpoint
from megatron_ext.convert.config import config_of, num_rows
from megatron_ext.convert.families import FAMILIES, Family
from megatron_ext.convert.hf_folder import CONFIG, INDEX, WEIGHTS, read_files
from megatron_ext.convert.importer import EMBEDDING
from megatron_ext.convert.pieces import Piece, pieces
from megatron_ext.errors import CHECKPOINT, USAGE, UserError, warn
from megatron_ext.pruning.trim import check_tensors, read_piece
from megatron_ext.slices import SliceReader
from megatron_ext.together import on_all_ranks, on_first_rank


def export_folder(
    source: Checkpoint,
    folder: str,
    *,
    model_type: str | None = None,
    max_shard_size: int = 5 * 10**9,
    tokenizer: str | None = None,
) -> None:
    """Write ``source`` as a folder that transformers loads. Collective.

    A rank holds one file of weights in memory at a time.

    Args:
        source: the checkpoint; its sizes are what config.json says.
        folder: must not be there yet; appears at the end, complete.
        model_type: family of models; None for the one that the checkpoint was imported from.
        max_shard_size: bytes of one file, unless a single weight is larger.
        tokenizer: folder of tokenizer files; None for those beside the checkpoint.

    Raises:
        UserError: on every rank; the family has no such models, the folder is there, a file is
            damaged, nothing can be written. Nothing is left behind then.
    """
    family = family_for(source, model_type)
    reader = on_all_ranks(lambda: SliceReader(source.folder))
    check_tensors(reader, source.arch)
    origin = source.args.get("hf_config") or {}
    dtype = reader.shapes[EMBEDDING][1]
    try:
        config = config_of(source.arch, family, origin, str(dtype).removeprefix("torch."))
        work = list(pieces(source.arch, family))
    except ValueError as error:
        raise UserError(
            f"{source.folder} cannot be exported as {family.model_type}: {error}.", CHECKPOINT
        ) from None
    rows = num_rows(source.arch, origin)
    shards = into_shards(work, source.arch, max_shard_size // dtype.itemsize)
    names = shard_names(len(shards))
    index = index_of(shards, names, size_of(work, source.arch, rows) * dtype.itemsize)
    files = tokenizer_files(source, tokenizer)
    final = Path(folder)
    aside = final.with_name(f".{final.name}.tmp")
    on_first_rank(lambda: _make_empty(aside, final))
    try:
        on_all_ranks(lambda: _write_shards(aside, reader, source.arch, shards, names, rows))
        on_first_rank(lambda: _finish(aside, final, config, index, files))
    except (OSError, SafetensorError) as error:
        raise UserError(f"--hf {folder} cannot be written: {error}.") from error
    finally:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)


def family_for(source: Checkpoint, model_type: str | None) -> Family:
    """Return the family to export to."""
    chosen = model_type or (source.args.get("hf_config") or {}).get("model_type")
    if chosen is None:
        raise UserError(
            f"{source.folder} does not come from a Hugging Face model: give --model-type "
            f"({', '.join(FAMILIES)}).",
            USAGE,
        )
    return FAMILIES[chosen]


def into_shards(work: Sequence[Piece], arch: Arch, max_numel: int) -> list[list[Piece]]:
    """Fill files in the order of ``work``: a piece that no longer fits begins the next."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in work:
        if not shards or piece.numel(arch) > room:
            shards.append([])
            room = max_numel
        shards[-1].append(piece)
        room -= piece.numel(arch)
    return shards


def shard_names(count: int) -> list[str]:
    """Return the names of the files of weights, as transformers looks for them."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def size_of(work: Sequence[Piece], arch: Arch, num_rows: int) -> int:
    """Return the elements of all tensors in the folder."""
    shapes = (size for piece in work for size in piece.shapes(arch, num_rows).values())
    return sum(math.prod(size) for size in shapes)


def index_of(
    shards: Sequence[Sequence[Piece]], names: Sequence[str], total_size: int
) -> dict[str, Any]:
    """Return the index of the files: which tensor is in which, and the bytes of all."""
    return {
        "metadata": {"total_size": total_size},
        "weight_map": {
            tensor: name
            for shard, name in zip(shards, names, strict=True)
            for piece in shard
            for tensor in piece.names
        },
    }


def tokenizer_files(source: Checkpoint, folder: str | None) -> dict[str, bytes]:
    """Return what to put beside the weights: the tokenizer and its like."""
    place = Path(folder) if folder else source.folder / "tokenizer"
    files = read_files(place)
    if folder and not files:
        raise UserError(f"--tokenizer-model {folder}: no tokenizer files there.", USAGE)
    if not files:
        warn(f"{source.folder} has no tokenizer beside it: give --tokenizer-model DIR to add one.")
    return files


def _write_shards(
    aside: Path,
    reader: SliceReader,
    arch: Arch,
    shards: Sequence[Sequence[Piece]],
    names: Sequence[str],
    num_rows: int,
) -> None:
    """Write every world_size-th file; the same on every rank otherwise."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for shard, name in list(zip(shards, names, strict=True))[rank::world_size]:
        tensors = {}
        for piece in shard:
            parts = piece.split(read_piece(reader, piece), arch, num_rows)
            # Parts are often views of one tensor, which safetensors does not write twice.
            tensors |= {n: part.clone() for n, part in zip(piece.names, parts, strict=True)}
        save_file(
            {n: x.contiguous() for n, x in tensors.items()}, aside / name, metadata={"format": "pt"}
        )


def _make_empty(aside: Path, final: Path) -> None:
    if final.exists():
        raise UserError(f"--hf {final} is there already: remove it or take another.", USAGE)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--hf {final} cannot be written: {error}.") from error


def _finish(
    aside: Path,
    final: Path,
    config: Mapping[str, Any],
    index: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    for name, content in files.items():
        (aside / name).write_bytes(content)
    if len(set(index["weight_map"].values())) > 1:
        (aside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    aside.rename(final)
