"""A mixture of experts, each an MLP, and experts that compute every token: the sub-layer ``E``.

Named dims:
    experts                 num_experts
    moe_ffn, moe_fc1        as an MLP's ffn and fc1, of one expert
    shared_ffn, shared_fc1  the same of the shared experts together
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megatron_ext.arch.rows import (
    Axis,
    Size,
    Weight,
    gate_and_up,
    norm,
    one_each,
    one_row,
    size,
    sublayers,
)

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch

NAME, SYMBOL = "moe", "E"
# Load-balancing losses: over a micro-batch, over each sample, none. megatron-core's third, over the
# global batch, depends on the order of micro-batches and so on the layout.
LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "none")
# What saved args may say of experts beside the fields below: name, the only value taken.
SUPPORTED = {
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_gate": False,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_router_force_biased": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a mixture; each is a field of ``Arch``."""

    num_experts: int | None = size(
        None, "experts of every layer's MLP; default a plain MLP", at_least=1
    )
    """None for a model without mixtures, which has none of the moe_ sizes."""
    moe_router_topk: int = size(2, "experts that compute a token", at_least=1)
    moe_ffn_hidden_size: int | None = size(
        None, "neurons of an expert; default ffn-hidden-size", at_least=1
    )
    moe_shared_expert_intermediate_size: int | None = size(
        None, "neurons of all shared experts together, which compute every token", at_least=1
    )
    moe_router_pre_softmax: bool = size(
        False, "softmax over all experts instead of the chosen ones"
    )
    moe_router_load_balancing_type: str = size(
        "aux_loss", "load-balancing loss over a micro-batch or each sample", choices=LOAD_BALANCING
    )
    """Over what the loss that evens out the experts' load is taken."""
    moe_aux_loss_coeff: float = size(0.0, "weight of the load-balancing loss", at_least=0)


def problems(arch: "Arch") -> Iterator[str]:
    """Yield how these sizes contradict each other."""
    experts, topk = arch.num_experts, arch.moe_router_topk
    if experts is None:
        for f in fields(Sizes):
            if getattr(arch, f.name) != f.default:
                yield f"--{f.name.replace('_', '-')} needs --num-experts."
        return
    if arch.moe_ffn_hidden_size is None:
        yield "--num-experts needs --moe-ffn-hidden-size."
    if arch.moe_router_load_balancing_type not in LOAD_BALANCING:
        yield (
            f"--moe-router-load-balancing-type {arch.moe_router_load_balancing_type}: only "
            f"{', '.join(LOAD_BALANCING)}."
        )
    if topk > experts:
        yield f"--moe-router-topk {topk} is more than --num-experts {experts}."
    if topk == 1 and not arch.moe_router_pre_softmax:
        yield "--moe-router-topk 1 needs --moe-router-pre-softmax: one score alone is always 1."
    if arch.add_bias_linear:
        yield "--num-experts needs --disable-bias-linear: experts have no biases here."


def from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that saved args write in a way of their own."""
    for name, only in SUPPORTED.items():
        value = args.get(name)
        values = value if isinstance(value, list) else [value]
        if any(value not in (None, only) for value in values):
            raise ValueError(f"{name} is {value}; only {only} is supported")
    known = {"moe_ffn_hidden_size": args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"]}
    # Megatron-LM takes several losses at once: a list, even of one.
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        if isinstance(value := args.get(name), list):
            if len(value) > 1:
                raise ValueError(f"{name} is {value}; only one loss is supported")
            known[name] = value[0]
    return known


def dims(arch: "Arch") -> dict[str, int]:
    """Return the length of every named dim."""
    gates, ffn = 1 + arch.is_gated, arch.moe_ffn_hidden_size
    if arch.num_experts is None or ffn is None:
        return {}
    sizes = {"experts": arch.num_experts, "moe_ffn": ffn, "moe_fc1": ffn * gates}
    shared = arch.moe_shared_expert_intermediate_size
    return sizes | ({"shared_ffn": shared, "shared_fc1": shared * gates} if shared else {})


def weights(arch: "Arch", layer: str) -> list[Weight]:
    """Return the rows of the table; ``layer`` is what their names begin with."""

    def matrix(name: str, *dims: str, init: str = "normal") -> Weight:
        return Weight(f"{layer}mlp.{name}.weight", dims, init, NAME)

    rows = [
        *norm(arch, f"{layer}pre_mlp_layernorm.", kind=NAME),
        matrix("router", "experts", "hidden"),
        matrix("experts.experts.linear_fc1", "experts", "moe_fc1", "hidden"),
        matrix("experts.experts.linear_fc2", "experts", "hidden", "moe_ffn", init="scaled"),
    ]
    if has_shared_experts(arch):
        rows += [
            matrix("shared_experts.linear_fc1", "shared_fc1", "hidden"),
            matrix("shared_experts.linear_fc2", "hidden", "shared_ffn", init="scaled"),
        ]
    return rows


def multiply_adds(arch: "Arch", seq_length: int) -> int:
    """Return one token's multiply-adds outside of weight matrices."""
    return 0


def is_moe(arch: "Arch") -> bool:
    """Whether layers have experts instead of one MLP."""
    return NAME in arch.kinds


def has_shared_experts(arch: "Arch") -> bool:
    """Whether some experts compute every token."""
    return is_moe(arch) and arch.moe_shared_expert_intermediate_size is not None


DEPTH = sublayers(NAME, "LE", "mixtures of experts")
AXES = (
    Axis(
        name="experts",
        kind=NAME,
        size=Size(name="num_experts", letter="E", help="experts of each layer"),
        dims={"experts": one_each("num_experts")},
        exists=is_moe,
    ),
    Axis(
        name="moe_ffn",
        kind=NAME,
        scope="expert",
        size=Size(
            name="moe_ffn_hidden_size", letter="EF", help="neurons of each expert", rows=one_row
        ),
        dims={
            "moe_ffn": one_each("moe_ffn_hidden_size"),
            "moe_fc1": gate_and_up("moe_ffn_hidden_size"),
        },
        tp_split=True,
        exists=is_moe,
    ),
    Axis(
        name="shared_ffn",
        kind=NAME,
        size=Size(
            name="moe_shared_expert_intermediate_size",
            letter="SF",
            help="neurons of the shared experts",
            rows=one_row,
        ),
        dims={
            "shared_ffn": one_each("moe_shared_expert_intermediate_size"),
            "shared_fc1": gate_and_up("moe_shared_expert_intermediate_size"),
        },
        tp_split=True,
        exists=has_shared_experts,
    ),
)
UNCUT = ()
