"""The layers of each pipeline stage, where teacher and student differ in depth.

Student layers that are compared with a teacher's go to its stage; the others are spread as evenly
as that allows. Stages are counted along the pipeline, virtual ones too, as in Megatron's
--pipeline-model-parallel-layout. Pure functions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from megatron_ext.cli.fit import pipeline_layout, virtual_pipeline_size
from megatron_ext.cli.flag_checks import ENDS, layout_of_stages, stages
from megatron_ext.cli.megatron_flags import Parallel
from megatron_ext.distillation.pairs import Pair
from megatron_ext.runtime.errors import USAGE, UserError


def layouts_of_both(
    parallel: Parallel, student_layers: int, teacher_layers: int, pairs: Sequence[Pair]
) -> tuple[Parallel, Parallel]:
    """Return the layouts of student and teacher.

    A typed layout holds for a model of as many layers as it has ``t``. A teacher without one is cut
    evenly, a student without one so that the layers of ``pairs`` meet. Where a typed layout holds
    for the student alone they need not meet: ``hidden`` refuses what does not.

    Raises:
        UserError: pairs that cross each other.
    """
    typed, pp = pipeline_layout(parallel, student_layers), parallel.pipeline_model_parallel_size
    if pp == 1:
        return parallel, parallel
    # The layers of the first and the last stage are part of ``typed``, which may not hold for the
    # teacher.
    parallel = replace(parallel, **dict.fromkeys(ENDS))
    if typed is None:
        num_stages = pp * (virtual_pipeline_size(parallel, teacher_layers) or 1)
        typed_counts = None
    else:
        typed_counts = [stage.count("t") for stage in stages(typed)]
        num_stages = len(typed_counts)
    counts = _even(teacher_layers, num_stages)
    if typed_counts is not None and sum(typed_counts) == teacher_layers:
        counts = typed_counts
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    pinned = {p.student: stage_of[p.teacher] for p in pairs if p.student is not None}
    own = _assign(student_layers, num_stages, pinned)
    if typed_counts is not None and sum(typed_counts) == student_layers:
        own = typed_counts
    pieces = {virtual_pipeline_size(parallel, depth) for depth in (student_layers, teacher_layers)}
    if len(pieces) == 1 and all(len(set(each)) == 1 for each in (own, counts)):
        return parallel, parallel  # as megatron-core cuts them by itself
    return tuple(
        replace(parallel, pipeline_model_parallel_layout=layout_of_stages(each))
        for each in (own, counts)
    )


def _even(num_layers: int, num_stages: int) -> list[int]:
    """Return how many layers each stage gets, the first ones one more where it does not divide."""
    return [
        num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages)
    ]


def _assign(num_layers: int, num_stages: int, pinned: Mapping[int, int]) -> list[int]:
    """Return the number of layers of each stage; free layers as even as the pinned ones allow.

    Even is what makes the sum of squares of the numbers smallest.
    """
    for before, after in pairwise(sorted(pinned)):
        if pinned[before] > pinned[after]:
            raise UserError(
                f"--kd-hidden-states: layer {before} of the student is compared with a later "
                f"pipeline stage of the teacher than layer {after}; pairs must not cross.",
                USAGE,
            )

    def possible(stage: int, held: int) -> Iterator[int]:
        """Yield the numbers of layers that a stage may take behind the first ``held``."""
        yield 0
        for layer in range(held, num_layers):
            if pinned.get(layer, stage) != stage:
                return
            yield layer - held + 1

    # [stage][layers before it]: the smallest sum of squares from this stage on.
    rest = [[math.inf] * (num_layers + 1) for _ in range(num_stages + 1)]
    rest[-1][num_layers] = 0
    for stage in reversed(range(num_stages)):
        for held in range(num_layers + 1):
            rest[stage][held] = min(
                n * n + rest[stage + 1][held + n] for n in possible(stage, held)
            )
    counts: list[int] = []
    for stage in range(num_stages):
        held = sum(counts)
        best = rest[stage][held]
        # Where two are as even, the first stages hold more.
        fits = (n for n in possible(stage, held) if n * n + rest[stage + 1][held + n] == best)
        counts.append(max(fits))
    return counts
