"""Features of megatron-core that are not built here, by what saved args say of them."""

from collections.abc import Mapping
from typing import Any

# Saved args of features that are not built here: name -> values that mean "off", beside None. Most
# have no tensor of their own: a model without the feature would load and compute something else.
# A feature that gets built leaves this table, cli/refused_flags.py and has its name in
# checkpoint/foreign_args.py, so that no reader takes in a model without it.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (),
    "glu_linear_offset": (0.0,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (),
    "high_freq_factor": (4.0,),
    "is_hybrid_model": (False,),
    "linear_attention_freq": (),
    "low_freq_factor": (1.0,),
    "mtp_num_layers": (0,),
    "multi_latent_attention": (False,),
    "old_context_len": (8192,),
    "position_embedding_type": ("learned_absolute", "rope", "yarn", "none"),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "softmax_type": ("vanilla",),
    "use_mup": (False,),
}


def pattern_of(settings: Mapping[str, Any]) -> str | None:
    """Return the pattern in saved args or a configuration, under its name or its old one."""
    return settings.get("hybrid_layer_pattern") or settings.get("hybrid_override_pattern")


def check_supported(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if saved args or a configuration ask for what is not built here."""
    for name, allowed in UNSUPPORTED.items():
        value = settings.get(name)
        if name == "is_hybrid_model" and pattern_of(settings):
            continue
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value}, which is not computed here")
