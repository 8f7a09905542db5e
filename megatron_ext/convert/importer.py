"""A Hugging Face folder as a Megatron checkpoint, read tensor by tensor, a share on each rank."""

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor

from megatron_ext.arch import Arch, weights
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.finite import check_finite
from megatron_ext.checkpoint.saved_args import complete
from megatron_ext.checkpoint.writer import Readers
from megatron_ext.cli.size_flags import megatron_command_line
from megatron_ext.convert.config import (
    arch_of,
    broken_heads,
    family_of,
    with_positions,
    without_biases,
)
from megatron_ext.convert.family import Family
from megatron_ext.convert.hf_files import CONFIG, carried, has_tokenizer, read_files
from megatron_ext.convert.hf_folder import ADAPTER, HfFolder
from megatron_ext.convert.pieces import Piece, pieces
from megatron_ext.convert.special_tokens import tokens_from
from megatron_ext.data.datasets import build_tokenizer
from megatron_ext.pruning import trim
from megatron_ext.runtime.collective_errors import on_all_ranks, on_first_rank
from megatron_ext.runtime.errors import CHECKPOINT, UserError, warn

LM_HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def import_folder(
    folder: str,
    save: str,
    *,
    make_vocab_size_divisible_by: int = 128,
    max_position_embeddings: int | None = None,
) -> Arch:
    """Write the model of ``folder`` as ``save``/release and return its sizes. Collective.

    A rank holds one piece in memory at a time: a weight of a layer, or an embedding.

    Args:
        folder: with config.json, safetensors and, as a rule, a tokenizer.
        save: folder above the checkpoint.
        make_vocab_size_divisible_by: the vocabulary is padded with zeros to a multiple of this.
        max_position_embeddings: in place of the config's; None keeps that.

    Raises:
        UserError: on every rank; a model that is not computed here, tensors that do not fit its
            config, files that are missing or damaged. Nothing is written then.
    """
    source = on_all_ranks(lambda: HfFolder(folder))
    config = with_positions(source.config, max_position_embeddings)
    vocab_size = on_first_rank(lambda: tokenizer_size(source))
    try:
        family = family_of(config)
        arch = arch_of(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    except ValueError as error:
        raise UserError(f"{source.folder / CONFIG}: {error}.", CHECKPOINT) from None
    if problem := broken_heads(arch, family):
        warn(f"{source.folder}: {problem} from 5.0 on: an export needs another --model-type.")
    if absent := without_biases(config, family):
        off = ", ".join(key for key in family.biases if not config.get(key))
        warn(f"{source.folder}: {off} is off: {len(absent)} kinds of biases are zeros here.")
    files = on_all_ranks(lambda: read_files(source.folder))
    beyond = 0
    if vocab_size is not None:
        beyond = max(vocab_size - arch.vocab_size, 0)
        arch = replace(arch, vocab_size=min(vocab_size, arch.vocab_size))
    if beyond:
        names = ", ".join(tokens_from(files, arch.vocab_size)[:8]) or f"{beyond} tokens"
        warn(
            f"{source.folder}: the embedding has {arch.vocab_size} rows, the tokenizer {beyond} "
            f"tokens more, without a row: {names}. Data that holds them will be refused."
        )
    tokenizer = Path(save).resolve() / checkpoints.RELEASE / checkpoints.TOKENIZER
    if arch.num_layers * (arch.num_experts or 1) > len(source.shapes):
        counts = f"{arch.num_layers} layers"
        _refuse(source, f"{CONFIG} calls for {counts}, there are {len(source.shapes)} tensors")
    work = list(pieces(arch, family))
    on_all_ranks(lambda: check_tensors(source, arch, family, work))
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share, readers = planned_share(source, arch, family, work, rank, world_size)
    writer.save(
        save,
        checkpoints.RELEASE,
        {
            "model": share,
            "args": complete(
                arch,
                {
                    **args_of(source, config, family, None if vocab_size is None else tokenizer),
                    "tokens_without_row": beyond,
                },
            ),
            "checkpoint_version": 3.0,
            "iteration": 0,
        },
        readers=readers,
        files={
            "megatron_args.sh": megatron_command_line(arch) + "\n",
            **{f"{checkpoints.TOKENIZER}/{name}": content for name, content in files.items()},
        },
    )
    return arch


def args_of(
    source: HfFolder, config: dict[str, Any], family: Family, tokenizer: Path | None
) -> dict[str, Any]:
    """Return the checkpoint's args beside its sizes: precision, tokenizer, origin for an export.

    ``tokenizer`` is the folder that it will lie in: Megatron Bridge reads no model without one.
    """
    (embedding,) = family.rows[EMBEDDING].names
    counted = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tokenizer),
        "tokenizer_sha256": None,
    }
    return {
        "params_dtype": getattr(torch, source.dtypes[name_in(source, family, embedding)]),
        "world_size": torch.distributed.get_world_size(),
        "hf_config": config,
        **(counted if tokenizer else {}),
    }


def tokenizer_size(source: HfFolder) -> int | None:
    """Return how many tokens the folder's tokenizer has; None without one that can be read."""
    if not has_tokenizer(carried(source.folder)[0]):
        warn(f"{source.folder} has no tokenizer: every row of the embedding counts as a token.")
        return None
    data = SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(source.folder),
        vocab_file=None,
        merge_file=None,
        vocab_size=None,
        trust_remote_code=False,
    )
    try:
        return build_tokenizer(data).vocab_size
    except UserError as error:
        warn(f"{error} Every row of the embedding counts as a token.")
        return None


def check_tensors(source: HfFolder, arch: Arch, family: Family, work: Sequence[Piece]) -> None:
    """Compare the folder's tensors with those that ``arch`` calls for. No tensor but heads is read.

    Raises:
        UserError: naming the first tensor that is missing, has another shape or dtype, or no row.
    """
    if problem := other_kind(source, family, arch):
        _refuse(source, problem)
    expected, num_rows = {}, {**family.defaults, **source.config}["vocab_size"]
    dtypes: dict[str, str] = {}
    for piece in work:
        if is_zero_bias(piece, source, family):
            continue
        for name, size in piece.shapes(arch, num_rows).items():
            found = name_in(source, family, name)
            expected[found] = size
            if found not in source.shapes:
                _refuse(source, f"there is no tensor {name}, which {CONFIG} calls for")
            if source.shapes[found] != size:
                theirs, ours = list(source.shapes[found]), list(size)
                _refuse(source, f"{found} is {theirs}, {CONFIG} says {ours}")
            dtype = dtypes.setdefault(piece.weight.key, source.dtypes[found])
            if source.dtypes[found] != dtype:
                _refuse(source, f"{found} is {source.dtypes[found]}, others of its kind {dtype}")
            if not hasattr(torch, dtype):
                _refuse(source, f"{found} is {dtype}, which is not read here")
    if not arch.untie_embeddings_and_output_weights:
        _check_tied(source, family, expected)
    others = [name for name in source.shapes if name not in expected]
    if left := [name for name in others if any(re.search(p, name) for p in family.left_out)]:
        warn(f"{source.folder}: {', '.join(left)}: of other heads, left out.")
    for name in others:
        if name not in left and not any(re.search(p, name) for p in family.ignored):
            _refuse(source, f"{name} has no row in the table of {family.model_type} (families.py)")


def other_kind(source: HfFolder, family: Family, arch: Arch) -> str | None:
    """Return what a folder is that is no language model of ``arch``, as its tensors' names say."""
    names, layers = list(source.shapes), [0]
    for name in names:
        if ".lora_" in name or name.startswith("base_model."):
            return f"{name}: {ADAPTER}"
        if re.match(r"(score|classifier|v_head|reward_head|qa_outputs)\.", name):
            kinds = source.config.get("architectures") or ["another model"]
            return f"{name} is a head of {kinds[0]}; only {family.architecture} is read here"
        if re.match(r"(model\.)?(vision|visual|language_model|multi_modal|mm_)", name):
            return f"{name} is part of a model of pictures and text, which is not read here"
        layers += [int(found) for found in re.findall(r"(?:^|\.)(?:layers?|h)\.(\d+)\.", name)]
    if max(layers) >= arch.num_layers:
        key = family.sizes["num_layers"][0]
        return f"its files hold {max(layers) + 1} layers, {CONFIG} says {key} {arch.num_layers}"
    return None


def _check_tied(source: HfFolder, family: Family, expected: dict[str, tuple[int, ...]]) -> None:
    """Expect a head in the folder to be the embedding, with which it is tied."""
    (head,), (embedding,) = family.rows[LM_HEAD].names, family.rows[EMBEDDING].names
    embedding = name_in(source, family, embedding)
    if head in source.shapes:
        if not torch.equal(source.read(head), source.read(embedding)):
            _refuse(source, f"{head} is not {embedding}, though tie_word_embeddings is true")
        expected[head] = source.shapes[head]


def is_zero_bias(piece: Piece, source: HfFolder, family: Family) -> bool:
    """Whether ``piece`` is a bias that the folder's model has not, while it has others."""
    key = piece.weight.key
    return key.endswith(".bias") and any(
        part in key for part in without_biases(source.config, family)
    )


def name_in(source: HfFolder, family: Family, name: str) -> str:
    """Return the name of a tensor in the folder; files of the bare model leave out the prefix."""
    names = [name, name.removeprefix(family.prefix)]
    for end, old in family.old_names.items():
        names += [each.removesuffix(end) + old for each in names if each.endswith(end)]
    return next((each for each in names if each in source.shapes), name)


def planned_share(
    source: HfFolder,
    arch: Arch,
    family: Family,
    work: Sequence[Piece],
    rank: int,
    world_size: int,
) -> tuple[dict[str, ShardedTensor | ShardedObject], Readers]:
    """Return this rank's share of the checkpoint without content, and what reads that.

    All ranks' shares together are the checkpoint, layers stacked; each rank has about as many
    elements. No collectives.
    """
    share, readers = extra_states(arch) if rank == 0 else {}, {}
    for piece in trim.deal(iter(work), arch, world_size)[rank]:
        is_zero = is_zero_bias(piece, source, family)
        names = [name_in(source, family, name) for name in piece.names]
        named = names[0].removesuffix("bias") + "weight" if is_zero else names[0]
        dtype = getattr(torch, source.dtypes[named])
        start = 0
        for part in piece.parts:
            size = part.shape(arch)
            empty, rows = torch.empty(size, dtype=dtype, device="meta"), (start, start + size[0])
            start = rows[1]
            for name, tensor in trim.as_share(part, empty, arch).items():
                share[name] = tensor
                readers[tensor.key, tensor.global_offset] = (
                    functools.partial(torch.zeros, size, dtype=dtype)
                    if is_zero
                    else functools.partial(read_piece, source, arch, piece, names, slice(*rows))
                )
    return share, readers


def read_piece(
    source: HfFolder, arch: Arch, piece: Piece, names: Sequence[str], rows: slice
) -> Tensor:
    """Return a tensor of the checkpoint, these rows of the piece, from those of the folder."""
    parts = [source.read(name) for name in names]
    found = piece.merge(parts, arch)[rows]
    # One tensor may be several of the checkpoint, of which each has its rows looked at, once.
    named = [(names[0], found)] if len(names) == 1 else zip(names, parts, strict=True)
    check_finite(source.folder, named)
    return found


def extra_states(arch: Arch) -> dict[str, ShardedObject]:
    """Return the empty ``_extra_state`` objects of linear layers, which a model asks for.

    That of the output layer, a GPTModel leaves out and a BertModel does not.
    """
    linear = re.compile(r"(.*\.(?:linear_\w+|in_proj|out_proj)\.)weight(?:\.\w+)?$")
    keys = filter(None, (linear.match(weight.key) for weight in weights(arch)))
    names = {key[1] + "_extra_state" for key in keys}
    names |= {"output_layer._extra_state"} if arch.is_bert else set()
    return trim.empty_states(names, arch)


def _refuse(source: HfFolder, problem: str) -> None:
    raise UserError(f"{source.folder}: {problem}.", CHECKPOINT)
