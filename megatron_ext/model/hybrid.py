"""megatron-core's HybridModel: a layer for each sub-layer of a pattern.

Pipeline stages end between sub-layers: even parts, or with --pipeline-model-parallel-layout a ``t``
for each sub-layer.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_ext.arch import Arch, rotary
from megatron_ext.arch.pattern import in_stages
from megatron_ext.arch.sizes import BY_LAYER
from megatron_ext.model.layers import Norm, engine_layer_spec, local_layer_spec
from megatron_ext.model.mamba import mamba_layer_spec
from megatron_ext.model.output import VocabularyOutput
from megatron_ext.model.rotary import embedding_options, periods


class HybridLanguageModel(VocabularyOutput, HybridModel):
    """megatron-core's HybridModel with inputs and outputs as ``build.LanguageModel`` has them."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states, logits [s, b, v] or with ``labels`` losses [b, s].

        megatron-core's would copy the logits into [b, s, v].

        Args:
            input_ids: [b, s].
            position_ids: [b, s].
            attention_mask: [b or 1, 1, s, S], true where a token must not look; None for causal.
            decoder_input: [s, b, H] in place of the embedding.
            labels: [b, s].
            loss_mask: not read, as in a GPTModel.
        """
        x = decoder_input
        if x is None and self.pre_process:
            x = self.embedding(input_ids=input_ids, position_ids=position_ids)
        x = self.decoder(
            hidden_states=x, attention_mask=attention_mask, rotary_pos_emb=self._rotation(x)
        )
        if self.post_process:
            x = self.output_input(x)
        if not self.post_process or (labels is None and self.leaves_out_output_layer):
            return x
        tied = self.share_embeddings_and_output_weights
        logits, _ = self.output_layer(x, weight=self.output_weight() if tied else None)
        return logits if labels is None else self.compute_language_model_loss(labels, logits)

    def _rotation(self, decoder_input: Tensor | None) -> Tensor | None:
        """Return the rotary table of the positions, [S, 1, 1, D]."""
        if self.position_embedding_type not in rotary.KINDS:
            return None
        length = self.rotary_pos_emb.get_rotary_seq_len(
            None, self.decoder, decoder_input, self.config, None
        )
        table = self.rotary_pos_emb(length)
        return table[0] if self.position_embedding_type == "yarn" else table


class LocalStack(HybridStack):
    """megatron-core's stack with a final norm in plain torch; its own is Transformer Engine's."""

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any):
        super().__init__(config, *args, post_layer_norm=False, **options)
        if self.post_process:
            self.final_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
            self.post_layer_norm = True


def build_hybrid(
    arch: Arch, config: TransformerConfig, num_chunks: int, **place: Any
) -> HybridLanguageModel:
    """Return a stage of a HybridModel.

    Args:
        arch: sizes of the whole model.
        config: megatron-core's.
        num_chunks: model pieces of a pipeline rank.
        place: as in HybridModel's arguments.
    """
    model = HybridLanguageModel(
        config=config,
        hybrid_stack_spec=_stack(arch, config, _own_sizes(arch)),
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        hybrid_layer_pattern=_cut_pattern(arch, config, num_chunks),
        share_embeddings_and_output_weights=not arch.untie_embeddings_and_output_weights,
        position_embedding_type=arch.position_embedding_type,
        **periods(arch),
        **place,
    )
    is_rope = arch.position_embedding_type == "rope"
    # A HybridModel of megatron-core 0.19.2 asks for neither.
    if is_rope and (arch.use_rope_scaling or arch.rotary_interleaved):
        table = RotaryEmbedding(**embedding_options(arch, config, model.pg_collection.cp))
        model.rotary_pos_emb = table.to(torch.cuda.current_device())
    return model


class SizedLayer(TransformerLayer):
    """A layer with sizes of its own; megatron-core's stack gives all layers one configuration."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        own_sizes: Mapping[int, Mapping[str, int]],
        layer_number: int,
        **options: Any,
    ):
        """Build it with ``own_sizes`` of its ``layer_number``, from 1 over all stages.

        The copy is shallow: what runs set later, they set in the model's configuration, and read
        there.
        """
        config = copy.copy(config)
        for name, size in own_sizes.get(layer_number, {}).items():
            setattr(config, name, size)
        super().__init__(config, *args, layer_number=layer_number, **options)


def _own_sizes(arch: Arch) -> dict[int, dict[str, int]]:
    """Return the sizes that differ, by number of the layer from 1; empty where none does."""
    sizes: dict[int, dict[str, int]] = {}
    for name, values in arch.by_layer:
        for layer, value in zip(arch.layers_of(BY_LAYER[name]), values, strict=True):
            sizes.setdefault(layer + 1, {})[name] = value
    return sizes


def _stack(
    arch: Arch, config: TransformerConfig, own_sizes: Mapping[int, Mapping[str, int]]
) -> ModuleSpec:
    """Return the stack whose layers are the halves of a GPTModel's layer, and Mamba's."""
    is_local = config.transformer_impl == "local"
    whole_layer = local_layer_spec if is_local else engine_layer_spec

    def half(*names: str, num_experts: int | None = None) -> ModuleSpec:
        layer = whole_layer(config, num_experts).submodules
        submodules = TransformerLayerSubmodules(
            **{name: getattr(layer, name) for name in names},
            sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
        )
        if not own_sizes:
            return ModuleSpec(module=TransformerLayer, submodules=submodules)
        sizes = {"own_sizes": own_sizes}
        return ModuleSpec(module=SizedLayer, submodules=submodules, params=sizes)

    mlp = ("pre_mlp_layernorm", "mlp", "mlp_bda")
    submodules = {
        "attention_layer": half("input_layernorm", "self_attention", "self_attn_bda"),
        "mlp_layer": half(*mlp),
    }
    if config.num_moe_experts is not None:
        submodules["moe_layer"] = half(*mlp, num_experts=config.num_moe_experts)
    if arch.mamba_layers:
        submodules["mamba_layer"] = mamba_layer_spec(config)
    return ModuleSpec(
        module=LocalStack if is_local else HybridStack,
        submodules=HybridStackSubmodules(**submodules),
    )


def _cut_pattern(arch: Arch, config: TransformerConfig, num_chunks: int) -> str:
    """Return the pattern with ``|`` between the stages, in the order of the pipeline."""
    ranks, layout = config.pipeline_model_parallel_size, config.pipeline_model_parallel_layout
    stages = [(rank, chunk) for chunk in range(num_chunks) for rank in range(ranks)]
    if layout is None:
        counts = [arch.num_layers // len(stages)] * len(stages)
    else:
        counts = [layout.layout[rank][chunk].count(LayerType.decoder) for rank, chunk in stages]
    assert sum(counts) == arch.num_layers, f"{counts} are not {arch.num_layers} sub-layers"
    return in_stages(arch.pattern, counts)
