"""The model's sizes on the command line: what was typed, a checkpoint's sizes, a new model's."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, fields, make_dataclass, replace
from typing import Any

from megatron_ext.arch import Arch, is_gelu, per_layer, rotary
from megatron_ext.arch.mamba import completed
from megatron_ext.arch.sizes import canonical
from megatron_ext.cli.parser import dashed, flag, option
from megatron_ext.runtime.errors import CHECKPOINT, USAGE, UserError, warn

# Words of the command line that are no size: what sizes follow from.
OWN = {
    "group_query_attention": flag(False, "share keys and values between query heads"),
    "make_vocab_size_divisible_by": flag(
        128,
        "pad a new vocabulary to a multiple of this (whatever the layout)",
        at_least=1,
        shorthands={"--no-pad-vocab-size": 1, "--disable-pad-vocab-size": 1},
    ),
}


def _size_flags() -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and field of a flag for each size of ``Arch`` that is declared as one."""
    for f in fields(Arch):
        if "flag" in f.metadata:
            declared = f.metadata["flag"]
            optional = declared["default"] is None
            yield f.name, f.type | None if optional else f.type, flag(**declared)
    for name, own in OWN.items():
        yield name, type(own.default), own


Sizes = make_dataclass("Sizes", list(_size_flags()), frozen=True, kw_only=True)
Sizes.__doc__ = "Model sizes, as in the checkpoint where not typed; defaults for a new model."


REQUIRED_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
)
# Free to change after the checkpoint: they matter in training only.
FREE = (
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
)
NOT_COMPARED = (*FREE, "make_vocab_size_divisible_by")


def missing_sizes(sizes: Mapping[str, Any]) -> list[str]:
    """Return the options that a new model needs and that were not typed."""
    typed = {*sizes, *({"num_layers"} if "hybrid_layer_pattern" in sizes else ())}
    return [dashed(name) for name in REQUIRED_SIZES if name not in typed]


def new_arch(sizes: Mapping[str, Any], vocab_size: int) -> Arch:
    """Return the architecture of a new model, with Megatron-LM's defaults for what is not typed.

    Args:
        sizes: the typed sizes, by the names of ``Sizes``.
        vocab_size: tokens that the tokenizer knows.

    Raises:
        UserError: a size that has no default is missing, or sizes contradict each other.
    """
    if missing := missing_sizes(sizes):
        raise UserError(f"a new model needs {', '.join(missing)}.", USAGE)
    values = asdict(Sizes(**sizes))
    if values["num_layers"] is None:
        values["num_layers"] = len(values["hybrid_layer_pattern"])
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values["kv_channels"] is None:
        if hidden % heads:
            raise UserError(
                f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}: "
                "change one or give --kv-channels.",
                USAGE,
            )
        values["kv_channels"] = hidden // heads
    if values["ffn_hidden_size"] is None:
        # The gated MLP has a third matrix; 2/3 of the width keeps the number of parameters.
        values["ffn_hidden_size"] = (
            int(4 * hidden * 2 / 3 / 64) * 64 if values["swiglu"] else 4 * hidden
        )
        if values["ffn_hidden_size"] == 0 < hidden:
            raise UserError(
                f"--hidden-size {hidden} with --swiglu: the default of --ffn-hidden-size, 8/3 of "
                "it down to a multiple of 64, is 0: give --ffn-hidden-size.",
                USAGE,
            )
    if values["num_experts"] is not None and values["moe_ffn_hidden_size"] is None:
        values["moe_ffn_hidden_size"] = values["ffn_hidden_size"]
    values |= completed(values)
    values["bias_gelu_fusion"] &= is_gelu(values) and values["add_bias_linear"]
    if not values.pop("group_query_attention"):
        values["num_query_groups"] = heads
    # Megatron-LM pads to a multiple of this times TP. Sizes must not depend on the layout.
    multiple = values.pop("make_vocab_size_divisible_by")
    values["padded_vocab_size"] = (
        values["padded_vocab_size"] or -(-vocab_size // multiple) * multiple
    )
    with _refused():
        return Arch(vocab_size=vocab_size, **canonical(values, values["num_layers"]))


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Turn what ``Arch`` refuses into a ``UserError``."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), USAGE) from None


def check_against_checkpoint(sizes: Mapping[str, Any], arch: Arch) -> Arch:
    """Return the checkpoint's ``arch`` with what is typed of training alone (``FREE``).

    Raises:
        UserError: a typed size contradicts the checkpoint, all of them in one table; or load
            balancing is typed for a model without experts.
    """
    # What is typed is of all layers: it contradicts a size in which they differ.
    saved = arch.to_args() | _as_typed(arch) | {n: arch.span(n) for n, _ in arch.by_layer}
    with _refused():
        sizes = canonical(sizes, arch.num_layers)
    skip = set(NOT_COMPARED)
    if "num_query_groups" in sizes:
        # One group per head, typed as groups, is the same model as one without groups.
        skip.add("group_query_attention")
    rows = [
        (option(f), _shown(f, saved[f.name]), _shown(f, sizes[f.name]))
        for f in fields(Sizes)
        if f.name in sizes and f.name not in skip and sizes[f.name] != saved[f.name]
    ]
    if rows:
        rows = [("flag", "checkpoint", "command line"), *rows]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        table = [f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
        head = "the checkpoint has other sizes; drop these flags to use the checkpoint's:"
        raise UserError("\n".join([head, *table]), CHECKPOINT)
    with _refused():
        return replace(arch, **{name: sizes[name] for name in FREE if name in sizes})


def check_source(sizes: Mapping[str, Any], arch: Arch) -> None:
    """Check that the checkpoint to be pruned, ``arch``, has the typed sizes.

    What is of training alone may differ: the checkpoint's stays, with a warning.

    Raises:
        UserError: as ``check_against_checkpoint``.
    """
    check_against_checkpoint(sizes, arch)
    for name in FREE:
        if sizes.get(name, getattr(arch, name)) != getattr(arch, name):
            warn(
                f"{dashed(name)} {sizes[name]}: pruning keeps the checkpoint's "
                f"{getattr(arch, name)}, which matters in training only."
            )


def args_of_sizes(sizes: Mapping[str, Any], embedding_rows: int) -> dict[str, Any]:
    """Return what a checkpoint without args would have saved: the typed sizes.

    Args:
        sizes: by the names of ``Sizes``.
        embedding_rows: of its word embeddings, the padded vocabulary; how many stand for tokens is
            not known.

    Raises:
        UserError: as ``new_arch``.
    """
    arch = new_arch({"padded_vocab_size": embedding_rows, **sizes}, embedding_rows)
    return {**arch.to_args(), "tokenizer_type": None}


def megatron_command_line(arch: Arch) -> str:
    """Return the flags that tell Megatron-LM this architecture, in one line."""
    values = arch.to_args() | _as_typed(arch)
    values["make_vocab_size_divisible_by"] = vocab_multiple(arch)
    words = []
    for field in fields(Sizes):
        value = values[field.name]
        if field.name == "padded_vocab_size":
            continue  # follows, and Megatron-LM before 0.19 has no such flag
        if value is None or (field.name.startswith("moe_") and arch.num_experts is None):
            continue
        if field.name.startswith("mamba_") and not arch.mamba_layers:
            continue
        if field.name == "num_layers" and arch.is_hybrid:
            continue
        if field.name in rotary.YARN and arch.position_embedding_type != "yarn":
            continue  # Megatron-LM before 0.19 has none of these flags
        if field.name == "bias_gelu_fusion" and not is_gelu(values):
            continue
        if isinstance(field.default, bool):
            words += [option(field)] * (value != field.default)
        elif field.name != "num_query_groups" or values["group_query_attention"]:
            words += [option(field), str(value)]
    return shlex.join(words)


def _as_typed(arch: Arch) -> dict[str, Any]:
    """Return the sizes that are typed otherwise than they are saved."""
    return {name: getattr(arch, name) for name in ("window_size", *per_layer.NAMES)}


def megatron_args(arch: Arch) -> dict[str, str]:
    """Return the file beside a checkpoint that tells Megatron-LM its architecture, by name.

    None of a model whose layers differ in size: Megatron-LM has no flags for it.
    """
    return {} if arch.by_layer else {"megatron_args.sh": megatron_command_line(arch) + "\n"}


def vocab_multiple(arch: Arch) -> int:
    """Return the smallest multiple to which padding gives ``arch.padded_vocab_size``.

    The smallest, because Megatron-LM multiplies it by TP: the padded size stays the same as long as
    TP times it divides that size and no smaller padding does.
    """
    padded, padding = arch.padded_vocab_size, arch.padded_vocab_size - arch.vocab_size
    return next(d for d in range(padding + 1, padded + 1) if padded % d == 0)


def _shown(field: Field, value: Any) -> str:
    """Return ``value`` as the user would type it; a switch as on or off."""
    if isinstance(field.default, bool):
        return "off" if value == field.default else "on"
    return str(value)
