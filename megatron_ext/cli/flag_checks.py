"""Flags that may not go together. No file, no device and no checkpoint is looked at.

Each function yields one line per problem: the flags, their values, and the fix where it is not
obvious. ``refuse`` raises the first.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron_ext.cli import megatron_flags as group
from megatron_ext.cli import method_flags as own
from megatron_ext.cli.log_flags import Log, Profile
from megatron_ext.cli.parser import dashed
from megatron_ext.runtime.errors import USAGE, UserError

TOKENIZER_NEEDS = {
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "NullTokenizer": ("vocab_size",),
}

# Layers of the first and the last stage.
ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


def refuse(*problems: Iterable[str]) -> None:
    """Raise the first problem as a ``UserError`` with code ``USAGE``; return if there is none."""
    for several in problems:
        for problem in several:
            raise UserError(problem, USAGE)


def model_parallel_size(parallel: group.Parallel) -> int:
    """Return the number of ranks that hold one copy of the model and one sample."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def stages(layout: str) -> list[str]:
    """Expand a pipeline layout into its stages: ``E(t|)*2L`` gives ``["Et", "t", "L"]``."""
    layout = layout.replace(",", "")
    while match := re.search(r"(?:\(([^()]*)\)|([^()*]))\*(\d+)", layout):
        repeated = (match[1] or match[2] or "") * int(match[3])
        layout = layout[: match.start()] + repeated + layout[match.end() :]
    return layout.split("|")


def layout_of_stages(counts: Sequence[int]) -> str:
    """Return the pipeline layout of stages with so many layers: ``EtttL`` for one of three."""
    parts = ["t" * count for count in counts]
    return "|".join(["E" + parts[0], *parts[1:]]) + "L"


def layout_problems(parallel: group.Parallel, seq_length: int, world_size: int) -> Iterator[str]:
    """Sizes of the layout against the number of ranks and the samples."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if world_size % model_parallel_size(parallel):
        yield (
            f"{world_size} ranks are not a multiple of --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} x "
            f"--context-parallel-size {cp} = {model_parallel_size(parallel)}."
        )
    if parallel.expert_tensor_parallel_size not in (None, tp):
        yield (
            f"--expert-tensor-parallel-size {parallel.expert_tensor_parallel_size}: experts are "
            f"split as the other layers are, over --tensor-model-parallel-size {tp}; leave it out."
        )
    ep = parallel.expert_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    if world_size // (tp * pp) % ep:
        yield (
            f"--expert-model-parallel-size {ep} does not divide the {world_size // (tp * pp)} data "
            "and context parallel ranks."
        )
    if cp > 1 and seq_length % (2 * cp):
        yield (
            f"--seq-length {seq_length} is not a multiple of 2 x --context-parallel-size {cp}: "
            "each rank holds two pieces of a sample."
        )
    if parallel.sequence_parallel and (seq_length // cp) % tp:
        yield (
            f"--seq-length {seq_length} is not a multiple of --tensor-model-parallel-size {tp} x "
            f"--context-parallel-size {cp}, as --sequence-parallel needs."
        )


def virtual_stage_problems(parallel: group.Parallel) -> Iterator[str]:
    """The flags that cut the depth into pieces, and megatron-core's limits on them."""
    pp, layout = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_layout
    named = {
        "--num-layers-per-virtual-pipeline-stage": parallel.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": parallel.num_virtual_stages_per_pipeline_rank,
        "--pipeline-model-parallel-layout": layout,
    }
    ends = [dashed(name) for name in ENDS if getattr(parallel, name) is not None]
    given = [name for name, value in named.items() if value is not None] + ends[:1]
    if len(given) > 1:
        yield f"{' and '.join(given)} place layers in different ways: give one."
    if given and pp == 1:
        yield f"{given[0]} needs --pipeline-model-parallel-size above 1."
    if layout is not None:
        expanded = stages(layout)
        text = "".join(expanded)
        if len(expanded) % pp:
            yield (
                f"--pipeline-model-parallel-layout {layout} has {len(expanded)} stages, not a "
                f"multiple of --pipeline-model-parallel-size {pp}."
            )
        if not re.fullmatch("Et+L", text):
            yield (
                f"--pipeline-model-parallel-layout {layout}: write E (embedding), then t for each "
                "layer, then L (loss), with | between stages and x*n for n times x."
            )
    one_piece = (
        bool(ends)
        or parallel.num_virtual_stages_per_pipeline_rank == 1
        or (layout is not None and len(stages(layout)) == pp)
    )
    if given and not one_piece and pp == 2 and not parallel.overlap_p2p_comm:
        yield (
            "--no-overlap-p2p-communication with virtual stages and --pipeline-model-parallel-size "
            "2: gradients come out wrong in megatron-core 0.19.2. Leave it out."
        )
    overlapping = given and not one_piece and parallel.overlap_p2p_comm
    if parallel.overlap_p2p_communication_warmup_flush and not overlapping:
        yield (
            "--overlap-p2p-communication-warmup-flush needs virtual stages, e.g. "
            "--num-virtual-stages-per-pipeline-rank 2, and their overlap."
        )


def batch_problems(
    batch: group.TrainBatch, parallel: group.TrainParallel, data_parallel_size: int
) -> Iterator[str]:
    """The global batch against what one forward pass of all ranks takes; recomputation."""
    step = batch.micro_batch_size * data_parallel_size
    if batch.global_batch_size % step:
        yield (
            f"--global-batch-size {batch.global_batch_size} is not a multiple of "
            f"--micro-batch-size {batch.micro_batch_size} x {data_parallel_size} data-parallel "
            f"ranks = {step}."
        )
    pp = parallel.pipeline_model_parallel_size
    virtual = (
        parallel.num_layers_per_virtual_pipeline_stage
        or (parallel.num_virtual_stages_per_pipeline_rank or 1) > 1
        or len(stages(parallel.pipeline_model_parallel_layout or "")) > pp
    )
    if virtual and batch.global_batch_size // step % pp:
        yield (
            f"--global-batch-size {batch.global_batch_size} makes "
            f"{batch.global_batch_size // step} micro-batches; virtual stages need a multiple of "
            f"--pipeline-model-parallel-size {pp}."
        )
    details = (batch.recompute_method, batch.recompute_num_layers)
    if batch.recompute_granularity == "full" and None in details:
        yield "--recompute-granularity full needs --recompute-method and --recompute-num-layers."
    if batch.recompute_granularity != "full" and details != (None, None):
        yield "--recompute-method and --recompute-num-layers need --recompute-granularity full."
    if batch.recompute_modules and batch.recompute_granularity != "selective":
        yield "--recompute-modules needs --recompute-granularity selective."
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce."


def optimizer_problems(optimizer: group.Optimizer, parallel: group.TrainParallel) -> Iterator[str]:
    """Problems of the update rule."""
    if optimizer.optimizer == "sgd" and parallel.use_distributed_optimizer:
        yield "--use-distributed-optimizer shards Adam's state only, not --optimizer sgd."


def length_problems(batch: group.TrainBatch, optimizer: group.Optimizer) -> Iterator[str]:
    """A run in steps or in samples, not both."""
    o, in_samples = optimizer, batch.train_samples is not None
    of_steps = {
        "--train-iters": batch.train_iters is not None,
        "--lr-decay-iters": o.lr_decay_iters is not None,
        "--lr-warmup-iters": bool(o.lr_warmup_iters),
        "--lr-wsd-decay-iters": o.lr_wsd_decay_iters is not None,
    }
    of_samples = {
        "--lr-decay-samples": o.lr_decay_samples is not None,
        "--lr-warmup-samples": bool(o.lr_warmup_samples),
        "--lr-wsd-decay-samples": o.lr_wsd_decay_samples is not None,
    }
    for name, given in (of_steps if in_samples else of_samples).items():
        if given and in_samples:
            yield f"{name} counts steps and --train-samples samples: give both in samples."
        elif given:
            yield f"{name} needs --train-samples."
    if in_samples and batch.train_samples < batch.global_batch_size:
        yield (
            f"--train-samples {batch.train_samples} is less than one --global-batch-size, "
            f"{batch.global_batch_size}."
        )
    if batch.manual_gc_interval and not batch.manual_gc:
        yield f"--manual-gc-interval {batch.manual_gc_interval} needs --manual-gc."


def schedule_problems(optimizer: group.Optimizer, batch: group.TrainBatch) -> Iterator[str]:
    """Learning rate and weight decay over the steps."""
    o, train_iters = optimizer, batch.train_iters
    for name, value in (("--min-lr", o.min_lr), ("--lr-warmup-init", o.lr_warmup_init)):
        if value > o.lr:
            yield f"{name} {value} is larger than --lr {o.lr}."
    if o.decoupled_lr is None and o.decoupled_min_lr is not None:
        yield "--decoupled-min-lr needs --decoupled-lr."
    elif o.decoupled_lr is not None:
        name = "--min-lr" if o.decoupled_min_lr is None else "--decoupled-min-lr"
        lowest = o.min_lr if o.decoupled_min_lr is None else o.decoupled_min_lr
        if lowest > o.decoupled_lr:
            yield f"{name} {lowest} is larger than --decoupled-lr {o.decoupled_lr}."
    decay = o.lr_decay_iters or train_iters
    decay_flag = "--lr-decay-iters" if o.lr_decay_iters else "--train-iters"
    if o.lr_warmup_fraction is not None and (o.lr_warmup_iters or o.lr_warmup_samples):
        name = "--lr-warmup-iters" if o.lr_warmup_iters else "--lr-warmup-samples"
        yield f"--lr-warmup-fraction and {name} both set the warm-up: give one."
    if o.lr_warmup_samples >= (o.lr_decay_samples or train_iters * batch.global_batch_size):
        decay_name = "--lr-decay-samples" if o.lr_decay_samples else "--train-samples"
        yield f"--lr-warmup-samples {o.lr_warmup_samples} must be below {decay_name}."
    if o.lr_warmup_iters >= decay:
        yield f"--lr-warmup-iters {o.lr_warmup_iters} must be below {decay_flag} {decay}."
    wsd = (o.lr_wsd_decay_iters, o.lr_wsd_decay_samples)
    if (o.lr_decay_style == "WSD") != (wsd != (None, None)):
        yield "--lr-decay-style WSD and --lr-wsd-decay-iters need each other."
    if (o.lr_wsd_decay_iters or 0) > decay:
        yield f"--lr-wsd-decay-iters {o.lr_wsd_decay_iters} is above {decay_flag} {decay}."
    start, end = o.start_weight_decay, o.end_weight_decay
    if o.weight_decay_incr_style == "constant" and (start, end) != (None, None):
        yield (
            "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or "
            "cosine."
        )
    if o.weight_decay_incr_style != "constant":
        if start is None or end is None:
            yield (
                f"--weight-decay-incr-style {o.weight_decay_incr_style} needs --start-weight-decay "
                "and --end-weight-decay."
            )
        elif start > end:
            yield f"--start-weight-decay {start} is larger than --end-weight-decay {end}."
    if o.override_opt_param_scheduler and o.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict "
            "each other: give one."
        )


def precision_problems(precision: group.Precision) -> Iterator[str]:
    """One half precision at most."""
    if precision.bf16 and precision.fp16:
        yield "--bf16 and --fp16 contradict each other: give one."


def training_precision_problems(precision: group.TrainPrecision) -> Iterator[str]:
    """Flags of one precision under another."""
    if precision.loss_scale is not None and not precision.fp16:
        yield "--loss-scale needs --fp16."
    if precision.grad_reduce_in_bf16 and not precision.bf16:
        yield "--grad-reduce-in-bf16 needs --bf16."


def model_problems(sizes: Mapping[str, Any]) -> Iterator[str]:
    """Activations of the MLP."""
    if sizes.get("swiglu") and sizes.get("squared_relu"):
        yield "--swiglu and --squared-relu contradict each other: give one."


def checkpoint_problems(checkpoint: group.TrainCheckpoint, *, training: bool) -> Iterator[str]:
    """Problems of reading and writing."""
    c = checkpoint
    if training and c.save and c.save_interval is None:
        yield "--save needs --save-interval."
    if c.save_retain_interval and c.save_retain_interval % (c.save_interval or 1):
        yield (
            f"--save-retain-interval {c.save_retain_interval} is not a multiple of "
            f"--save-interval {c.save_interval}."
        )
    if c.finetune and c.pretrained_checkpoint:
        yield (
            "--finetune and --pretrained-checkpoint: the first begins anew from --load at every "
            "start, the second only where --load has no checkpoint yet; give one."
        )
    needs_load = {"--finetune": c.finetune, "--ckpt-step": c.ckpt_step is not None}
    for name, given in needs_load.items():
        if given and not c.load:
            yield f"{name} needs --load."


def distill_problems(distill: own.Distill, precision: group.Precision) -> Iterator[str]:
    """Distillation flags without a teacher, and settings of a loss that is not taken."""
    default = own.Distill()
    typed = {
        f.name for f in fields(distill) if getattr(distill, f.name) != getattr(default, f.name)
    }
    if distill.teacher_load is None and distill.kd_teacher_store is None and typed:
        yield f"{dashed(min(typed))} needs --teacher-load."
    if distill.kd_teacher_store is not None:
        for name in ("teacher_load", "kd_hidden_states", "kd_fused_output"):
            if name in typed:
                yield f"{dashed(name)} does not go with --kd-teacher-store: no teacher is loaded."
        if distill.kd_loss != "forward-kl":
            yield f"--kd-teacher-store needs --kd-loss forward-kl, not {distill.kd_loss}."
    if distill.kd_fused_output and precision.fp16:
        yield "--kd-fused-output makes gradients before fp16's loss scale is known: use --bf16."
    if distill.kd_top_k is not None and distill.kd_loss != "forward-kl":
        yield f"--kd-top-k {distill.kd_top_k} needs --kd-loss forward-kl, not {distill.kd_loss}."
    for name, needed, given in (
        ("kd_jsd_beta", "--kd-loss jsd", distill.kd_loss == "jsd"),
        (
            "kd_top_k_rest",
            "--kd-top-k",
            distill.kd_top_k is not None or distill.kd_teacher_store is not None,
        ),
        *(
            (name, "--kd-hidden-states", distill.kd_hidden_states is not None)
            for name in ("kd_hidden_loss", "kd_alpha", "kd_projection")
        ),
    ):
        if name in typed and not given:
            yield f"{dashed(name)} {getattr(distill, name)} needs {needed}."
    if distill.kd_alpha != "dynamic" and not _is_positive(distill.kd_alpha):
        yield f"--kd-alpha {distill.kd_alpha}: dynamic, or a number above 0."


def data_args_problems(data: group.Data) -> Iterator[str]:
    """A blend on the command line or in a file, not both."""
    pairs = {
        "data_args_path": data.data_path,
        "per_split_data_args_path": data.train_data_path
        or data.valid_data_path
        or data.test_data_path,
    }
    for name, typed in pairs.items():
        if getattr(data, name) is not None and typed:
            yield f"{dashed(name)} and the paths on the command line: give one of them."


def log_problems(log: Log, profile: Profile, checkpoint: group.TrainCheckpoint) -> Iterator[str]:
    """Flags of a logger or profiler that is not asked for, or without what it writes to."""
    if log.log_timers_to_tensorboard and not log.timing_log_level:
        yield "--log-timers-to-tensorboard needs --timing-log-level 1 or 2: nothing is timed at 0."
    if log.log_progress and not checkpoint.save:
        yield "--log-progress needs --save."
    if profile.use_pytorch_profiler and not log.tensorboard_dir:
        yield "--use-pytorch-profiler needs --tensorboard-dir."
    if profile.profile and profile.profile_step_end <= profile.profile_step_start:
        yield (
            f"--profile-step-end {profile.profile_step_end} must be above --profile-step-start "
            f"{profile.profile_step_start}."
        )
    for name in ("wandb_exp_name", "wandb_entity", "wandb_save_dir"):
        if getattr(log, name) is not None and log.wandb_project is None:
            yield f"{dashed(name)} {getattr(log, name)} needs --wandb-project."


def dry_run_problems(dry: Any) -> Iterator[str]:
    """Problems of a dry run's own flags; ``dry``: a ``method_flags.DryRun`` or the like."""
    for field in fields(dry):
        if not dry.dry_run and getattr(dry, field.name) != field.default:
            yield f"{dashed(field.name)} needs --dry-run."


def data_problems(data: group.Data, *, needed: bool = True) -> Iterator[str]:
    """Exactly one source (at most one where no data is ``needed``), and its tokenizer."""
    per_split = any((data.train_data_path, data.valid_data_path, data.test_data_path))
    sources = {
        "--mock-data": data.mock_data,
        "--data-path": bool(data.data_path),
        "--train-data-path (or --valid-, --test-data-path)": per_split,
    }
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) > 1:
        yield f"{' and '.join(given)}: give one source of data."
    if needed and not given:
        yield "no data: give --data-path or --mock-data."
    if data.split is not None and per_split:
        yield f"--split {data.split} divides --data-path; with one path per split leave it out."
    if data.split is not None and not _is_split(data.split):
        yield f"--split {data.split}: write up to three shares, not all 0, e.g. 969,30,1."
    absent = [
        name for name in TOKENIZER_NEEDS.get(data.tokenizer_type, ()) if not getattr(data, name)
    ]
    if absent:
        options = " and ".join(dashed(name) for name in absent)
        yield f"--tokenizer-type {data.tokenizer_type} needs {options}."


def prune_problems(checkpoint: group.Checkpoint, prune: own.Prune) -> Iterator[str]:
    """Something must be written, and not over the source; what needs activations."""
    lists = prune.targets is not None and prune.searches
    if not (checkpoint.save or prune.scores or prune.plan or lists):
        yield "nothing to write: give --save, --plan or --scores."
    if checkpoint.save == checkpoint.load:
        yield (
            f"--save {checkpoint.save} is also --load: the pruned model would stand among the "
            "source's iterations."
        )
    default = own.Prune()
    aggregation = [f"importance_{name}" for name in ("batch", "sequence", "neurons", "heads")]
    depth = ("depth_importance", "depth_block", "depth_rescore", "prune_iterations")
    for name in (*aggregation, *depth):
        value = getattr(prune, name)
        if prune.importance != "activation" and value != getattr(default, name):
            yield f"{dashed(name)} {value} needs --importance activation."
    yield from _search_problems(prune)
    typed = [f"target_{name}" for name, n in prune.target_sizes().items() if n is not None]
    file = f"--targets {prune.targets}"
    if prune.targets is None:
        file = f"--search-space {prune.search_space}"
    several = prune.targets is not None or prune.searches
    if several and typed:
        yield f"{file} and {dashed(typed[0])}: sizes stand in the file or here."
    if several and prune.prune_iterations > 1:
        yield (
            f"{file} and --prune-iterations {prune.prune_iterations}: several "
            "targets share one set of scores, iterations measure their own; give one target."
        )
    if prune.depth_rescore and not several and prune.target_num_layers is None:
        yield "--depth-rescore needs --target-num-layers: how many to remove."
    cuts_heads = prune.target_num_attention_heads is not None or several
    if prune.head_residual != "none" and not cuts_heads:
        yield f"--head-residual {prune.head_residual} needs --target-num-attention-heads."
    if prune.head_residual != "none" and prune.prune_iterations > 1:
        yield (
            f"--head-residual {prune.head_residual} and --prune-iterations "
            f"{prune.prune_iterations}: a head would be folded more than once; give one."
        )


def _search_problems(prune: own.Prune) -> Iterator[str]:
    if prune.searches and prune.search_space is None:
        typed = "--target-budget" if prune.target_params is None else "--target-params"
        yield (
            f"{typed} {prune.target_budget or f'{prune.target_params:g}'} needs --search-space: "
            f"a file with the values to try of each size, or {own.AUTO}."
        )
    needs = {
        "search_space": prune.searches,
        "target_tolerance": prune.searches,
        "budget_context": prune.target_budget is not None,
        "budget_batch": prune.target_budget is not None,
    }
    for name, is_used in needs.items():
        value = getattr(prune, name)
        if not is_used and value != getattr(own.Prune(), name):
            what = "--target-budget" if "budget" in name else "--target-params or --target-budget"
            yield f"{dashed(name)} {value} needs {what}."


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _is_split(text: str) -> bool:
    shares = [share.strip() for share in text.split(",")]
    numbers = all(re.fullmatch(r"\d+\.?\d*", share) for share in shares)
    return numbers and len(shares) <= 3 and sum(map(float, shares)) > 0
