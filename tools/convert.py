"""A Hugging Face model as a Megatron checkpoint, and back; a GPTModel as a HybridModel, and back.

    python tools/convert.py import --hf Llama-3.1-8B --save ckpt/teacher
    python tools/convert.py export --load ckpt/student --hf student-hf
    python tools/convert.py check --hf student-hf --load ckpt/student
    python tools/convert.py layers --to hybrid --load ckpt/gpt --save ckpt/hybrid

One process, or several with torchrun, which share the reading and writing. No model is built and no
GPU used. Weights are read from safetensors only. ``check`` is one process: it computes the logits
of both models on the CPU, in float32, and ends with code 5 where they differ. ``layers`` renames
weights between Megatron-LM's pretrain_gpt.py and pretrain_hybrid.py, whose models compute the same.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_ext.arch import num_parameters
from megatron_ext.checkpoint.folder import locate
from megatron_ext.checkpoint.quick_read import glance
from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli.flag_checks import dry_run_problems, refuse
from megatron_ext.cli.megatron_flags import trust_flag
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.cli.size_flags import Sizes
from megatron_ext.convert import gguf
from megatron_ext.convert.families import FAMILIES
from megatron_ext.convert.fit import problem_of
from megatron_ext.convert.hf_files import CONFIG, check_hf_folder, tokenizer_files
from megatron_ext.convert.options import FORMS, check_free, in_form, with_tokens
from megatron_ext.rehearsal.cost_report import model_line
from megatron_ext.rehearsal.models import Model, config_arch, model_at, with_sizes
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError, run_main

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "": 1}


@dataclass(frozen=True, kw_only=True)
class Dry:
    """Dry run."""

    dry_run: bool = flag(
        False, "check flags and sizes, print what it takes and OK; read and write no weights"
    )
    load_config: str | None = flag(
        None, "of --dry-run: config.json of what is to be read, where it is not there yet"
    )


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import."""

    hf: str = flag(
        REQUIRED, "Hugging Face folder: config.json, safetensors, tokenizer; or a .gguf file"
    )
    save: str = flag(REQUIRED, "folder of the Megatron checkpoint; gets a release/")
    make_vocab_size_divisible_by: int = flag(
        128, "pad the vocabulary with zeros to a multiple of this", at_least=1
    )
    max_position_embeddings: int | None = flag(
        None, "longest sequence, in tokens; default that of config.json", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export."""

    load: str = flag(REQUIRED, "folder of the Megatron checkpoint")
    hf: str = flag(REQUIRED, "Hugging Face folder to write; must not be there yet")
    ckpt_step: int | None = flag(None, "iteration to read; default the latest", at_least=0)
    model_type: str | None = flag(
        None, "family to write; default the one that was imported", choices=tuple(FAMILIES)
    )
    max_shard_size: str = flag("5GB", "size of a file of weights: bytes, or with KB, MB, GB, MiB")
    tokenizer_model: str | None = flag(
        None, "folder with the tokenizer to add; default the one beside the checkpoint"
    )
    vocab_size: int | None = flag(
        None,
        "tokens, of a checkpoint that does not say how many; default all rows, padding included",
        at_least=1,
    )
    trust_checkpoint: bool = trust_flag()


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check."""

    hf: str = flag(REQUIRED, "Hugging Face folder, which transformers computes")
    load: str = flag(REQUIRED, "folder of the Megatron checkpoint")
    ckpt_step: int | None = flag(None, "iteration to read; default the latest", at_least=0)
    tokens: tuple[int, ...] = flag((), "ids of one text; default random tokens")
    samples: int = flag(2, "random texts", at_least=1)
    seq_length: int = flag(128, "tokens of a random text, as far as the models go", at_least=2)
    seed: int = flag(1234, "of random tokens", at_least=0)
    tolerance: float = flag(
        1e-3, "largest difference of two logits, as a share of the largest logit", at_least=0
    )
    trust_checkpoint: bool = trust_flag()


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Layers."""

    load: str = flag(REQUIRED, "folder of the Megatron checkpoint")
    save: str = flag(REQUIRED, "folder of the new one; gets a release/, without optimizer state")
    to: str = flag(
        REQUIRED,
        "model to write: a GPTModel, where all layers are whole, or a HybridModel of sub-layers",
        choices=FORMS,
    )
    ckpt_step: int | None = flag(None, "iteration to read; default the latest", at_least=0)
    trust_checkpoint: bool = trust_flag()


@dataclass(frozen=True, kw_only=True)
class LayersFlags:
    """Write a GPTModel as a HybridModel, or the other way round."""

    options: Layers


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """Compare the logits of a Megatron checkpoint with those of transformers."""

    options: Check


@dataclass(frozen=True, kw_only=True)
class ImportFlags:
    """Write a Hugging Face model as a Megatron checkpoint."""

    options: Import
    dry: Dry


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write a Megatron checkpoint as a Hugging Face model."""

    options: Export
    sizes: Annotated[dict[str, Any], Sizes]
    """Compared with the checkpoint's."""
    dry: Dry


def main(argv: Sequence[str] | None = None) -> int | None:
    """Do what the first word names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "import": run_import,
        "export": run_export,
        "check": run_check,
        "layers": run_layers,
    }
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        print(f"\nconvert {' --help, '.join(commands)} --help list their flags.")
        return 0
    if not argv or argv[0] not in commands:
        said = argv[0] if argv else "nothing"
        raise UserError(f"{said}: the first word is one of {', '.join(commands)}.", USAGE)
    return commands[argv[0]](argv[1:])


def run_check(argv: Sequence[str]) -> int:
    """Compare as ``argv`` says; returns the exit code."""
    options = parse(CheckFlags, argv).options
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("convert check: one process; start it without torchrun.", USAGE)
    trust(options.trust_checkpoint)
    folder = locate(options.load, options.ckpt_step)
    check_hf_folder(options.hf)
    with heavy.imports():
        from megatron_ext.convert import compare
    return compare.check_model(options, folder)


def run_layers(argv: Sequence[str]) -> None:
    """Change the form as ``argv`` says. Collective."""
    options = parse(LayersFlags, argv).options
    trust(options.trust_checkpoint)
    source = glance(options.load, options.ckpt_step)
    target = in_form(source.arch, options.to)
    with heavy.imports():
        from megatron_ext.convert import run
    run.change_form(options, source.folder, target)


def run_import(argv: Sequence[str]) -> None:
    """Import as ``argv`` says. Collective."""
    flags = parse(ImportFlags, argv)
    options = flags.options
    refuse(dry_run_problems(flags.dry))
    if flags.dry.dry_run:
        rehearse_import(options, flags.dry)
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":  # of several ranks, the first one looks
        check_free(options.save)
        if options.hf.endswith(gguf.SUFFIX):
            gguf.tensor_types(options.hf)
        else:
            check_hf_folder(options.hf)
    with heavy.imports():
        from megatron_ext.convert import run
    run.import_model(options)


def run_export(argv: Sequence[str]) -> None:
    """Export as ``argv`` says. Collective."""
    flags = parse(ExportFlags, argv)
    options = flags.options
    refuse(dry_run_problems(flags.dry))
    max_shard_size = bytes_of(options.max_shard_size)
    trust(options.trust_checkpoint)
    if flags.dry.dry_run:
        rehearse_export(options, flags.sizes, flags.dry)
        return
    folder = locate(options.load, options.ckpt_step)
    with heavy.imports():
        from megatron_ext.convert import run
    run.export_model(options, folder, flags.sizes, max_shard_size)


def rehearse_import(options: Import, dry: Dry) -> None:
    """Print what an import takes, from the folder's config.json, or --load-config before."""
    check_free(options.save)
    own = Path(options.hf) / CONFIG
    path = str(own) if own.exists() else dry.load_config
    if path is None:
        raise UserError(f"--hf {own}: not there; --load-config can say the sizes.", CHECKPOINT)
    arch = config_arch(
        "--hf" if own.exists() else "--load-config",
        path,
        options.make_vocab_size_divisible_by,
        options.max_position_embeddings,
    )
    finish(Model(arch, path))


def rehearse_export(options: Export, sizes: dict[str, Any], dry: Dry) -> None:
    """Print what an export takes, if the family has such models."""
    if Path(options.hf).exists():
        raise UserError(f"--hf {options.hf}: is there already.", USAGE)
    model = model_at("--load", options.load, options.ckpt_step, config=dry.load_config)
    arch, source = model.arch, model.checkpoint
    if source is not None:
        if options.vocab_size is not None:
            source = with_tokens(source, options.vocab_size)
        if options.tokenizer_model is not None:
            tokenizer_files(source, options.tokenizer_model)
        arch = source.arch
    arch = with_sizes(arch, sizes, may_cut=source is None)
    name = options.model_type or model.origin.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"--model-type: choose one of {', '.join(FAMILIES)}.", USAGE)
    if problem := problem_of(arch, FAMILIES[name], model.origin):
        raise UserError(f"--model-type {name}: {problem}.", USAGE)
    finish(Model(arch, model.where))


def finish(model: Model) -> None:
    """Print a model, its size on disk and OK. In memory a process holds a piece or two of it."""
    print(model_line("model", model))
    print(f"{'bfloat16':12}{2 * num_parameters(model.arch) / 1e9:.2f} GB on disk\nOK")


def bytes_of(size: str) -> int:
    """Return the bytes that 5GB, 500MiB or 1000000 stand for."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B|)", size.upper())
    if match is None or not int(match[1]):
        raise UserError(f"--max-shard-size {size}: write 5GB, 500MiB or bytes.", USAGE)
    return int(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    run_main(main)
