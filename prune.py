r"""Prune a checkpoint: calibration data -> scores -> plan -> pruned checkpoint.

    torchrun --nproc-per-node 2 prune.py --load teacher --save pruned --target-hidden-size 3072 \
        --tensor-model-parallel-size 2 --data-path corpus --calibration-samples 1024 ...

--scores and --plan name files: one that exists replaces the steps before it, or else is written.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch

from megatron_ext import checkpoint, data, platform
from megatron_ext.arch import num_parameters
from megatron_ext.checkpoint import Checkpoint
from megatron_ext.errors import USAGE, UserError, run_main
from megatron_ext.flags import (
    PruneFlags,
    check_layout,
    check_targets,
    format_flags,
    megatron_command_line,
    parse_prune,
)
from megatron_ext.model import build_model
from megatron_ext.platform import Platform
from megatron_ext.pruning.calibrate import calibrate
from megatron_ext.pruning.importance import AGGREGATION
from megatron_ext.pruning.plan import Plan, check_plan, load_plan, make_plan, save_plan, target_arch
from megatron_ext.pruning.scores import Scores, check_scores, load_scores, save_scores
from megatron_ext.pruning.trim import trimmed_share
from megatron_ext.slices import SliceReader
from megatron_ext.startup import check_tokenizer, join_ranks, model_options
from megatron_ext.together import on_all_ranks, on_first_rank
from megatron_ext.training.state import restore_weights


def main() -> int:
    """Run the program; returns its exit code."""
    flags = parse_prune(sys.argv[1:], int(os.environ.get("WORLD_SIZE", "1")))
    source = checkpoint.read(flags.checkpoint.load, flags.checkpoint.ckpt_step)
    check_layout(source.arch, flags.parallel, seq_length=flags.batch.seq_length)
    check_targets(source.arch, flags.prune)
    if flags.checkpoint.save and checkpoint.find(flags.checkpoint.save):
        raise UserError(f"--save {flags.checkpoint.save}: a checkpoint is there already.", USAGE)
    place = join_ranks(flags, source.arch.num_layers)
    say(format_flags(flags))
    if flags.checkpoint.verify_integrity:
        checkpoint.verify_integrity(source.folder)
    plan = get_plan(flags, source, place)
    if flags.checkpoint.save:
        trim(source, plan, flags.checkpoint.save)
    say(summary(plan))
    platform.shut_down()
    return 0


def get_plan(flags: PruneFlags, source: Checkpoint, place: Platform) -> Plan:
    """Return the plan of --plan, or make one from scores and write it there. Collective."""
    path, options = flags.prune.plan, flags.prune
    target = target_arch(
        source.arch,
        hidden_size=options.target_hidden_size,
        ffn_hidden_size=options.target_ffn_hidden_size,
        num_attention_heads=options.target_num_attention_heads,
        num_layers=options.target_num_layers,
    )
    if _exists(path):
        plan = load_plan(path)
        check_plan(plan, source.arch)
        if target not in (source.arch, plan.target):
            raise UserError(
                f"--plan {path} leads to other sizes than the --target flags: remove the file to "
                "plan again, or the flags to use it.",
                USAGE,
            )
        return plan
    plan = make_plan(get_scores(flags, source, place), source.arch, target)
    if path:
        on_first_rank(lambda: save_plan(path, plan))
    return plan


def get_scores(flags: PruneFlags, source: Checkpoint, place: Platform) -> Scores:
    """Return the scores of --scores, or measure them and write them there. Collective."""
    path = flags.prune.scores
    if _exists(path):
        scores = load_scores(path)
        check_scores(scores, source.arch)
        return scores
    scores = Scores(
        vectors=measure(flags, source, place),
        source=source.arch,
        aggregation=AGGREGATION,
        samples=flags.prune.calibration_samples,
        seq_length=flags.batch.seq_length,
    )
    if path:
        on_first_rank(lambda: save_scores(path, scores))
    return scores


def measure(flags: PruneFlags, source: Checkpoint, place: Platform) -> dict[str, torch.Tensor]:
    """Return the scores of every axis from forward passes over the calibration samples."""
    num_samples, micro_batch_size = flags.prune.calibration_samples, flags.batch.micro_batch_size
    per_pass = micro_batch_size * place.groups.dp.size()
    if num_samples % per_pass:
        raise UserError(
            f"--calibration-samples {num_samples} is not a multiple of --micro-batch-size "
            f"{micro_batch_size} x {place.groups.dp.size()} data-parallel ranks.",
            USAGE,
        )
    tokenizer = data.build_tokenizer(flags.data)
    check_tokenizer(source, tokenizer.vocab_size, data.tokenizer_sha256(flags.data))
    options = model_options(flags, place, source.arch.num_layers)
    chunks = build_model(source.arch, options, place.groups)
    restore_weights(chunks, source)
    dataset, _, _ = data.build_datasets(
        flags.data,
        seq_length=flags.batch.seq_length,
        num_samples=(num_samples, 0, 0),
        tokenizer=tokenizer,
        seed=flags.batch.seed,
    )
    return calibrate(
        chunks,
        source.arch,
        dataset,
        place,
        num_samples=num_samples,
        micro_batch_size=micro_batch_size,
        seq_length=flags.batch.seq_length,
        num_workers=flags.data.num_workers,
    )


def _exists(path: str | None) -> bool:
    """Whether rank 0 finds the file: a late rank would already see what rank 0 writes next."""
    return on_first_rank(lambda: path is not None and Path(path).exists())


def trim(source: Checkpoint, plan: Plan, save: str) -> None:
    """Cut the weights of ``source`` and publish them as ``save``/release. Collective."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = on_all_ranks(lambda: trimmed_share(SliceReader(source.folder), plan, rank, world_size))
    args = Namespace(**{**source.args, **plan.target.to_args(), "consumed_train_samples": 0})
    checkpoint.save(
        save,
        checkpoint.RELEASE,
        {"model": share, "args": args, "checkpoint_version": 3.0, "iteration": 0},
        files={
            "plan.json": plan.to_json(),
            "megatron_args.sh": megatron_command_line(plan.target) + "\n",
        },
    )


def summary(plan: Plan) -> str:
    """Return a table of what was cut."""
    rows = [("", "source", "pruned", "kept")]
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        before, after = getattr(plan.source, name), getattr(plan.target, name)
        rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    for name, embeddings in (("parameters", True), ("without embeddings", False)):
        before, after = (
            num_parameters(arch, embeddings=embeddings) for arch in (plan.source, plan.target)
        )
        rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    return "\n".join(f"{a:24}{b:>18}{c:>18}{d:>8}" for a, b, c, d in rows)


def say(text: str) -> None:
    """Print on rank 0."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
