"""Checkpoints as models on this rank: read with their tokenizer, built, filled.

    data, tokenizer, (source,) = read_models(flags.data, folder)
    place = join_ranks(flags, source.arch.num_layers)
    options = model_options(flags, place, source.arch.num_layers)
    chunks = open_model(source, options, place.groups)

Whether the model fits the layout is checked between the first two, its files behind the second.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.checkpoint import checkpoints
from megatron_ext.checkpoint.finite import check_finite
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.checkpoint.identity import check_tokenizer, tokenizer_sha256, with_own_tokenizer
from megatron_ext.cli.megatron_flags import Tokenizer
from megatron_ext.data.datasets import MegatronTokenizerBase, build_tokenizer
from megatron_ext.model.build import LanguageModel, build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.fp8 import keep_exact_weights
from megatron_ext.runtime.collective_errors import on_all_ranks


def read_models[Data: Tokenizer](
    data: Data, *folders: Path
) -> tuple[Data, MegatronTokenizerBase, list[Checkpoint]]:
    """Return checkpoints, their weights still on disk, with their tokenizer. No collectives.

    Args:
        data: flags, with the tokenizer that is typed. Where none is, the one beside the first of
            the checkpoints that has one is taken.
        folders: of the checkpoints.

    Returns:
        ``data`` with the tokenizer that was taken, the tokenizer, and each checkpoint with the
        number of its tokens.

    Raises:
        UserError: a checkpoint or the tokenizer cannot be read; they do not belong together.
    """
    sources = [checkpoints.read(str(folder)) for folder in folders]
    data = with_own_tokenizer(data, *sources)
    tokenizer = build_tokenizer(data)
    sources = [source.with_tokens(tokenizer.vocab_size) for source in sources]
    for source in sources:
        check_tokenizer(source, tokenizer.vocab_size, tokenizer_sha256(data))
    return data, tokenizer, sources


def read_again(found: Checkpoint, sizes: Mapping[str, Any]) -> Checkpoint:
    """Return all that a checkpoint says of itself, of which ``quick_read.glance`` found a part.

    ``sizes`` as of ``checkpoints.read``. The number of tokens that ``found`` was given stays.
    """
    whole = checkpoints.read(str(found.folder), sizes=sizes)
    return whole.with_tokens(found.arch.vocab_size) if found.knows_tokens else whole


def open_model(
    source: Checkpoint,
    options: ModelOptions,
    groups: ProcessGroupCollection,
    *,
    arch: Arch | None = None,
) -> list[LanguageModel]:
    """Return this rank's part of a checkpoint's model, with its weights. Collective.

    Args:
        source: the checkpoint.
        options: how this run holds the model.
        groups: megatron-core's process groups.
        arch: the sizes of ``source``; may pad the vocabulary otherwise and have another dropout.
    """
    arch = arch or source.arch
    chunks = build_model(arch, options, groups)
    repad = arch.padded_vocab_size != source.arch.padded_vocab_size
    restore_weights(chunks, source, repad=repad)
    return chunks


def restore_weights(
    chunks: list[LanguageModel], source: Checkpoint, *, repad: bool = False
) -> None:
    """Fill ``chunks`` with the weights of ``source``, whatever layout wrote them. Collective.

    ``repad``: the vocabulary may be padded to another size here than there.
    """
    state = model_state_dict(chunks)
    padded_vocab_size = source.arch.padded_vocab_size if repad else None
    loaded = checkpoints.load_weights(source.folder, state, padded_vocab_size=padded_vocab_size)
    if loaded is None:
        on_all_ranks(lambda: check_finite(source.folder, _named_weights(chunks)))
        return
    set_weights(chunks, loaded, source)
    for index, chunk in enumerate(chunks):
        keep_exact_weights(chunk.named_parameters(), loaded[_chunk_name(chunks, index)])


def set_weights(chunks: list[LanguageModel], loaded: dict[str, Any], source: Checkpoint) -> None:
    """Fill ``chunks``. One collective: all ranks refuse weights that are not finite."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_chunk_name(chunks, index)])
    on_all_ranks(lambda: check_finite(source.folder, _named_weights(chunks)))


def _named_weights(chunks: list[LanguageModel]) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's weights with their names, the layers numbered over all stages."""
    for chunk in chunks:
        numbers = [str(layer.layer_number - 1) for layer in chunk.decoder.layers]
        for name, weight in chunk.named_parameters():
            head, layers, rest = name.partition(".layers.")
            if layers:
                number, _, rest = rest.partition(".")
                name = f"{head}{layers}{numbers[int(number)]}.{rest}"
            yield name, weight


def _chunk_name(chunks: list[LanguageModel], index: int) -> str:
    return "model" if len(chunks) == 1 else f"model{index}"
