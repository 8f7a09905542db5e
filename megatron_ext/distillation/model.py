"""Teacher beside student: one module that megatron-core's pipeline schedules run unchanged.

Shape letters in this file:
    s  positions on this rank    H  hidden size, student    v  vocabulary columns on this rank
    b  micro-batch               T  hidden size, teacher

Both models are cut over the same ranks. What a pipeline stage hands on is [s, b, H + T], student
first; the schedules only need a configuration with that hidden size.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.distillation.fused import fused_losses
from megatron_ext.distillation.hidden import HiddenLoss
from megatron_ext.distillation.losses import KD_LOSS, LM_LOSS, LogitLoss
from megatron_ext.distillation.pairs import HiddenStates
from megatron_ext.model.build import LanguageModel

# What megatron-core's CUDA graphs look for in a model.
OF_STUDENT = ("decoder", "position_embedding_type", "rotary_pos_emb")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Losses of a distillation and their weights; equal on all ranks."""

    logit_loss: LogitLoss = field(default_factory=LogitLoss)
    loss_weight: float = 1.0
    """Weight of the logit loss."""
    lm_loss_weight: float = 0.0
    """Weight of the language-model loss; at 0 a training step does not compute it."""
    hidden_states: HiddenStates | None = None
    """Pairs of hidden states that are compared too, on any stage."""
    fused_output: bool = False
    """Never hold all logits, see ``fused``."""
    vocab_size: int
    """Tokens of the shared tokenizer; the padding behind them takes no part."""

    @property
    def objective(self) -> dict[str, float]:
        """The weight of each loss in what is minimised."""
        weights = {KD_LOSS: self.loss_weight, LM_LOSS: self.lm_loss_weight}
        return {name: weight for name, weight in weights.items() if weight}


class StudentStage(MegatronModule):
    """A module that the schedules and finalize_model_grads run in place of its student.

    They read from it what they would read from the student.
    """

    def __init__(self, config: TransformerConfig, student: LanguageModel):
        super().__init__(config=config)
        self.student = student
        self.model_type = student.model_type
        self.vp_stage = student.vp_stage
        self.pre_process = student.pre_process
        self.post_process = student.post_process
        self.share_embeddings_and_output_weights = student.share_embeddings_and_output_weights
        self.shared_embedding_or_output_weight = student.shared_embedding_or_output_weight

    def __getattr__(self, name: str) -> Any:
        if name in OF_STUDENT:
            return getattr(self.student, name)
        return super().__getattr__(name)


class DistillationModel(StudentStage):
    """A trained student and a frozen teacher as one pipeline stage.

    ``forward`` returns [s, b, H + T] on all stages but the last, where it returns per-token losses
    {name: [b, s] float32}, equal on all tensor-parallel ranks. In evaluation the language-model
    loss is among them whatever it weighs.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel,
        distillation: Distillation,
        tp_group: ProcessGroup,
    ):
        config = copy.copy(student.config)
        config.hidden_size += teacher.config.hidden_size
        super().__init__(config, student)
        self.teacher = teacher.requires_grad_(False).eval()
        self.distillation = distillation
        self.tp_group = tp_group
        states = distillation.hidden_states
        for model in (student, teacher):
            model.leaves_out_output_layer = distillation.fused_output
        self.hidden = HiddenLoss(states, student, teacher, tp_group) if states else None

    def train(self, mode: bool = True) -> "DistillationModel":
        """Set the student's mode; the teacher stays in evaluation."""
        super().train(mode)
        self.teacher.eval()
        return self

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take [s, b, H + T] from the previous stage apart."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        if input_tensor is None:
            return
        widths = [self.student.config.hidden_size, self.teacher.config.hidden_size]
        student_input, teacher_input = input_tensor.split(widths, dim=-1)
        self.student.set_input_tensor(student_input)
        self.teacher.set_input_tensor(teacher_input.detach())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
    ) -> Tensor | dict[str, Tensor]:
        """Run both models; all inputs are [b, s] and the same for both."""
        if self.hidden is not None:
            self.hidden.expect(loss_mask)
        with torch.no_grad():
            teacher_output = self.teacher(input_ids, position_ids, attention_mask)
        student_output = self.student(input_ids, position_ids, attention_mask)
        if not self.post_process:
            return torch.cat([student_output, teacher_output], dim=-1)
        if not self.distillation.fused_output:
            return self._losses(student_output, teacher_output, labels)
        return fused_losses(
            self._losses,
            self.distillation.objective,
            self._whole_states(student_output),
            self.student.output_weight(),
            self._whole_states(teacher_output),
            self.teacher.output_weight(),
            labels,
            loss_mask,
            biases=(self.student.output_bias(), self.teacher.output_bias()),
        )

    def _whole_states(self, states: Tensor) -> Tensor:
        """Return [S, b, H] of [s, b, H]; in backward, gradients are summed over the ranks."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(states, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(states, group=self.tp_group)

    def _losses(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        loss = self.distillation.logit_loss(
            student_logits,
            teacher_logits,
            vocab_size=self.distillation.vocab_size,
            tp_group=self.tp_group,
        )
        losses = {KD_LOSS: loss.transpose(0, 1)}
        if self.distillation.lm_loss_weight or not self.training:
            # megatron-core's cross entropy overwrites float32 logits: the loss above needs them.
            logits = (
                student_logits.clone() if student_logits.dtype.itemsize >= 4 else student_logits
            )
            losses[LM_LOSS] = self.student.compute_language_model_loss(labels, logits)
        return losses
