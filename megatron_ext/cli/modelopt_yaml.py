"""Model Optimizer's distillation file, --export-kd-cfg, read as flags of this project.

    logit_layers: [output_layer, output_layer]
    intermediate_layer_pairs: [[decoder.layers.13, decoder.layers.29, cosine]]    student first
    skip_lm_loss: true
    kd_loss_scale: 1.0
    logit_kl_temperature: 1.0
    logit_kl_topk: null

(nvidia-modelopt 0.47.0, Megatron plugin.) Every key is mapped or refused by name. A layer's name
stands for what comes out of it; what comes out of a norm is compared before the norm's weights, as
all states here.
"""

import os
import re
from pathlib import Path
from typing import Any

from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.texts import parse_yaml

# What comes out of these parts of decoder.layers.N, as --kd-hidden-states calls it.
KINDS = {
    "": "",
    ".input_layernorm": "",  # of the layer before
    ".pre_mlp_layernorm": "mlp:",
    ".self_attention": "attention:",
    ".self_attention.linear_proj": "attention:",
}
EMBEDDING = "embedding"
OTHERS = {EMBEDDING: EMBEDDING, "decoder.final_layernorm": "last"}


def read_kd_cfg(path: str | os.PathLike) -> dict[str, Any]:
    """Return what the file says, by the names of ``method_flags.Distill``.

    Raises:
        UserError: it cannot be read, or says what this project does otherwise.
    """
    try:
        values = parse_yaml(Path(path).read_text()) or {}
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--export-kd-cfg {path} cannot be read: {reason}.", USAGE) from error
    if not isinstance(values, dict):
        raise UserError(f"--export-kd-cfg {path}: needs lines like 'skip_lm_loss: true'.", USAGE)
    flags: dict[str, Any] = {}
    for key, value in values.items():
        if key not in READERS:
            raise UserError(
                f"--export-kd-cfg {path}: {key}: not known; known are {', '.join(READERS)}.", USAGE
            )
        try:
            flags |= READERS[key](value)
        except (ValueError, TypeError) as error:
            raise UserError(f"--export-kd-cfg {path}: {key}: {value}: {error}.", USAGE) from error
    return flags


def _logit_layers(value: Any) -> dict[str, Any]:
    if value != ["output_layer", "output_layer"]:
        raise ValueError("only the output layers of both models are compared as logits")
    return {}


def _pairs(value: Any) -> dict[str, Any]:
    names, losses = [], set()
    for entry in value or []:
        if not isinstance(entry, list) or len(entry) not in (2, 3):
            raise ValueError("needs [student layer, teacher layer] or a loss behind them")
        (kind, student), (other, teacher) = (_state(name) for name in entry[:2])
        if kind != other or (student == EMBEDDING) != (teacher == EMBEDDING):
            raise ValueError(f"{entry[0]} and {entry[1]} are different places in a layer")
        names.append(EMBEDDING if student == EMBEDDING else f"{kind}{teacher}:{student}")
        losses.add(entry[2] if len(entry) == 3 else "cosine")
    if not names:
        return {}
    if len(losses) > 1 or not losses <= {"cosine", "mse"}:
        raise ValueError("all pairs take one loss, cosine or mse (--kd-hidden-loss)")
    return {"kd_hidden_states": ",".join(names), "kd_hidden_loss": losses.pop()}


def _state(name: str) -> tuple[str, str]:
    """Return the kind of a state and which it is: the embedding, a layer's number, last."""
    if name in OTHERS:
        return "", OTHERS[name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)((?:\.\w+)*)", str(name))
    if match is None or match[2] not in KINDS:
        places = ", ".join([*(f"decoder.layers.N{place}" for place in KINDS), *OTHERS])
        raise ValueError(f"{name} is none of {places}")
    number = int(match[1]) - (match[2] == ".input_layernorm")
    return KINDS[match[2]], EMBEDDING if number < 0 else str(number)


def _skip_lm_loss(value: Any) -> dict[str, Any]:
    if value is not True:
        raise ValueError(
            "false scales the distillation loss to the language-model loss in every micro-batch; "
            "leave the key out and give --kd-lm-loss-weight"
        )
    return {}


def _loss_scale(value: Any) -> dict[str, Any]:
    if value != 1:
        raise ValueError("acts in Model Optimizer beside a language-model loss only; 1.0 here")
    return {}


def _temperature(value: Any) -> dict[str, Any]:
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError("must be a number above 0")
    return {"kd_temperature": float(value)}


def _top_k(value: Any) -> dict[str, Any]:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError("must be null or a whole number above 0")
    return {} if value is None else {"kd_top_k": value}


READERS = {
    "logit_layers": _logit_layers,
    "intermediate_layer_pairs": _pairs,
    "skip_lm_loss": _skip_lm_loss,
    "kd_loss_scale": _loss_scale,
    "logit_kl_temperature": _temperature,
    "logit_kl_topk": _top_k,
}
