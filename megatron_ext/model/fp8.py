"""FP8 through Transformer Engine: its flags, the models that it can run, megatron-core's settings.

Student and teacher each have a format of their own. The teacher's scales are never those of delayed
scaling: Transformer Engine adapts them behind passes with gradients, and begins with 1. Pure
functions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.axes import axes_of
from megatron_ext.cli.parser import dashed, flag, option
from megatron_ext.runtime.errors import USAGE, UserError

# What every dim of a matrix product must be a multiple of, on each rank.
ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# Activations that Transformer Engine gathers over tensor-parallel ranks in blocks of 128.
GATHERED_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """FP8 (Transformer Engine)."""

    fp8_format: str | None = flag(
        None,
        "matrix products of the model in FP8: e4m3, or hybrid, whose gradients are e5m2; default "
        "none",
        choices=("e4m3", "hybrid"),
    )
    fp8_recipe: str = flag(
        "delayed",
        "where scales come from: earlier steps (delayed), each tensor (tensorwise), blocks of it "
        "(blockwise, mxfp8)",
        choices=tuple(ALIGNMENT),
    )
    fp8_margin: int = flag(0, "of delayed: halve scales this many times", at_least=0)
    fp8_amax_history_len: int = flag(1, "of delayed: steps that are remembered", at_least=1)
    fp8_amax_compute_algo: str = flag(
        "most_recent", "of delayed: which of them counts", choices=("most_recent", "max")
    )
    fp8_wgrad: bool = flag(
        True,
        "of delayed: weight gradients not in FP8",
        off="--no-fp8-wgrad",
        aliases=("--disable-fp8-wgrad",),
    )
    fp8_param_gather: bool = flag(
        False, "keep weights in FP8; needs the distributed optimizer and a checkpoint to begin with"
    )
    first_last_layers_bf16: bool = flag(False, "the first and last layers not in FP8")
    num_layers_at_start_in_bf16: int = flag(1, "of --first-last-layers-bf16", at_least=0)
    num_layers_at_end_in_bf16: int = flag(1, "of --first-last-layers-bf16", at_least=0)
    teacher_fp8_format: str | None = flag(
        None,
        "not in Megatron-LM; of the teacher's forward pass, with the recipe of the model, but "
        "tensorwise for delayed; default as the model",
        choices=("none", "e4m3", "hybrid"),
    )


def of_student(fp8: Fp8) -> dict[str, Any]:
    """Return megatron-core's settings of the model that is trained; empty without FP8."""
    if fp8.fp8_format is None:
        return {}
    names = [f.name for f in fields(fp8)]
    others = {"fp8_format", "fp8_param_gather", "teacher_fp8_format"}
    settings = {name: getattr(fp8, name) for name in names if name not in others}
    return settings | {"fp8": fp8.fp8_format, "fp8_param": fp8.fp8_param_gather}


def of_teacher(fp8: Fp8) -> dict[str, Any]:
    """Return megatron-core's settings of the teacher; empty without FP8."""
    kind = fp8.teacher_fp8_format or fp8.fp8_format
    recipe = "tensorwise" if fp8.fp8_recipe == "delayed" else fp8.fp8_recipe
    return of_student(
        replace(
            fp8,
            fp8_format=None if kind == "none" else kind,
            fp8_recipe=recipe,
            fp8_param_gather=False,
        )
    )


def problems(fp8: Fp8, *, bf16: bool, distributed: bool, has_teacher: bool) -> Iterator[str]:
    """Problems of flags that may not go together, a line each.

    Args:
        fp8: the flags.
        bf16: --bf16.
        distributed: --use-distributed-optimizer.
        has_teacher: a teacher is loaded.
    """
    if fp8.teacher_fp8_format is not None and not has_teacher:
        yield f"--teacher-fp8-format {fp8.teacher_fp8_format} needs --teacher-load."
    is_on = bool(of_student(fp8) or of_teacher(fp8))
    for field in fields(fp8):
        value = getattr(fp8, field.name)
        if not is_on and field.name != "teacher_fp8_format" and value != field.default:
            text = "" if isinstance(value, bool) else f" {value}"
            yield f"{option(field)}{text} needs --fp8-format."
    if fp8.fp8_format and fp8.first_last_layers_bf16 and fp8.fp8_recipe == "delayed":
        yield "--first-last-layers-bf16 needs another --fp8-recipe than delayed: tensorwise."
    if fp8.fp8_param_gather and not (fp8.fp8_format and bf16 and distributed):
        yield "--fp8-param-gather needs --fp8-format, --bf16 and --use-distributed-optimizer."
    if fp8.fp8_param_gather and fp8.fp8_recipe == "mxfp8":
        yield "--fp8-param-gather with --fp8-recipe mxfp8 is not supported; leave it out."


def check_models(
    fp8: Fp8, arch: Arch, teacher: Arch | None, parallel: Any, *, tokens: int, has_weights: bool
) -> None:
    """Refuse sizes that the matrix products of FP8 cannot take.

    Args:
        fp8: the flags.
        arch: the model that is trained.
        teacher: sizes of the teacher, if there is one.
        parallel: the flags of the layout.
        tokens: micro-batch size x sequence length.
        has_weights: the model begins with those of a checkpoint.

    Raises:
        UserError: with code ``USAGE``, naming the size and the nearest that fit.
    """
    if fp8.fp8_param_gather and not has_weights:
        raise UserError("--fp8-param-gather: new weights are not drawn in FP8; give --load.", USAGE)
    models = [("", arch, of_student(fp8))]
    if teacher is not None:
        models.append((" of the teacher", teacher, of_teacher(fp8)))
    for whose, each, settings in models:
        if settings:
            problem = next(_model_problems(settings, each, parallel, tokens, whose), None)
            if problem:
                raise UserError(problem, USAGE)


def _model_problems(
    settings: dict[str, Any], arch: Arch, parallel: Any, tokens: int, whose: str
) -> Iterator[str]:
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    align, split = ALIGNMENT[settings["fp8_recipe"]], tp if parallel.sequence_parallel else 1
    wide = align
    if split > 1 and settings["fp8_recipe"] == "blockwise":
        wide = GATHERED_BLOCK
    name = f"FP8 ({settings['fp8']}, {settings['fp8_recipe']})"
    if arch.is_bert:
        yield f"{name}: a BertModel has local layers here, which have no FP8; leave it out."
    for size, value, step in _steps(arch, tp, align, wide):
        if value % step:
            low = value // step * step
            nearest = f"{low} and {low + step}" if low else str(step)
            ranks = f" over {tp} tensor-parallel ranks" * (tp > 1)
            yield (
                f"{name}: {dashed(size)} {value}{whose} must be a multiple of {step}{ranks}; the "
                f"nearest are {nearest}."
            )
    if tokens % (wide * cp * split):
        yield (
            f"{name}: --micro-batch-size x --seq-length = {tokens} tokens must be a multiple of "
            f"{wide * cp * split} in this layout."
        )
    most = arch.num_layers // parallel.pipeline_model_parallel_size
    for size in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if settings["first_last_layers_bf16"] and settings[size] > most:
            yield f"{dashed(size)} {settings[size]}{whose}: a pipeline stage has {most} layers."


def _steps(arch: Arch, tp: int, align: int, wide: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name of a size, its value, what it must be a multiple of)."""
    for axis in axes_of(arch):
        step = align * tp if axis.tp_split else wide
        for size in axis.sizes:
            if size.rows is not None:
                multiple = step // math.gcd(step, size.rows(arch))
                for value in dict.fromkeys(arch.values(size.name)):
                    yield size.name, value, multiple


def keep_exact_weights(named_parameters: Iterator[tuple[str, Any]], loaded: dict[str, Any]) -> None:
    """Have the optimizer begin with the weights of a checkpoint, not with their FP8 rounding.

    Transformer Engine keeps what an FP8 parameter was made of until an optimizer takes it; that is
    what ``loaded`` (by the parameters' names) replaces.
    """
    for name, parameter in named_parameters:
        if hasattr(parameter, "get_high_precision_init_val"):
            parameter._high_precision_init_val = loaded[name].detach().cpu()


def fp8_settings(fp8: Fp8) -> dict[str, dict[str, Any]]:
    """Return the settings of models that are to run in FP8, by how they would be typed."""
    models = {"fp8_format": of_student(fp8), "teacher_fp8_format": of_teacher(fp8)}
    return {f"{dashed(name)} {found['fp8']}": found for name, found in models.items() if found}


def check_fp8_layers(fp8: Fp8, transformer_impl: str) -> None:
    """Refuse FP8 without Transformer Engine's layers."""
    for typed in fp8_settings(fp8):
        if transformer_impl != "transformer_engine":
            raise UserError(
                f"{typed} needs a GPU with Transformer Engine installed, and --transformer-impl "
                "transformer_engine.",
                USAGE,
            )
