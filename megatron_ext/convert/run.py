"""The run of tools/convert.py: a model in, a model out; ``options`` are that program's."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.checkpoint import checkpoints
from megatron_ext.cli.size_flags import check_against_checkpoint
from megatron_ext.convert import gguf
from megatron_ext.convert.exporter import export_folder
from megatron_ext.convert.forms import write_form
from megatron_ext.convert.importer import import_folder
from megatron_ext.convert.options import check_free, with_tokens
from megatron_ext.runtime import platform
from megatron_ext.runtime.collective_errors import locked, on_first_rank
from megatron_ext.runtime.errors import warn
from megatron_ext.runtime.files import LOCK, lock_beside


def import_model(options: Any) -> None:
    """Import as ``options`` say. Collective."""
    place = platform.initialize(device="cpu")
    lock = {Path(options.save) / LOCK: f"--save {options.save}"}
    with locked(lock), hf_folder_of(options.hf, options.save) as folder:
        on_first_rank(lambda: check_free(options.save))
        arch = import_folder(
            folder,
            options.save,
            make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
            max_position_embeddings=options.max_position_embeddings,
        )
    if place.rank == 0:
        print(f"{options.save}: {num_parameters(arch):,} parameters")
    platform.shut_down()


def change_form(options: Any, folder: Path, target: Arch) -> None:
    """Write the checkpoint in ``folder`` as ``target``, the same model. Collective."""
    source = checkpoints.read(str(folder))
    place = platform.initialize(device="cpu")
    if target.is_hybrid and target.use_rope_scaling:
        warn(
            f"--save {options.save}: Megatron-LM's HybridModel (0.19.2) does not scale rotary "
            "frequencies (--use-rope-scaling): pretrain_hybrid.py would compute something else."
        )
    with locked({Path(options.save) / LOCK: f"--save {options.save}"}):
        on_first_rank(lambda: check_free(options.save))
        checkpoints.verify_integrity(source.folder)
        write_form(source, target, options.save)
    if place.rank == 0:
        print(f"{options.save}: {num_parameters(target):,} parameters")
    platform.shut_down()


@contextlib.contextmanager
def hf_folder_of(hf: str, save: str) -> Iterator[str]:
    """Yield ``hf``; for a GGUF file a folder beside ``save``, removed again. Collective."""
    if not hf.endswith(gguf.SUFFIX):
        yield hf
        return
    folder = f"{save.rstrip('/')}.hf-{Path(hf).stem}"
    try:
        on_first_rank(lambda: print_line(gguf.write_hf_folder(hf, folder)))
        yield folder
    finally:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def print_line(text: str) -> None:
    """Print ``text`` unless it is empty."""
    if text:
        print(text, flush=True)


def export_model(options: Any, folder: Path, sizes: Mapping[str, Any], max_shard_size: int) -> None:
    """Export the checkpoint in ``folder``, which must have the typed ``sizes``. Collective."""
    source = checkpoints.read(str(folder))
    if options.vocab_size is not None:
        source = with_tokens(source, options.vocab_size)
    check_against_checkpoint(sizes, source.arch)
    place = platform.initialize(device="cpu")
    checkpoints.verify_integrity(source.folder)
    with locked({lock_beside(options.hf): f"--hf {options.hf}"}):
        export_folder(
            source,
            options.hf,
            model_type=options.model_type,
            max_shard_size=max_shard_size,
            tokenizer=options.tokenizer_model,
        )
    if place.rank == 0:
        print(f"{options.hf}: {num_parameters(source.arch):,} parameters")
    platform.shut_down()
