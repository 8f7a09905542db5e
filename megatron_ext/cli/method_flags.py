"""Flags that Megatron-LM does not have, in groups: the method's, dry runs."""

from argparse import ArgumentTypeError
from dataclasses import dataclass, make_dataclass
from typing import Any

from megatron_ext.arch.axes import SIZES
from megatron_ext.arch.rows import Size, read_values
from megatron_ext.cli.parser import flag
from megatron_ext.runtime.gpus import GPUS


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distillation (not in Megatron-LM)."""

    teacher_load: str | None = flag(
        None,
        "folder of the teacher's checkpoint; default no teacher",
        aliases=("--export-kd-teacher-load",),
    )
    kd_teacher_store: str | None = flag(
        None,
        "folder of tools/store_teacher.py in place of a teacher: forward KL over the stored tokens",
    )
    export_kd_cfg: str | None = flag(
        None, "Model Optimizer's YAML file of distillation settings; typed flags win over it"
    )
    kd_loss: str = flag(
        "forward-kl",
        "between the distributions of teacher and student over the vocabulary",
        choices=("forward-kl", "reverse-kl", "jsd", "mse", "cosine"),
    )
    kd_loss_weight: float = flag(1.0, "weight of the distillation loss", above=0)
    kd_temperature: float = flag(1.0, "softmax temperature of teacher and student", above=0)
    kd_temperature_squared: bool = flag(
        False,
        "multiply the loss by temperature^2, which keeps its gradient's size; off as in paper",
    )
    kd_jsd_beta: float = flag(
        0.5, "of jsd: weight of the teacher, near 0 forward KL, near 1 reverse KL", above=0, below=1
    )
    kd_top_k: int | None = flag(
        None, "forward KL over the teacher's K likeliest tokens only; default all", at_least=1
    )
    kd_top_k_rest: str = flag(
        "drop",
        "the other tokens: left out, both distributions renormalised, or one bucket more",
        choices=("drop", "tail"),
    )
    kd_lm_loss_weight: float = flag(
        0.0, "weight of the language-model loss beside it; 0 leaves it out", at_least=0
    )
    kd_fused_output: bool = flag(
        False,
        "compute logits, losses and their gradients in chunks of positions: never all logits in "
        "memory",
    )
    kd_hidden_states: str | None = flag(
        None,
        "states to compare too, teacher:student with layers from 0 or last, e.g. "
        "29:last,embedding,mlp:29:13,attention:29:13 (outputs of layers, of the embedding, inputs "
        "of MLPs, outputs of attention)",
    )
    kd_hidden_loss: str = flag(
        "cosine", "between hidden states, normalised", choices=("cosine", "mse")
    )
    kd_alpha: str = flag(
        "dynamic",
        "weight of the hidden-state losses, summed over pairs: a number above 0, or dynamic: "
        "distillation loss / hidden loss of the step before",
    )
    kd_projection: str = flag(
        "shared",
        "trained map from the student's width to the teacher's: one for all pairs or one for each",
        choices=("shared", "per-pair"),
    )


# --search-space that is no file.
AUTO = "auto"


def size_or_sizes(text: str) -> int | tuple[int, ...]:
    """Return a target size that may differ from layer to layer, for ``argparse``."""
    try:
        return read_values(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def _target(size: Size) -> tuple[str, Any, Any]:
    """Return name, type and default of the flag of one size."""
    if not size.by_layer:
        help = f"{size.help}; default as the source"
        return f"target_{size.name}", int | None, flag(None, help, at_least=1)
    help = (
        f"{size.help}; or one value for each layer that stays, first to last, as 64,2x48,64 (2x48: "
        "twice), which makes it a model of sub-layers; default as the source"
    )
    hint = int | tuple[int, ...] | None
    return f"target_{size.name}", hint, flag(None, help, read=size_or_sizes, at_least=1)


# --target-hidden-size N, ...: a flag for each size that pruning changes, None as in the source.
Targets = make_dataclass(
    "Targets",
    [_target(size) for size in SIZES.values()],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class Prune(Targets):
    """Pruning (not in Megatron-LM)."""

    def target_sizes(self) -> dict[str, int | tuple[int, ...] | None]:
        """Return what the --target- flags say, by the names of the sizes."""
        return {name: getattr(self, f"target_{name}") for name in SIZES}

    targets: str | None = flag(
        None,
        "YAML file with several targets for one set of scores, name: {hidden_size: N, ...}, lists "
        "for layers that differ; each is saved to SAVE/name, its plan to PLAN/name.json; with a "
        "search it is read if it exists and written otherwise",
    )
    target_params: float | None = flag(
        None,
        "every model of --search-space with about so many parameters, embeddings included, is a "
        "target, as in --targets; e.g. 4e9",
        above=0,
    )
    target_budget: str | None = flag(
        None,
        "every model of --search-space that exceeds none of these limits and reaches one is a "
        "target: params, non-embedding, active (parameters of a token), weight-bytes, kv-bytes (at "
        "--budget-context and --budget-batch), flops (of a token there); numbers with K, M, B, "
        "MiB, GiB, or x for shares of the source; e.g. non-embedding=0.5x,kv-bytes=2GiB",
    )
    budget_context: int | None = flag(
        None, "tokens of a sequence in --target-budget; default --seq-length", at_least=1
    )
    budget_batch: int = flag(1, "sequences at a time in --target-budget", at_least=1)
    target_tolerance: float = flag(
        0.05,
        "how far from --target-params, or below a limit of --target-budget, as a share of it",
        at_least=0,
        below=1,
    )
    search_space: str | None = flag(
        None,
        "YAML file with the values to try of each size, hidden_size: [2560, 3072]; neurons also as "
        "multiples of hidden_size, ffn_hidden_size: [2.5x, 3x]; auto: layers and widths from all "
        "to half of the source's, heads as they are",
    )
    calibration_samples: int = flag(1024, "samples that the scores are measured on", at_least=1)
    importance: str = flag(
        "activation",
        "what scores units: activations, or without any data the weights' L2 norm or chance (of "
        "--seed)",
        choices=("activation", "magnitude", "random"),
    )
    importance_batch: str = flag(
        "l2", "activations of a unit over samples", choices=("mean", "l2", "var")
    )
    importance_sequence: str = flag(
        "mean", "over the positions of a sample, before that", choices=("mean", "l2", "var")
    )
    importance_neurons: str = flag(
        "post", "neurons after the activation function or before it", choices=("post", "pre")
    )
    importance_heads: str = flag(
        "norm-first",
        "L2 norm of a head's output per token, or of its aggregated channels",
        choices=("norm-first", "aggregate-first"),
    )
    depth_importance: str = flag(
        "block",
        "how layers are scored: block importance in the same passes as the rest, or the loss or KL "
        "of the model without a layer, a pass for each layer",
        choices=("block", "loss", "kl"),
    )
    depth_block: int = flag(1, "contiguous layers that are scored and removed together", at_least=1)
    depth_rescore: bool = flag(
        False, "remove one layer (or block) at a time and score the rest again each time"
    )
    prune_iterations: int = flag(
        1, "steps to the target widths, scored in between; 1 = one-shot", at_least=1
    )
    head_residual: str = flag(
        "none",
        "fold each pruned head into a kept one: 2 kept - pruned (paper), or pruned (laco)",
        choices=("none", "paper", "laco"),
    )
    scores: str | None = flag(None, "scores file: read if it exists, written otherwise")
    plan: str | None = flag(None, "plan file: read if it exists, written otherwise")

    @property
    def searches(self) -> bool:
        """Whether targets are looked for in a search space."""
        return self.target_params is not None or self.target_budget is not None


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Dry run (not in Megatron-LM)."""

    dry_run: bool = flag(
        False,
        "check flags, sizes, layout and data, estimate memory and time, print them and OK; no "
        "weights, ranks or GPU",
    )
    world_size: int | None = flag(
        None,
        "of --dry-run: ranks of the run; default WORLD_SIZE of the environment, or 1",
        at_least=1,
    )
    load_config: str | None = flag(
        None,
        "of --dry-run: Hugging Face config.json of --load, where no checkpoint is there yet, or of "
        "the model it was pruned from, with the sizes that differ typed",
    )
    gpu: str = flag("H100", "of --dry-run: of every rank", choices=tuple(GPUS))
    mfu: float = flag(
        0.4, "of --dry-run: share of the GPU's peak reached while it computes", above=0, at_most=1
    )

    # Not of the run: not printed or saved with its flags.
    about_run = False


@dataclass(frozen=True, kw_only=True)
class TrainDryRun(DryRun):
    """Dry run (not in Megatron-LM)."""

    teacher_config: str | None = flag(
        None, "of --dry-run: config.json of --teacher-load, where no checkpoint is there yet"
    )
