"""Pairs of hidden states of teacher and student that are compared. Pure."""

import re
from dataclasses import dataclass

BLOCK, EMBEDDING, MLP, ATTENTION = KINDS = ("block", "embedding", "mlp", "attention")
# Kinds of sub-layers in which a state stands; the others stand between any.
WITHIN = {MLP: ("mlp", "moe"), ATTENTION: ("attention",)}


@dataclass(frozen=True)
class Pair:
    """Two states that are compared; layers count from 0."""

    kind: str
    """block: output of a layer; embedding: output of the embedding; mlp: residual stream before the
    MLP; attention: what attention adds to it."""
    teacher: int | None
    student: int | None

    def __str__(self) -> str:
        if self.kind == EMBEDDING:
            return EMBEDDING
        layers = f"{self.teacher}:{self.student}"
        return layers if self.kind == BLOCK else f"{self.kind}:{layers}"


def parse_pairs(text: str, last: tuple[int, int]) -> tuple[Pair, ...]:
    """Return the pairs of ``29:13,embedding,mlp:29:13,attention:29:last``, teacher:student.

    Args:
        text: as above.
        last: numbers of the last layers of teacher and student.

    Raises:
        ValueError: naming the part that is none, or that is there twice.
    """
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:(mlp|attention|block):)?(\d+|last):(\d+|last)", part.strip())
        if part.strip() == EMBEDDING:
            pair = Pair(EMBEDDING, None, None)
        elif match:
            named = zip(match.groups()[1:], last, strict=True)
            pair = Pair(match[1] or BLOCK, *(end if n == "last" else int(n) for n, end in named))
        else:
            raise ValueError(
                f"{part!r} is none of teacher:student (layers from 0; last), mlp:teacher:student, "
                "attention:teacher:student, embedding"
            )
        if pair in pairs:
            raise ValueError(f"{part!r} is there twice")
        pairs.append(pair)
    return tuple(pairs)


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """Pair of hidden states and the loss between them; equal on all ranks."""

    pairs: tuple[Pair, ...]
    loss: str = "cosine"
    """cosine: 1 - cos; mse: mean over channels of the squared difference."""
    projection: str = "shared"
    """shared: one map for all pairs; per-pair."""
    kept_channels: tuple[int, ...] | None = None
    """The teacher's channels that the student kept: where the map begins. None: random."""
