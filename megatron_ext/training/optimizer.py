"""Optimizer and schedule as megatron-core takes them, from the flags."""

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.cli.programs import TrainFlags


def optimizer_config(flags: TrainFlags, params_dtype: torch.dtype) -> OptimizerConfig:
    """Return the settings of the optimizer; ``params_dtype`` is that of the weights."""
    options = flags.optimizer
    return OptimizerConfig(
        optimizer=options.optimizer,
        lr=options.lr or 0.0,  # absent with --skip-train
        min_lr=options.min_lr,
        decoupled_lr=options.decoupled_lr,
        decoupled_min_lr=options.decoupled_min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        sgd_momentum=options.sgd_momentum,
        clip_grad=options.clip_grad,
        barrier_with_L1_time=flags.log.barrier_with_l1_time,
        log_num_zeros_in_grad=flags.log.log_num_zeros_in_grad,
        bf16=flags.precision.bf16,
        fp16=flags.precision.fp16,
        params_dtype=params_dtype,
        # Of parameters in FP8.
        fp8_recipe=flags.fp8.fp8_recipe if flags.fp8.fp8_param_gather else None,
        loss_scale=flags.precision.loss_scale,
        initial_loss_scale=flags.precision.initial_loss_scale,
        min_loss_scale=flags.precision.min_loss_scale,
        loss_scale_window=flags.precision.loss_scale_window,
        hysteresis=flags.precision.hysteresis,
        use_distributed_optimizer=flags.parallel.use_distributed_optimizer,
        overlap_param_gather=flags.parallel.overlap_param_gather,
    )


def make_schedule(flags: TrainFlags, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return the schedule of learning rate and weight decay; megatron-core counts it in samples."""
    options, batch_size = flags.optimizer, flags.batch.global_batch_size
    num_samples = flags.batch.train_samples or (flags.batch.train_iters or 1) * batch_size
    decay_samples = options.lr_decay_samples or (options.lr_decay_iters or 0) * batch_size
    decay_samples = decay_samples or num_samples
    warmup_samples = options.lr_warmup_samples or options.lr_warmup_iters * batch_size
    if options.lr_warmup_fraction is not None:
        warmup_samples = int(options.lr_warmup_fraction * decay_samples)
    has_incr = options.weight_decay_incr_style != "constant"
    start_wd, end_wd = options.start_weight_decay, options.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=options.lr_warmup_init,
        max_lr=options.lr or 0.0,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup_samples,
        lr_decay_steps=decay_samples,
        lr_decay_style=options.lr_decay_style,
        start_wd=start_wd if has_incr else options.weight_decay,
        end_wd=end_wd if has_incr else options.weight_decay,
        wd_incr_steps=num_samples,
        wd_incr_style=options.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=options.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=options.override_opt_param_scheduler,
        wsd_decay_steps=options.lr_wsd_decay_samples
        or (options.lr_wsd_decay_iters or 0) * batch_size
        or None,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
    )
