"""A Megatron checkpoint as a Hugging Face folder, shard by shard, each written by one rank."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.slices import SliceReader, layer_key
from megatron_ext.convert.config import config_of, num_rows
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.family import Family
from megatron_ext.convert.fit import holders, serving_note
from megatron_ext.convert.hf_files import CONFIG, tokenizer_files
from megatron_ext.convert.hf_folder import INDEX, WEIGHTS, header_of, write_weights
from megatron_ext.convert.importer import EMBEDDING
from megatron_ext.convert.pieces import Piece, pieces
from megatron_ext.convert.special_tokens import GENERATION, special_ids
from megatron_ext.pruning.trim import check_tensors, read_piece
from megatron_ext.runtime.collective_errors import on_all_ranks, on_first_rank
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError, warn


def export_folder(
    source: Checkpoint,
    folder: str,
    *,
    model_type: str | None = None,
    max_shard_size: int = 5 * 10**9,
    tokenizer: str | None = None,
) -> None:
    """Write ``source`` as a folder that transformers loads. Collective.

    A rank holds two pieces in memory at most: a weight of a layer, or an embedding.

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
    if source.arch.by_layer:
        names = ", ".join(dict(source.arch.by_layer))
        raise UserError(
            f"{source.folder} cannot be exported: its layers differ in {names}, and no Hugging "
            "Face family here says so; keep it as a Megatron checkpoint.",
            CHECKPOINT,
        )
    if source.arch.is_hybrid and not family.has_pattern:
        way_out = "prune whole layers (--target-num-layers) or keep it as a Megatron checkpoint"
        if source.arch.has_whole_layers:
            way_out = "make a GPTModel of its whole layers first, convert layers --to gpt"
        raise UserError(
            f"{source.folder} cannot be exported: no Hugging Face family here holds a model of "
            f"sub-layers ({source.arch.pattern}); {way_out}.",
            CHECKPOINT,
        )
    reader = on_all_ranks(lambda: SliceReader(source.folder))
    check_tensors(reader, source.arch)
    origin = source.hf_config
    dtype = str(reader.shapes[EMBEDDING][1]).removeprefix("torch.")
    rows = num_rows(source.arch, origin)
    try:
        config = config_of(source.arch, family, origin, dtype)
        work = list(pieces(source.arch, family))
        shards, headers = planned_shards(work, reader, source.arch, rows, max_shard_size)
    except ValueError as error:
        others = [name for name in holders(source.arch) if name != family.model_type]
        hint = f"; --model-type {others[0]} has such models" if others else ""
        raise UserError(
            f"{source.folder} cannot be exported as {family.model_type}: {error}{hint}.",
            CHECKPOINT,
        ) from None
    if note := serving_note(source.arch, family):
        warn(f"--hf {folder}: {note}")
    names = shard_names(len(shards))
    index = index_of(headers, names)
    weights = list(zip(names, headers, shards, strict=True))
    files = tokenizer_files(source, tokenizer)
    config |= (ids := special_ids(origin, files, rows))
    said = {**ids, "transformers_version": config["transformers_version"]}
    files.setdefault(GENERATION, json.dumps(said, indent=2, sort_keys=True).encode() + b"\n")
    if ids["eos_token_id"] is None and not source.arch.is_bert:
        warn(f"--hf {folder}: no end-of-text token is known: generate() will not stop at one.")
    final = Path(folder)
    aside = final.with_name(f".{final.name}.tmp")
    on_first_rank(lambda: _make_empty(aside, final))
    try:
        on_all_ranks(lambda: _write_shards(aside, reader, source.arch, weights, rows))
        on_first_rank(lambda: _finish(aside, final, config, index, files))
    except OSError as error:
        raise UserError(f"--hf {folder} cannot be written: {error}.") from error
    finally:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)


def family_for(source: Checkpoint, model_type: str | None) -> Family:
    """Return the family to export to."""
    chosen = model_type or source.hf_config.get("model_type")
    if chosen is None:
        raise UserError(
            f"{source.folder} does not come from a Hugging Face model: give --model-type "
            f"({', '.join(FAMILIES)}).",
            USAGE,
        )
    return FAMILIES[chosen]


def planned_shards(
    work: Sequence[Piece], reader: SliceReader, arch: Arch, num_rows: int, max_size: int
) -> tuple[list[list[Piece]], list[dict[str, dict[str, Any]]]]:
    """Return the pieces of each file, and its header, of which ``max_size`` bytes are tensors.

    Raises:
        ValueError: naming a tensor whose dtype is not written here.
    """

    def dtype_of(piece: Piece) -> torch.dtype:
        key = piece.weight.key
        return reader.shapes[key if key in reader.shapes else layer_key(key, piece.number)][1]

    shards = into_shards(work, lambda x: x.numel(arch) * dtype_of(x).itemsize, max_size)
    for shard in shards:
        shard.sort(key=lambda piece: -dtype_of(piece).itemsize)  # header_of says why
    headers = [
        header_of(
            (name, size, dtype_of(piece))
            for piece in shard
            for name, size in piece.shapes(arch, num_rows).items()
        )
        for shard in shards
    ]
    return shards, headers


def into_shards(
    work: Sequence[Piece], size: Callable[[Piece], int], max_size: int
) -> list[list[Piece]]:
    """Fill files in the order of ``work``: a piece that no longer fits begins the next."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in work:
        if not shards or size(piece) > room:
            shards.append([])
            room = max_size
        shards[-1].append(piece)
        room -= size(piece)
    return shards


def shard_names(count: int) -> list[str]:
    """Return the names of the files of weights, as transformers looks for them."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index_of(headers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return the index of the files: which tensor is in which, and the bytes of all."""
    ends = [entry["data_offsets"] for header in headers for entry in header.values()]
    return {
        "metadata": {"total_size": sum(end - start for start, end in ends)},
        "weight_map": {
            tensor: name for header, name in zip(headers, names, strict=True) for tensor in header
        },
    }


def _write_shards(
    aside: Path,
    reader: SliceReader,
    arch: Arch,
    weights: Sequence[tuple[str, Mapping[str, Any], Sequence[Piece]]],
    num_rows: int,
) -> None:
    """Write every world_size-th file; the same on every rank otherwise."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, header, shard in weights[rank::world_size]:
        parts = (
            part
            for piece in shard
            for part in piece.split(_read(reader, piece, arch), arch, num_rows)
        )
        write_weights(aside / name, header, parts)


def _read(reader: SliceReader, piece: Piece, arch: Arch) -> Tensor:
    parts = [read_piece(reader, part, arch) for part in piece.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(content)
    if len(set(index["weight_map"].values())) > 1:
        (aside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    aside.rename(final)
