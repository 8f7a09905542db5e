"""megatron-core's BertModel as a masked language model, and layers whose norms come last.

Post-norm, as BERT was published: each sub-layer adds to the output of a norm. megatron-core 0.19.2
parses ``apply_residual_connection_post_layernorm`` and computes pre-norm layers all the same. Its
modules are in the right order for both:

    x -> input_layernorm -> h;  r = h + attention(h)     pre-norm: x + attention(h)
    r -> pre_mlp_layernorm -> y;  out = y + mlp(y)       pre-norm: r + mlp(y)

What a layer hands on is not normalised yet: its output norm is the next layer's input_layernorm,
the last layer's is final_layernorm, the norm of the embedding is the first layer's. A layer that is
pruned, or left out to be scored, takes its input_layernorm along: what the layer before it hands on
is then normalised by the next layer that is left, so that what is left out equals what is cut.

In training, dropout of the embedding comes before that first norm, in transformers behind it.
"""

from typing import Any

from megatron.core.models.bert import bert_lm_head
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_ext.arch import Arch
from megatron_ext.model.layers import Norm, local_block_spec
from megatron_ext.model.output import VocabularyOutput

# Of the head: megatron-core's own, where Apex is missing, refuses sequence parallelism.
bert_lm_head.LNImpl = Norm


class PostNormLayer(TransformerLayer):
    """megatron-core's layer with its residual connections behind the norms."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return [s, b, H] of [s, b, H], not normalised, and no context.

        ``attention_mask`` [b, 1, 1 or s, S], true where a token must not look.
        """
        add = self.config.bias_dropout_fusion
        x = self.input_layernorm(hidden_states)
        attention = self.self_attention(x, attention_mask=attention_mask)
        x = self.self_attn_bda(self.training, add)(attention, x, self.hidden_dropout)
        x = self.pre_mlp_layernorm(x)
        x = self.mlp_bda(self.training, add)(self.mlp(x), x, self.hidden_dropout)
        # A view would not go through pipeline communication.
        return make_viewless_tensor(x, requires_grad=x.requires_grad, keep_graph=True), context


class MaskedLanguageModel(VocabularyOutput, BertModel):
    """megatron-core's BertModel without its next-sentence head, with the inputs of a GPTModel.

    Without labels ``forward`` returns logits [s, b, v] (s positions, v the columns of this
    tensor-parallel rank); with labels the loss per token, [b, s].
    """

    @property
    def decoder(self) -> TransformerBlock:
        """The layers, under the name that they have in a GPTModel."""
        return self.encoder

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        return "b11s"  # whatever the spec: ``forward`` takes masks as a GPTModel does

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        tokentype_ids: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states, logits or losses, as a GPTModel does.

        Args:
            input_ids: [b, s].
            position_ids: [b, s].
            attention_mask: [b, 1, 1 or s, S], true where a token must not look; None for nowhere.
            labels: [b, s]; what stands at each position.
            loss_mask: not read, as in a GPTModel.
            tokentype_ids: [b, s], the segment of each token; None for the first.
        """
        states = None
        if self.pre_process:
            if tokentype_ids is None and self.embedding.num_tokentypes:
                tokentype_ids = input_ids.new_zeros(input_ids.shape)
            states = self.embedding(input_ids, position_ids, tokentype_ids)
        states = self.encoder(hidden_states=states, attention_mask=attention_mask)
        if not self.post_process:
            return states
        states = self.lm_head(states)
        if labels is None and self.leaves_out_output_layer:
            return states
        logits = self.output_layer(states, weight=self.output_weight())[0]
        return logits if labels is None else self.compute_language_model_loss(labels, logits)


def build_bert(
    arch: Arch, config: TransformerConfig, num_layers: int, **place: Any
) -> MaskedLanguageModel:
    """Return a stage of ``num_layers`` of a BertModel; ``place`` as in BertModel's arguments."""
    block = local_block_spec(config, num_layers)
    for layer in block.layer_specs:
        layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.padding}
        if arch.apply_residual_connection_post_layernorm:
            layer.module = PostNormLayer
    return MaskedLanguageModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        num_tokentypes=arch.num_tokentypes,
        share_embeddings_and_output_weights=not arch.untie_embeddings_and_output_weights,
        add_binary_head=False,
        **place,
    )
