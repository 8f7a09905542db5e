"""A checkpoint of whole layers as megatron-core's GPTModel or HybridModel has it: other names.

    GPTModel                                   HybridModel
    decoder.layers.self_attention... [L, ...]  decoder.layers.0.self_attention..., 2., 4., ...
    decoder.layers.mlp...            [L, ...]  decoder.layers.1.mlp..., 3., 5., ...
    decoder.final_layernorm...                 decoder.final_norm...

Both compute the same. Weights go over; the state of an optimizer does not.
"""

from dataclasses import replace

from megatron_ext.arch import Arch
from megatron_ext.checkpoint.folder import Checkpoint
from megatron_ext.pruning.plan import Plan, load_plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.trim import write_trimmed


def write_form(source: Checkpoint, target: Arch, save: str) -> None:
    """Publish the weights of ``source`` as ``save``/release. Collective.

    A rank holds its share of the weights.

    Args:
        source: the checkpoint.
        target: its model in the form to write, see ``options.in_form``.
        save: folder above the new checkpoint.

    Raises:
        UserError: on every rank; a file is damaged, nothing can be written.
    """
    everything = make_plan(None, source.arch, target)
    write_trimmed(source, everything, save, record=_plan_beside(source, target))


def _plan_beside(source: Checkpoint, target: Arch) -> Plan | None:
    """Return the plan that ``source`` was pruned with, if it was, as that of ``target``."""
    path = source.folder / "plan.json"
    if not path.exists():
        return None
    plan = load_plan(path)
    kept = dict(plan.kept)
    if target.is_hybrid and "layers" in kept:
        kept |= dict.fromkeys(target.kinds, kept.pop("layers"))
    return replace(plan, target=target, kept=kept)
