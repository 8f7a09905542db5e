"""A GGUF file, llama.cpp's format, as a Hugging Face folder that the importer reads.

transformers reads the file (with the packages gguf and accelerate): names, permuted rows of queries
and keys, tokenizer, chat template. Weights come back in float32 and are what the file says: those
of a quantised file are not those of the model before it.
"""

from collections import Counter
from pathlib import Path

from megatron_ext.runtime.errors import USAGE, UserError

SUFFIX = ".gguf"
EXACT = ("F32", "F16", "BF16")


def write_hf_folder(file: str, folder: str) -> str:
    """Write config, float32 weights and tokenizer of ``file``; return what was lost, or "".

    Raises:
        UserError: with code ``USAGE`` where a package is missing or transformers does not know the
            architecture of the file.
    """
    types = tensor_types(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"--hf {file}: transformers cannot read it: {error}", USAGE) from error
    # save_pretrained refuses models that were quantised, though these are plain tensors by now.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rounded = {name: count for name, count in types.items() if name not in EXACT}
    if not rounded:
        return ""
    kinds = ", ".join(f"{count} tensors in {name}" for name, count in rounded.items())
    return f"{file}: {kinds}; the weights are those of the file, not those it was quantised from"


def tensor_types(file: str) -> Counter[str]:
    """Return how many tensors of ``file`` are stored in each type, Q4_1 for instance.

    Raises:
        UserError: with code ``USAGE`` where the package gguf is missing or this is no GGUF file.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"--hf {file}: needs pip install '.[gguf]': {error}", USAGE) from error
    try:
        return Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf {file}: no GGUF file: {error}", USAGE) from error
