"""Megatron-LM's flags of evaluation, logging and profiling."""

from dataclasses import dataclass

from megatron_ext.cli.parser import flag


@dataclass(frozen=True, kw_only=True)
class Log:
    """Evaluation and logging."""

    log_interval: int = flag(100, "steps between log lines", at_least=1)
    eval_iters: int = flag(100, "batches of one evaluation; 0 = none", at_least=0)
    eval_interval: int | None = flag(None, "steps between evaluations; default none", at_least=1)
    log_params_norm: bool = flag(False, "log the L2 norm of all weights of the model")
    log_num_zeros_in_grad: bool = flag(False, "log how many entries of the gradient are zero")
    timing_log_level: int = flag(
        0,
        "what is timed with the GPU waiting: nothing, parts of a step, or every operation",
        choices=(0, 1, 2),
    )
    timing_log_option: str = flag(
        "minmax", "times over ranks that are printed", choices=("max", "minmax", "all")
    )
    barrier_with_l1_time: bool = flag(
        True,
        "no waiting for all ranks before each timed part",
        off="--no-barrier-with-level-1-timing",
    )
    log_timers_to_tensorboard: bool = flag(
        False, "log the longest times over ranks too; needs --timing-log-level 1 or 2"
    )
    logging_level: int | None = flag(
        None, "of Python's logging, e.g. 10 debug, 20 info, 40 errors; default 30", at_least=0
    )
    log_progress: bool = flag(
        False, "append starts and checkpoints, with tokens and FLOPs so far, to SAVE/progress.txt"
    )
    tensorboard_dir: str | None = flag(None, "folder of TensorBoard events; default none")
    tensorboard_queue_size: int = flag(1000, "events that wait before they are written", at_least=1)
    wandb_project: str | None = flag(None, "Weights & Biases project; default none")
    wandb_exp_name: str | None = flag(None, "name of the run there")
    wandb_entity: str | None = flag(None, "user or team there")
    wandb_save_dir: str | None = flag(None, "folder of its files; default --save")
    progress: bool = flag(False, "not in Megatron-LM; a progress bar with the time left")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Profiling."""

    profile: bool = flag(
        False, "profile steps: for nsys (--capture-range=cudaProfilerApi), or with torch"
    )
    profile_step_start: int = flag(10, "iteration after which it begins", at_least=0)
    profile_step_end: int = flag(12, "iteration after which it ends", at_least=1)
    profile_ranks: tuple[int, ...] = flag((), "ranks that are profiled; default 0")
    use_pytorch_profiler: bool = flag(
        False, "torch's profiler, a trace in --tensorboard-dir, instead of nsys"
    )
    pytorch_profiler_collect_shapes: bool = flag(False, "shapes of tensors, with torch's")
    pytorch_profiler_collect_callstack: bool = flag(False, "lines of code, with torch's")
