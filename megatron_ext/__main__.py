"""One command for all programs: ``minitron prune ...``, ``python -m megatron_ext prune ...``.

The programs are files of the root and of tools/. A wheel has them in megatron_ext/programs
(setup.py); in a checkout they are where they are. Nothing heavy is imported before one is chosen.
"""

import difflib
import sys
import types
from pathlib import Path

from megatron_ext import __version__
from megatron_ext.runtime.errors import USAGE, UserError, run_main

# subcommand: (file, what it does)
PROGRAMS = {
    "prune": ("prune.py", "score a checkpoint's units and cut it to a smaller model"),
    "distill": ("pretrain_distill.py", "train a model alone, or distil it from a teacher"),
    "convert": ("tools/convert.py", "a Hugging Face folder as a Megatron checkpoint, and back"),
    "evaluate": ("tools/evaluate.py", "loss, and KL to a teacher, on held-out data"),
    "generate": ("tools/generate.py", "text that a checkpoint writes after a prompt"),
    "preprocess-data": ("tools/preprocess_data.py", "JSON lines as indexed data"),
    "inspect": ("tools/inspect_checkpoint.py", "what a checkpoint holds"),
    "certify": ("tools/certify.py", "a layout against one rank, in small, on a CPU"),
    "estimate": ("tools/estimate.py", "memory and time of a run, by arithmetic"),
    "store-teacher": ("tools/store_teacher.py", "a teacher's likeliest tokens on disk"),
    "rank-candidates": ("tools/rank_candidates.py", "retrain a search's candidates and rank them"),
    "plot-scores": ("tools/plot_scores.py", "a picture of a scores file"),
}


def main() -> None:
    """Run the program that the first argument names, as if its file had been started."""
    run_main(_run)


def _run() -> None:
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--version":
        print(f"minitron {__version__}")
        return
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, 1)
        meant = f"did you mean {near[0]}?" if near else f"choose from {', '.join(PROGRAMS)}."
        raise UserError(f"minitron {name}: no such command; {meant}", USAGE)
    program = path_of(PROGRAMS[name][0])
    if not program.exists():
        raise UserError(f"minitron {name}: {program} is not there; install the package again.")
    sys.argv = [f"minitron {name}", *flags]
    # As runpy.run_path, which would put the file's name into sys.argv, and so into --help.
    module = types.ModuleType("__main__")
    module.__file__, sys.modules["__main__"] = str(program), module
    exec(compile(program.read_bytes(), program, "exec"), module.__dict__)  # ends in SystemExit


def overview() -> str:
    """Return the text of --help."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name.ljust(width)}  {what}" for name, (_, what) in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: minitron COMMAND [FLAGS]     minitron COMMAND --help lists its flags",
            "",
            *lines,
            "",
            "several ranks: torchrun --nproc-per-node 2 -m megatron_ext COMMAND [FLAGS]",
        ]
    )


def path_of(program: str) -> Path:
    """Return where the file of a program is."""
    package = Path(__file__).resolve().parent
    installed = package / "programs" / program
    return installed if installed.exists() else package.parent / program


if __name__ == "__main__":
    main()
