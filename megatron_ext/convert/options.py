"""Checks of a conversion's flags against folders; in a dry run too. Pure."""

from megatron_ext.checkpoint.folder import Checkpoint, find
from megatron_ext.runtime.errors import USAGE, UserError


def check_free(save: str) -> None:
    """Refuse to import over a checkpoint."""
    if find(save):
        raise UserError(f"--save {save}: a checkpoint is there already.", USAGE)


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
