"""An ``Arch`` as one of megatron-core's models on this rank."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.model.bert import MaskedLanguageModel, build_bert
from megatron_ext.model.config import ModelOptions, transformer_config
from megatron_ext.model.cuda_graphs import make_own_tables
from megatron_ext.model.hybrid import HybridLanguageModel, build_hybrid
from megatron_ext.model.initial import initialize_weights
from megatron_ext.model.layers import engine_layer_spec, local_block_spec
from megatron_ext.model.output import VocabularyOutput
from megatron_ext.model.rotary import TwoBases, embedding_options, scaled_periods


class LanguageModel(VocabularyOutput, GPTModel):
    """megatron-core's GPT model whose logits stay as they are computed.

    Without labels ``forward`` returns logits [s, b, v] (s positions, v the columns of this
    tensor-parallel rank), where GPTModel copies them into [b, s, v]. With labels it returns the
    language-model loss per token, [b, s].
    """

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None = None, **inputs: object
    ) -> Tensor:
        if self.post_process:
            hidden_states = self.output_input(hidden_states)
        if labels is not None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, **inputs)
        if self.leaves_out_output_layer:
            return hidden_states
        return self.output_layer(hidden_states, weight=self.output_weight())[0]


def build_model(
    arch: Arch,
    options: ModelOptions,
    groups: ProcessGroupCollection,
    *,
    seed: int | None = None,
) -> list[LanguageModel]:
    """Return this rank's part of the model: one module per virtual pipeline stage.

    Args:
        arch: sizes of the whole model.
        options: dtype and parallelism.
        groups: megatron-core's process groups (tp, pp, cp, ... as of ``platform.initialize``).
        seed: draw initial weights from it; None leaves them unset, for a checkpoint to fill.
    """
    config = transformer_config(arch, options, groups)
    num_chunks = options.virtual_pipeline_model_parallel_size or 1
    chunks = [_build_chunk(arch, config, groups, chunk, num_chunks) for chunk in range(num_chunks)]
    if seed is not None:
        initialize_weights(model_state_dict(chunks), arch, seed)
    return chunks


def _build_gpt(
    arch: Arch, config: TransformerConfig, num_layers: int, **place: Any
) -> LanguageModel:
    if config.transformer_impl == "transformer_engine":
        spec = engine_layer_spec(config, config.num_moe_experts)
    else:
        spec = local_block_spec(config, num_layers)
    model = LanguageModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        share_embeddings_and_output_weights=not arch.untie_embeddings_and_output_weights,
        position_embedding_type=arch.position_embedding_type,
        **scaled_periods(arch),
        **place,
    )
    if arch.rotary_base_local is not None:
        options = embedding_options(arch, config, place["pg_collection"].cp)
        model.rotary_pos_emb = TwoBases(arch.rotary_base_local, **options)
    return model


def _build_chunk(
    arch: Arch,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    chunk: int,
    num_chunks: int,
) -> LanguageModel | HybridLanguageModel | MaskedLanguageModel:
    vp_stage = chunk if num_chunks > 1 else None
    num_layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
    place = {
        "pre_process": groups.pp.rank() == 0 and chunk == 0,
        "post_process": groups.pp.rank() == groups.pp.size() - 1 and chunk == num_chunks - 1,
        "pg_collection": groups,
        "vp_stage": vp_stage,
    }
    if arch.is_bert:
        model = build_bert(arch, config, num_layers, **place)
    elif arch.is_hybrid:
        model = build_hybrid(arch, config, num_chunks, **place)
    else:
        model = _build_gpt(arch, config, num_layers, **place)
    if config.cuda_graph_impl == "local":
        make_own_tables(model)
    model.num_tokens, model.logits_scaling = arch.vocab_size, arch.logits_scaling
    if place["pre_process"] and arch.embedding_multiplier != 1:
        # Rounded to the weights' dtype first, as transformers does.
        model.embedding.register_forward_hook(
            lambda _, __, y: y * y.new_tensor(arch.embedding_multiplier)
        )
    for name, parameter in model.named_parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if ".mlp.experts." in name:
            # megatron-core gives experts an optimizer of their own under expert parallelism only.
            # Always, so that optimizer state has one form on disk.
            parameter.allreduce = False
    # megatron-core makes tables of positions and BERT's head in float32, whatever the others are.
    return model.to(torch.cuda.current_device(), config.params_dtype)


def model_state_dict(chunks: list[MegatronModule]) -> ShardedStateDict:
    """Return what this rank holds as megatron-core's sharded tensors, one dict per chunk.

    Keys are ``model`` or ``model0``, ``model1``, ... as Megatron-LM names them.
    """
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
