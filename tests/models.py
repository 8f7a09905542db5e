"""Small models and batches that several tests share."""

from dataclasses import replace

import torch

from megatron_ext.arch import Arch

LLAMA = Arch(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    max_position_embeddings=32,
    vocab_size=100,
    padded_vocab_size=104,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    init_method_std=0.1,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)

# Layers that differ in what they look at and in what rotates; constants that multiply.
WINDOWS = replace(
    LLAMA,
    window_size="3,0",
    window_attn_skip_freq="[1,0,1,1]",
    no_rope_freq="[0,1,0,0]",
    position_embedding_type="yarn",
    rotary_scaling_factor=4.0,
    yarn_original_max_position_embeddings=8,
    softmax_scale=0.4,
    embedding_multiplier=3.0,
    residual_multiplier=0.6,
    logits_scaling=2.0,
    sandwich_norm=True,
)
# Gemma's: two rotary bases, in layers with a window and without.
GEMMA = replace(
    LLAMA,
    window_size="3,0",
    window_attn_skip_freq="[1,0,1,1]",
    rotary_base_local=20,
    rotary_seq_len_interpolation_factor=2,
    swiglu=False,
    geglu=True,
    qk_layernorm=True,
    apply_layernorm_1p=True,
    sandwich_norm=True,
)

GPT2 = Arch(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=72,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    max_position_embeddings=24,
    vocab_size=61,
    padded_vocab_size=64,
    init_method_std=0.1,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)

NEMOTRON = Arch(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=56,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=12,
    max_position_embeddings=16,
    vocab_size=64,
    padded_vocab_size=64,
    position_embedding_type="rope",
    rotary_percent=0.5,
    apply_layernorm_1p=True,
    squared_relu=True,
    add_bias_linear=False,
    qk_layernorm=True,
    untie_embeddings_and_output_weights=True,
    init_method_std=0.1,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)

BERT = replace(
    GPT2,
    bert_binary_head=False,
    num_tokentypes=2,
    apply_residual_connection_post_layernorm=True,
)

MOE = Arch(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=60,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=10,
    max_position_embeddings=32,
    vocab_size=91,
    padded_vocab_size=96,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    qk_layernorm=True,
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=22,
    moe_shared_expert_intermediate_size=14,
    moe_router_pre_softmax=True,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=0.5,
    untie_embeddings_and_output_weights=True,
    init_method_std=0.1,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)

MIXTRAL = replace(
    MOE,
    normalization="LayerNorm",
    apply_layernorm_1p=True,
    qk_layernorm=False,
    swiglu=False,
    num_experts=8,
    moe_router_topk=3,
    moe_shared_expert_intermediate_size=None,
    moe_router_pre_softmax=False,
    moe_router_load_balancing_type="aux_loss",
    untie_embeddings_and_output_weights=False,
)


def random_batch(arch: Arch, *, num_samples: int, seq_length: int, seed: int = 0) -> dict:
    """Return a batch of ``num_samples``, [n, S]; about a fifth of its tokens is masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(arch.vocab_size, (num_samples, seq_length + 1), generator=generator)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (torch.rand(num_samples, seq_length, generator=generator) > 0.2).float(),
        "position_ids": torch.arange(seq_length).repeat(num_samples, 1),
    }
