"""Continue texts with a checkpoint, in one process; the likeliest token each time, or sampled.

    python tools/generate.py --load ckpt/student --prompt "def main(" "Once upon a time"
    python tools/generate.py --load ckpt/student --teacher-load ckpt/teacher --prompt ...

The tokenizer is the one beside the checkpoint, unless --tokenizer-type and its files name another.
Sizes and precision are the checkpoint's. Every token costs a forward pass over all tokens before
it: this is for looking at a model, not for serving it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.checkpoint.folder import locate
from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli.megatron_flags import Tokenizer, trust_flag
from megatron_ext.cli.parser import REQUIRED, flag
from megatron_ext.cli.parser import parse as parse_flags
from megatron_ext.data.vocabulary import check_tokenizer_file
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import USAGE, UserError, run_main


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generation."""

    load: str = flag(REQUIRED, "folder of the checkpoint")
    ckpt_step: int | None = flag(None, "iteration to read; default the latest", at_least=0)
    prompt: tuple[str, ...] = flag(REQUIRED, "texts to continue")
    teacher_load: str | None = flag(
        None,
        "folder of a teacher's checkpoint: print its loss on the continuations, how much they "
        "repeat, and how long they agree with the teacher's own",
    )
    max_new_tokens: int = flag(64, "tokens after each prompt, unless the document ends", at_least=1)
    temperature: float = flag(0.0, "of sampling; 0 takes the likeliest token", at_least=0)
    top_k: int | None = flag(None, "sample from the K likeliest tokens; default all", at_least=1)
    seed: int = flag(1234, "of sampling; each prompt begins with it", at_least=0)
    device: str | None = flag(None, "default cuda where there is one", choices=("cpu", "cuda"))
    trust_checkpoint: bool = trust_flag()


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """Continue texts with a checkpoint."""

    generation: Generation
    tokenizer: Tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Print each prompt and its continuation."""
    flags = parse(sys.argv[1:] if argv is None else argv)
    options = flags.generation
    trust(options.trust_checkpoint)
    folder = locate(options.load, options.ckpt_step)
    teacher = locate(options.teacher_load) if options.teacher_load else None
    check_tokenizer_file(flags.tokenizer)
    with heavy.imports():
        from megatron_ext.inference import generation
    generation.generate(flags, folder, teacher)


def parse(argv: Sequence[str]) -> GenerateFlags:
    """Return the checked flags."""
    flags = parse_flags(GenerateFlags, argv)
    if list(argv).count("--prompt") > 1:
        raise UserError("--prompt is given twice: put all texts behind one --prompt.", USAGE)
    options = flags.generation
    if not options.prompt:
        raise UserError("--prompt: no text behind it.", USAGE)
    if options.top_k is not None and options.temperature == 0:
        raise UserError(f"--top-k {options.top_k} needs --temperature above 0.", USAGE)
    return flags


if __name__ == "__main__":
    run_main(main)
