"""Mamba 2 (arXiv:2405.21060), heads that each write and read a state: the sub-layer ``M``.

A head's x and its gate z have mamba_head_dim channels, its state mamba_state_dim for each of them.
What a token writes (B) and reads (C) is shared by all heads of a group: heads are cut within their
groups, channels alike in all heads (arXiv:2504.11409, section 3).

Named dims:
    mamba_inner   mamba_num_heads * mamba_head_dim         concatenated heads
    mamba_heads   mamba_num_heads
    mamba_states  mamba_num_groups * mamba_state_dim       B or C, group after group
    mamba_taps    positions that the convolution sees
    mamba_one     1                                        input channels of a depthwise convolution

On disk, in_proj is a tensor for each of its parts, as megatron-core writes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megatron_ext.arch.rows import Axis, Size, Weight, norm, one_row, repeated, size, sublayers

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch

NAME, SYMBOL = "mamba", "M"
EXPAND = 2
"""megatron-core's heads have so many times hidden_size channels together, if none are typed."""
TAPS = 4
"""megatron-core's convolution sees so many positions."""
CHUNK = 128
"""Positions that mamba_ssm's kernel, as megatron-core calls it, computes as one product."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of Mamba; each is a field of ``Arch``."""

    mamba_num_heads: int | None = size(
        None, "heads of Mamba; default 2 hidden-size / mamba-head-dim", at_least=1
    )
    """None for a model without Mamba, whose other mamba_ sizes are the defaults."""
    mamba_head_dim: int = size(64, "channels of a head of Mamba", at_least=1)
    mamba_num_groups: int = size(8, "groups of heads that share what is written", at_least=1)
    mamba_state_dim: int = size(128, "numbers in the state of each channel of a head", at_least=1)


def problems(arch: "Arch") -> Iterator[str]:
    """Yield how these sizes contradict each other."""
    heads, groups = arch.mamba_num_heads, arch.mamba_num_groups
    if NAME not in arch.kinds:
        for f in fields(Sizes):
            if getattr(arch, f.name) != f.default:
                flag = f.name.replace("_", "-")
                yield f"--{flag} needs an {SYMBOL} in --hybrid-layer-pattern."
    elif heads is None:
        yield f"hybrid_layer_pattern {arch.pattern}: an {SYMBOL} needs --mamba-num-heads."
    elif heads % groups:
        yield f"--mamba-num-heads {heads} is not a multiple of --mamba-num-groups {groups}."


def completed(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mamba_ sizes that saved or typed sizes stand for: none without Mamba."""
    defaults = {f.name: f.default for f in fields(Sizes)}
    if SYMBOL not in (sizes.get("hybrid_layer_pattern") or ""):
        return {}
    known = {name: sizes[name] for name in defaults if sizes.get(name) is not None}
    channels = EXPAND * sizes["hidden_size"]
    return {"mamba_num_heads": channels // (defaults | known)["mamba_head_dim"], **known}


def num_heads(arch: "Arch") -> int:
    """Return the heads of a model that has Mamba."""
    assert arch.mamba_num_heads is not None, arch.pattern
    return arch.mamba_num_heads


def dims(arch: "Arch") -> dict[str, int]:
    """Return the length of every named dim."""
    if arch.mamba_num_heads is None:
        return {}
    return {
        "mamba_inner": arch.mamba_num_heads * arch.mamba_head_dim,
        "mamba_heads": arch.mamba_num_heads,
        "mamba_states": arch.mamba_num_groups * arch.mamba_state_dim,
        "mamba_taps": TAPS,
        "mamba_one": 1,
    }


def weights(arch: "Arch", layer: str) -> list[Weight]:
    """Return the rows of the table; ``layer`` is what their names begin with."""
    mixer = f"{layer}mixer."

    def row(name: str, *dims: str, init: str = "normal") -> Weight:
        return Weight(f"{mixer}{name}", dims, init, NAME)

    convolved = {"x": "mamba_inner", "B": "mamba_states", "C": "mamba_states"}
    projected = {"z": "mamba_inner", **convolved, "dt": "mamba_heads"}
    return [
        *norm(arch, f"{mixer}in_proj.layer_norm_", kind=NAME),
        *(row(f"in_proj.weight.{part}", dim, "hidden") for part, dim in projected.items()),
        *(
            row(f"conv1d.weight.{part}", dim, "mamba_one", "mamba_taps", init="conv")
            for part, dim in convolved.items()
        ),
        *(row(f"conv1d.bias.{part}", dim, init="conv") for part, dim in convolved.items()),
        row("dt_bias", "mamba_heads", init="step"),
        row("A_log", "mamba_heads", init="decay"),
        row("D", "mamba_heads", init="ones"),
        row("norm.weight", "mamba_inner", init="ones"),
        row("out_proj.weight", "hidden", "mamba_inner", init="scaled"),
    ]


def multiply_adds(arch: "Arch", seq_length: int) -> int:
    """Return those of one token beside the weights'.

    States are written and read; within a chunk there are products as in attention, of all pairs of
    its positions, which mamba_ssm's kernel computes whole.
    """
    inner, chunk = num_heads(arch) * arch.mamba_head_dim, min(CHUNK, seq_length)
    shared = arch.mamba_num_groups * arch.mamba_state_dim
    return 2 * inner * arch.mamba_state_dim + chunk * (inner + shared)


def state_numel(arch: "Arch") -> int:
    """Return what a sub-layer remembers of a sequence: its heads' states, its last positions."""
    inner = num_heads(arch) * arch.mamba_head_dim
    convolved = inner + 2 * arch.mamba_num_groups * arch.mamba_state_dim
    return inner * arch.mamba_state_dim + TAPS * convolved


def _heads(arch: "Arch") -> list[Sequence[int]]:
    """Concatenated heads: mamba_head_dim positions of each."""
    return [repeated(range(num_heads(arch)), arch.mamba_head_dim)]


def _channels(arch: "Arch") -> list[Sequence[int]]:
    """The same channels of each head."""
    return [[*range(arch.mamba_head_dim)] * num_heads(arch)]


def _states(arch: "Arch") -> list[Sequence[int]]:
    """States of one group after another: of all its heads, or of a head that is a group."""
    heads, groups = num_heads(arch), arch.mamba_num_groups
    first = heads if groups < heads else 0
    return [repeated(range(first, first + groups), arch.mamba_state_dim)]


def _exists(arch: "Arch") -> bool:
    return NAME in arch.kinds


DEPTH = sublayers(NAME, "LS", "Mamba sub-layers")
CHANNELS = Axis(
    name="mamba_channels",
    kind=NAME,
    size=Size(
        name="mamba_head_dim",
        letter="SC",
        help="channels of each Mamba head, the same of all",
        rows=num_heads,
    ),
    dims={"mamba_inner": _channels},
    exists=_exists,
)
HEADS = Axis(
    name="mamba_heads",
    kind=NAME,
    size=Size(
        name="mamba_num_heads",
        letter="S",
        help="Mamba heads, the same number of each group",
        rows=one_row,
    ),
    within=Size(
        name="mamba_num_groups",
        letter="SG",
        help="groups of Mamba heads, removed as a whole",
        rows=lambda arch: arch.mamba_state_dim,
    ),
    across=CHANNELS,
    dims={
        "mamba_inner": _heads,
        "mamba_heads": lambda arch: [range(num_heads(arch))],
        "mamba_states": _states,
    },
    tp_split=True,
    exists=_exists,
)
# Heads first: they order the positions of both.
AXES = (HEADS, CHANNELS)
UNCUT = ("mamba_taps", "mamba_one")
