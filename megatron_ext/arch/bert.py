"""A BertModel: a masked language model, whose tokens see both sides."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.arch.rows import Weight, linear, norm, size

if TYPE_CHECKING:
    from megatron_ext.arch.sizes import Arch


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a BertModel alone; each is a field of ``Arch``."""

    bert_binary_head: bool = size(
        True,
        "a BertModel without next-sentence head: a masked language model",
        off="--bert-no-binary-head",
    )
    """False: a BertModel without its next-sentence head. Megatron-LM saves True for a GPTModel."""
    apply_residual_connection_post_layernorm: bool = size(
        False, "post-norm, with --bert-no-binary-head: add to the output of each norm"
    )
    """A layer adds to the output of its norm, not to the input."""

    @property
    def is_bert(self) -> bool:
        """Whether it is a BertModel."""
        return not self.bert_binary_head


def problems(arch: "Arch") -> Iterator[str]:
    """Yield how these sizes contradict each other."""
    if not arch.is_bert:
        if arch.num_tokentypes:
            yield f"num_tokentypes {arch.num_tokentypes} needs --bert-no-binary-head."
        if arch.apply_residual_connection_post_layernorm:
            yield "--apply-residual-connection-post-layernorm needs --bert-no-binary-head."
        return
    if arch.num_experts is not None:
        yield "--bert-no-binary-head does not go with --num-experts."
    if arch.position_embedding_type != "learned_absolute":
        yield (
            "--bert-no-binary-head needs --position-embedding-type learned_absolute, not "
            f"{arch.position_embedding_type}."
        )


def head_weights(arch: "Arch") -> list[Weight]:
    """Return the rows between the last norm and the output layer."""
    dense = linear("lm_head.dense", ("hidden", "hidden"), bias=True)
    return dense + norm(arch, "lm_head.layer_norm.")
