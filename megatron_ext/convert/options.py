"""Checks of a conversion's flags against folders; in a dry run too. Pure."""

from megatron_ext.arch import Arch
from megatron_ext.checkpoint.folder import Checkpoint, find
from megatron_ext.runtime.errors import USAGE, UserError

FORMS = GPT, HYBRID = ("gpt", "hybrid")


def check_free(save: str) -> None:
    """Refuse to write over a checkpoint."""
    if find(save):
        raise UserError(f"--save {save}: a checkpoint is there already.", USAGE)


def in_form(arch: Arch, form: str) -> Arch:
    """Return the same model as a GPTModel, ``form`` gpt, or as a HybridModel, hybrid.

    Raises:
        UserError: it is one already, or cannot be one.
    """
    if arch.is_hybrid == (form == HYBRID):
        raise UserError(f"--to {form}: the checkpoint has this form already.", USAGE)
    try:
        return arch.by_sublayers() if form == HYBRID else arch.by_layers()
    except ValueError as error:
        raise UserError(f"--to {form}: {error}", USAGE) from None


def with_tokens(source: Checkpoint, vocab_size: int) -> Checkpoint:
    """Return the checkpoint with ``vocab_size`` tokens, the rows behind them padding."""
    known = source.with_tokens(vocab_size)
    if known.arch.vocab_size != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: {source.folder} has {source.arch.vocab_size} tokens in "
            f"{source.arch.padded_vocab_size} rows.",
            USAGE,
        )
    return known
