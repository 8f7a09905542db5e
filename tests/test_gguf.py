"""Import of GGUF files: the same tensors as from the Hugging Face folder they were made from."""

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_ext.convert import gguf as gguf_import
from megatron_ext.runtime.errors import UserError

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 2**-17,  # exact in float32, which GGUF keeps it in
    "rope_theta": 50000.0,
}
WORDS = [chr(ord("!") + i) for i in range(94)] + ["!!"]


def interleaved(weight, heads):
    """Rows of queries or keys as llama.cpp has them: pairs that rotate together, side by side."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, folder, kind="F32"):
    """Write the Llama in ``folder`` as GGUF, its matrices of layers in ``kind``."""
    config = transformers.AutoConfig.from_pretrained(folder)
    tensors = {name: x.numpy() for name, x in load_file(f"{folder}/model.safetensors").items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = (WORDS + [f"<{i}>" for i in range(config.vocab_size)])[: config.vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(len(words) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in tensors.items():
        for part, count in heads.items():
            if f".{part}." in name:
                tensor = interleaved(tensor, count)
        typed = {}
        if tensor.ndim == 2 and ".layers." in name:
            code = gguf.GGMLQuantizationType[kind]
            tensor = gguf.quants.quantize(numpy.ascontiguousarray(tensor), code)
            typed = {"raw_dtype": code}
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            numpy.ascontiguousarray(tensor),
            **typed,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder / "hf")
    for kind in ("F32", "Q8_0"):
        write_gguf(folder / f"{kind}.gguf", folder / "hf", kind)
    return folder


def test_tensors_and_sizes_are_those_of_the_model(files):
    lost = gguf_import.write_hf_folder(str(files / "F32.gguf"), str(files / "again"))
    assert lost == ""
    before, after = (load_file(files / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=name)
    configs = [transformers.AutoConfig.from_pretrained(files / name) for name in ("hf", "again")]
    for size in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters"):
        assert getattr(configs[0], size) == getattr(configs[1], size), size


def test_what_quantising_lost_is_said(files):
    lost = gguf_import.write_hf_folder(str(files / "Q8_0.gguf"), str(files / "rounded"))
    assert "28 tensors in Q8_0" in lost
    before, after = (load_file(files / name / "model.safetensors") for name in ("hf", "rounded"))
    gaps = [(after[name] - x).abs().max() / x.abs().max() for name, x in before.items()]
    assert 1e-4 < max(gaps) < 1e-2


def test_other_files_are_refused(files):
    (files / "text.gguf").write_text("no model")
    with pytest.raises(UserError, match="no GGUF file"):
        gguf_import.tensor_types(str(files / "text.gguf"))
    with pytest.raises(UserError, match="no GGUF file"):
        gguf_import.tensor_types(str(files / "absent.gguf"))
