"""Keys of a config.json for what differs between layers, as fields of ``Arch``, and back. Pure.

Windows (``sliding_window`` counts a token itself, Megatron's ``window_size`` those before it) and
layers without rotary embeddings.
"""

from dataclasses import replace
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.arch.per_layer import switches, text
from megatron_ext.arch.sizes import MOST
from megatron_ext.convert.family import Family
from megatron_ext.convert.types import Config

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_sizes(family: Family, config: Config, num_layers: int, positions: int) -> dict[str, Any]:
    """Return the fields of what differs between layers.

    Args:
        family: of ``config``.
        config: with its family's defaults.
        num_layers: of the model.
        positions: longest sequence; a window that does not cut it is none.
    """
    if num_layers > MOST["num_layers"]:
        raise ValueError(f"num_hidden_layers {num_layers} is above {MOST['num_layers']}")
    rotates = _rotates(family, config, num_layers)
    sizes = {"no_rope_freq": None if all(rotates) else text([not on for on in rotates])}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    types = config.get("layer_types") or []
    if other := [kind for kind in types if kind not in (SLIDING, FULL)]:
        raise ValueError(f"layer_types has {other[0]}: only {SLIDING} and {FULL} are computed here")
    if window is None and SLIDING in types:
        raise ValueError(f"layer_types has {SLIDING}, and there is no sliding_window")
    if window is None or (window >= positions and not family.gemma):
        return sizes
    if window < 1:
        raise ValueError(f"sliding_window {window} is not above 0")
    cut = _cut_layers(family, config, rotates)
    if not any(cut):
        return sizes
    if not family.windows:
        raise ValueError(
            f"sliding_window {window} is shorter than max_position_embeddings {positions}, and "
            f"transformers ignores it in {family.model_type}"
        )
    sizes["window_size"] = f"{window - 1},0"
    sizes["window_attn_skip_freq"] = None if all(cut) else text(cut)
    return sizes


def _rotates(family: Family, config: Config, num_layers: int) -> list[bool]:
    if not family.no_rope_layers:
        return [True] * num_layers
    said, interval = config.get("no_rope_layers"), config["no_rope_layer_interval"]
    if interval < 1:
        raise ValueError(f"no_rope_layer_interval {interval} is not above 0")
    if said is None:
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(said) < num_layers:
        raise ValueError(f"no_rope_layers has {len(said)} entries for {num_layers} layers")
    return [bool(value) for value in said[:num_layers]]


def _cut_layers(family: Family, config: Config, rotates: list[bool]) -> list[bool]:
    """Return whether each layer has the window."""
    types, num_layers = config.get("layer_types"), len(rotates)
    if family.windows != "layers":
        if types and FULL in types:
            raise ValueError(
                f"layer_types has {FULL}: transformers cuts all layers of {family.model_type}"
            )
        return [True] * num_layers
    if types is not None:
        if len(types) != num_layers:
            raise ValueError(f"layer_types has {len(types)} entries for {num_layers} layers")
        return [kind == SLIDING for kind in types]
    if family.no_rope_layers:
        return [not on for on in rotates]
    if pattern := config.get("sliding_window_pattern"):
        return [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    first = config["max_window_layers"]
    return [layer >= first for layer in range(num_layers)]


def layer_config(arch: Arch, family: Family, config: Config, origin: Config) -> dict[str, Any]:
    """Return the keys of what differs between layers.

    Args:
        arch: its sizes.
        family: the model type to write.
        config: what is written so far, with the origin's keys of the same family.
        origin: the config of the model that it comes from, or an empty one.
    """
    found: dict[str, Any] = {}
    if family.no_rope_layers:
        off = switches(arch, "no_rope_freq") or [0] * arch.num_layers
        found["no_rope_layers"] = [1 - value for value in off]
    cut = [0] * arch.num_layers
    if arch.window is not None:
        cut = switches(arch, "window_attn_skip_freq") or [1] * arch.num_layers
        found["sliding_window"] = arch.window + 1
        if "use_sliding_window" in family.defaults:
            found["use_sliding_window"] = True
    elif "sliding_window" in family.defaults:
        found["sliding_window"] = config.get("sliding_window")
    if "layer_types" in config or (any(cut) and family.windows == "layers"):
        found["layer_types"] = [SLIDING if on else FULL for on in cut]
    if any(cut) and "max_window_layers" in family.defaults:
        found["max_window_layers"] = cut.index(1)
    # Layers below it have full attention: all that there are.
    elif config.get("max_window_layers", 0) == origin.get("num_hidden_layers"):
        found["max_window_layers"] = arch.num_layers
    return found


def comparable(arch: Arch) -> Arch:
    """Return ``arch`` without a window that cuts nothing."""
    cut = switches(arch, "window_attn_skip_freq") or [1]
    if arch.rotary_base_local is not None:  # a window changes the base where it cuts nothing too
        return arch
    if arch.window is None or arch.window + 1 >= arch.max_position_embeddings or not any(cut):
        return replace(arch, window_size=None, window_attn_skip_freq=None)
    return arch
