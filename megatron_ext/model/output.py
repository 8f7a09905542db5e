"""Output layer and loss, shared by GPT, BERT and hybrid models."""

import torch
from torch import Tensor


class VocabularyOutput:
    """Logits that stay as they are computed, and a loss over the real tokens.

    To be put before one of megatron-core's language models.
    """

    num_tokens: int
    """Tokens of the vocabulary, without padding."""
    logits_scaling = 1.0
    """By which logits are divided."""
    leaves_out_output_layer = False
    """Whether ``forward`` without labels returns what the output layer would take."""

    def output_weight(self) -> Tensor:
        """Return the weight of the output layer, [v, H], tied or its own. On the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def output_input(self, states: Tensor) -> Tensor:
        """Return the input of the output layer, [s, b, H], from the last norm's output.

        Divided here, and not the logits: all that multiplies by ``output_weight`` takes this.
        """
        return states if self.logits_scaling == 1 else states / self.logits_scaling

    def output_bias(self) -> Tensor | None:
        """Return the bias of the output layer, [v], if it has one. On the last stage."""
        return self.output_layer.bias

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the loss per token, [b, s], over the real tokens.

        megatron-core counts the padding of the vocabulary too. In imported weights its logits are
        0, which is much to a model whose logits are around -100, as GPT-2's are.

        Args:
            labels: [b, s].
            logits: [s, b, v]; the columns of padding are overwritten, behind autograd's back: no
                loss reads them, and their gradient is 0.
        """
        columns = self.num_tokens - self.pg_collection.tp.rank() * logits.size(-1)
        logits.data[..., max(columns, 0) :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)
