"""Rotary keys of a config.json as fields of ``Arch``, and back. Pure."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from megatron_ext.arch import Arch, rotary
from megatron_ext.convert.family import Family
from megatron_ext.convert.types import ROPE_TYPES, Config, check_types

# The scaling of Llama 3.1 in megatron-core's rotary embedding, whose factor alone can change.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Keys of YaRN and their fields; 0 stands for the default.
BETAS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
BETA = "llama_4_scaling_beta"
# Of a Ministral 3 whose config.json says nothing.
MINISTRAL_3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}
DEFAULTS = {f.name: f.default for f in fields(rotary.Sizes)}


def rotary_sizes(family: Family, config: Config) -> dict[str, Any]:
    """Return the rotary fields from the keys of any version of transformers."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope = {key: value for key, value in rope.items() if value is not None} or family.default_rope
    check_types(rope, ROPE_TYPES)
    if family.scales_queries:
        _check_queries(rope, config["max_position_embeddings"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    sizes = {
        "position_embedding_type": "yarn" if kind == "yarn" else "rope",
        "rotary_base": _base(rope.get("rope_theta", config.get("rope_theta"))),
        "rotary_percent": _percent(
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)), family
        ),
    }
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return sizes
    if kind not in family.rope_types:
        known = ", ".join(("default", *family.rope_types))
        raise ValueError(f"rope_type {kind!r} is not computed here, only {known}")
    if "factor" not in rope:
        raise ValueError(f"rope_type {kind} has no factor")
    return sizes | {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[kind](rope)


def _check_queries(rope: Mapping[str, Any], positions: int) -> None:
    """Refuse positions at which queries are scaled by 1 + beta ln(1 + floor(position / length))."""
    length, beta = (rope.get(k) for k in ("original_max_position_embeddings", BETA))
    if length is None or beta is None:
        raise ValueError(
            f"rope_parameters has no {BETA if length else 'original_max_position_embeddings'}"
        )
    if beta and positions > length:
        raise ValueError(
            f"{BETA} {beta} scales queries from position {length} on, which is not computed here: "
            f"--max-position-embeddings {length} imports the model for shorter sequences"
        )


def _base(theta: float | None) -> int:
    if theta is None:
        raise ValueError("rope_theta None is no number")
    if theta != int(theta) or theta < 1:
        raise ValueError(f"rope_theta {theta} is no whole number from 1 on")
    return int(theta)


def _percent(percent: float, family: Family) -> float:
    if not 0 < percent <= 1:
        raise ValueError(f"partial_rotary_factor {percent} is not above 0 and at most 1")
    if percent != 1 and not family.partial_rotary:
        raise ValueError(
            f"partial_rotary_factor {percent}: transformers ignores it in {family.model_type} and "
            "rotates every channel"
        )
    return percent


def _linear(rope: Mapping[str, Any]) -> dict[str, Any]:
    factor = rope["factor"]
    if factor != int(factor):
        raise ValueError(f"rope factor {factor}: megatron-core divides by whole numbers only")
    return {"rotary_seq_len_interpolation_factor": int(factor)}


def _llama3(rope: Mapping[str, Any]) -> dict[str, Any]:
    for name, only in LLAMA3.items():
        if rope.get(name) != only:
            raise ValueError(f"rope {name} {rope.get(name)}: megatron-core computes {only} only")
    return {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    length = rope.get("original_max_position_embeddings")
    if length is None:
        raise ValueError("rope_type yarn has no original_max_position_embeddings")
    sizes = {
        "rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": length,
        **{name: rope.get(key) or DEFAULTS[name] for key, name in BETAS.items()},
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }
    return sizes | _magnitudes(rope)


def _magnitudes(rope: Mapping[str, Any]) -> dict[str, float]:
    """Return mscale and mscale_all_dim; transformers reads them only where both are not 0."""
    stated = rope.get("attention_factor")
    if stated is None:
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if not mscale or not mscale_all_dim:
            mscale, mscale_all_dim = 1.0, 0.0
        return {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    for mscale in (0.0, 1.0):
        if stated == _magnitude(rope["factor"], mscale):
            return {"mscale": mscale, "mscale_all_dim": 0.0}
    raise ValueError(
        f"rope attention_factor {stated} is not computed here, only 1.0 and YaRN's own, "
        f"{_magnitude(rope['factor'], 1.0)}"
    )


def _magnitude(factor: float, mscale: float) -> float:
    """Return what YaRN multiplies queries and keys by (arXiv:2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_config(arch: Arch, family: Family, origin: Config) -> dict[str, Any]:
    """Return the rotary keys, for transformers from 5.0 on and for the versions before it.

    ``origin``: the config of the model that it comes from, or an empty one.
    """
    theta, scaling = float(arch.rotary_base), _scaling(arch)
    scales = _scales_config(arch, origin, family) if family.scales_queries else {}
    # Where transformers finds rope_scaling, it does not read rope_parameters.
    scaling = scaling and {**scales, **scaling}
    parameters = {"rope_type": "default", **scales, **(scaling or {}), "rope_theta": theta}
    is_said = family.partial_rotary or arch.rotary_percent != 1
    partial = {"partial_rotary_factor": arch.rotary_percent} if is_said else {}
    return {
        "rope_parameters": {**parameters, **partial},
        "rope_theta": theta,
        "rope_scaling": scaling,
        **partial,
    }


def _scales_config(arch: Arch, origin: Config, family: Family) -> dict[str, Any]:
    """Return what scales queries by their position, from the model that it comes from."""
    said = (origin.get(key) for key in ("rope_parameters", "rope_scaling"))
    rope = next(filter(None, said), family.default_rope) if origin else {}
    return {
        BETA: rope.get(BETA, 0.0),
        "original_max_position_embeddings": arch.max_position_embeddings,
    }


def _scaling(arch: Arch) -> dict[str, Any] | None:
    linear = arch.rotary_seq_len_interpolation_factor
    if arch.position_embedding_type == "yarn":
        return _yarn_config(arch)
    if arch.use_rope_scaling and linear:
        raise ValueError("no rope_type is llama3 and linear at once")
    if arch.use_rope_scaling:
        return {"rope_type": "llama3", "factor": arch.rope_scaling_factor, **LLAMA3}
    return {"rope_type": "linear", "factor": float(linear)} if linear else None


def _yarn_config(arch: Arch) -> dict[str, Any]:
    factor, magnitudes = arch.rotary_scaling_factor, (arch.mscale, arch.mscale_all_dim)
    said: dict[str, float] = {}
    if all(magnitudes):
        said = dict(zip(("mscale", "mscale_all_dim"), magnitudes, strict=True))
    elif magnitudes != (1.0, 0.0):
        said = {"attention_factor": _magnitude(factor, arch.mscale)}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": arch.yarn_original_max_position_embeddings,
        **{key: getattr(arch, name) for key, name in BETAS.items()},
        "truncate": arch.yarn_correction_range_round_to_int,
        **said,
    }


def comparable(arch: Arch) -> Arch:
    """Return ``arch`` with the fields that do not count at their defaults."""
    kind = arch.position_embedding_type
    names = {"rope": rotary.YARN, "yarn": ()}.get(kind, tuple(DEFAULTS))
    arch = replace(arch, **{name: DEFAULTS[name] for name in names})
    if not arch.use_rope_scaling:
        arch = replace(arch, rope_scaling_factor=DEFAULTS["rope_scaling_factor"])
    if arch.rotary_seq_len_interpolation_factor == 1:
        arch = replace(arch, rotary_seq_len_interpolation_factor=None)
    return arch
