"""The two programs run as a user runs them, on the ranks of a test or as processes of their own.

outcomes = run_program("prune", [flags], world_size=2)      # an Outcome per rank
process = start_process("pretrain_distill", [flags], world_size=2)
"""

import contextlib
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil
import tokenizers
import torch
import transformers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.arch import Arch
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.cli.programs import megatron_command_line
from megatron_ext.model.build import LanguageModel, build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import open_model
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import run_main
from tests.models import random_batch
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent

# name: (world size, flags)
LAYOUTS = {
    "TP1": (1, ""),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2+SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "PP2xVPP2": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    ),
    "TP2xPP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "DP2": (2, ""),
    "CP2": (2, "--context-parallel-size 2"),
}
# Flags of a training run that needs no file.
NEW_MODEL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --max-position-embeddings 8 "
    "--seq-length 8 --micro-batch-size 1 --train-iters 1 --lr 1 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 8 "
)
# What depends on how busy the machine is.
TIMINGS = ("iteration-time", "tokens/s", "throughput", "mem-GiB")


@dataclass(frozen=True)
class Outcome:
    """The exit code and the output of a program on one rank."""

    code: int
    stdout: str
    stderr: str


def run_program(
    program: str, argv: Sequence[str], world_size: int = 1, before: Callable | None = None
) -> list[Outcome]:
    """Run a program on ranks of this test; ``before`` is called first, on each of them."""
    return run_ranks(world_size, _run_main, program, list(argv), before)


def _run_main(program: str, argv: list[str], before: Callable | None) -> Outcome:
    if before is not None:
        before()
    torch.distributed.barrier()  # a rank that is refused at once would leave others connecting
    sys.argv = [f"{program}.py", *argv]
    stdout, stderr, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run_main(importlib.import_module(program).main)
        except SystemExit as error:
            code = error.code
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def run_here(argv: Sequence[str]) -> tuple[int, str, str]:
    """Run what begins no ranks in this process: a program and its flags.

    Returns:
        Its code, output and errors.

    A program that begins ranks changes torch, also for transformers' models in later tests.
    """
    folders = Path(argv[0]).with_suffix("").parts
    program = importlib.import_module(".".join(folders)).main
    before, sys.argv = sys.argv, list(argv)
    stdout, stderr, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run_main(program)
        except SystemExit as error:
            code = error.code
        finally:
            sys.argv = before
    assert not platform.emulate_cuda_on_cpu.cache_info().currsize, "run it with succeed()"
    return code, stdout.getvalue(), stderr.getvalue()


def succeed(program: str, argv: Sequence[str], world_size: int = 1) -> list[Outcome]:
    """Run a program that has to end well on every rank."""
    outcomes = run_program(program, argv, world_size)
    assert [o.code for o in outcomes] == [0] * world_size, outcomes[0].stderr
    return outcomes


def fail(
    program: str, argv: Sequence[str], world_size: int = 1, before: Callable | None = None
) -> tuple[int, str]:
    """Run a program that has to end with the same code everywhere and one line on rank 0.

    Returns:
        The code and the line, without what is at its head.
    """
    outcomes = run_program(program, argv, world_size, before)
    assert len({o.code for o in outcomes}) == 1, [o.code for o in outcomes]
    errors = [o.stderr.partition("ERROR: ")[2] for o in outcomes]
    assert errors[0], f"rank 0 says nothing: {outcomes[0]}"
    assert "ERROR: " not in errors[0]
    assert not any(errors[1:]), "another rank speaks too"
    return outcomes[0].code, errors[0].rstrip()


def start_process(program: str, argv: Sequence[str], world_size: int = 1) -> subprocess.Popen:
    """Start a program outside of pytest, in a process group of its own; torchrun for ranks."""
    launch = [sys.executable]
    if world_size > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(world_size)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*launch, f"{program}.py", *argv],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], timeout: float = 120) -> None:
    """Return as soon as ``condition`` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{timeout} s are over"
        time.sleep(0.002)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL ``process``, if it still runs, and its children: torchrun's are no group of its."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


# Data, models and what is left on disk.


def write_corpus(prefix: Path, vocab_size: int) -> str:
    """Write indexed data of 60 documents and return its prefix; the last token ends each."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", numpy.uint16)
    rng = numpy.random.default_rng(3)
    for _ in range(60):
        tokens = rng.zipf(1.3, size=rng.integers(20, 60)) % (vocab_size - 1)
        builder.add_document([*tokens, vocab_size - 1], [len(tokens) + 1])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def data_flags(arch: Arch, prefix: str) -> list[str]:
    """Return the flags of a corpus, of the tokenizer of ``arch`` and of its samples."""
    return shlex.split(
        f"--data-path {prefix} --split 80,15,5 {tokenizer_flags(arch, prefix)} --num-workers 0 "
        "--seq-length 16 --micro-batch-size 1"
    )


def tokenizer_flags(arch: Arch, prefix: str) -> str:
    """Return the flags of a tokenizer for ``arch``; a BERT's is written beside ``prefix``."""
    if not arch.is_bert:
        return f"--tokenizer-type NullTokenizer --vocab-size {arch.vocab_size}"
    folder = f"{prefix}-tokenizer"
    if not Path(folder).exists():
        special = ["[UNK]", "[PAD]", "[CLS]", "[MASK]", "[SEP]"]
        words = [f"w{i}" for i in range(arch.vocab_size - len(special))] + special
        model = tokenizers.models.WordPiece(
            {word: number for number, word in enumerate(words)}, unk_token="[UNK]"
        )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(model),
            **{f"{word[1:-1].lower()}_token": word for word in special},
        ).save_pretrained(folder)
    return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"


def model_flags(arch: Arch) -> list[str]:
    """Return the flags that describe ``arch``."""
    return shlex.split(megatron_command_line(arch))


def write_model(folder: str, arch: Arch, change: Callable | None = None, *args: Any) -> None:
    """Write random weights of ``arch``, float32, as a release. ``change(model, *args)`` first."""
    run_ranks(1, _write_model, folder, arch, change, args)


def _write_model(folder: str, arch: Arch, change: Callable | None, args: tuple) -> None:
    groups = platform.initialize().groups
    chunks = build_model(arch, ModelOptions(), groups, seed=7)
    generator = torch.Generator().manual_seed(9)
    for parameter in chunks[0].parameters():
        if parameter.ndim == 1:  # norms and biases that are not trivial
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    if change is not None:
        with torch.no_grad():
            change(chunks[0], *args)
    state = model_state_dict(chunks) | {"args": Namespace(**arch.to_args()), "iteration": 0}
    writer.save(folder, checkpoints.RELEASE, state, files={})


def read_model(folder: str) -> LanguageModel:
    """Return a checkpoint's model in float64. Call it on a rank that has no process groups yet."""
    source = checkpoints.read(folder)
    groups = platform.initialize().groups
    (model,) = open_model(source, ModelOptions(params_dtype=torch.float64), groups)
    return model.eval()


def logits_of(model: LanguageModel, arch: Arch) -> torch.Tensor:
    """Return float64 logits [s, b, v] of a fixed batch."""
    batch = random_batch(arch, num_samples=2, seq_length=12)
    with torch.no_grad():
        return model(batch["tokens"], batch["position_ids"], None)


def read_tensors(folder: str) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, optimizer state included, under its name."""
    reader = SliceReader(checkpoints.read(folder).folder)
    return {
        key: reader.read(key, [slice(None)] * len(size)) for key, (size, _) in reader.shapes.items()
    }


def assert_same_bytes(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare what ``read_tensors`` returned, NaN equal to NaN."""
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), right[key].view(torch.uint8)), key


def read_metrics(folder: str) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without what is measured in seconds and bytes."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
