"""The language model inside a model of pictures and text, as a folder of its own. Pure."""

from collections.abc import Mapping
from typing import Any

# What the names of its tensors begin with in files of different versions, and as a language model.
PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
# Keys of the whole that the part may leave out.
SHARED = ("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id")


def has_text(config: Mapping[str, Any]) -> bool:
    """Whether it is of a model with a language model inside."""
    return isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the language model, which is the whole where it has no parts."""
    if not has_text(config):
        return dict(config)
    return {key: config[key] for key in SHARED if key in config} | config["text_config"]


def text_names(names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the name in the files of each tensor of the language model.

    Args:
        names: of the tensors in the files.
        config: what config.json holds.
    """
    if not has_text(config):
        return {name: name for name in names}
    found = {}
    for name in names:
        for old, new in PREFIXES.items():
            if name.startswith(old):
                found[new + name.removeprefix(old)] = name
                break
    return found
