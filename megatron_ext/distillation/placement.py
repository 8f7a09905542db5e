"""The layers of each pipeline stage, where teacher and student differ in depth.

Student layers that are compared with a teacher's go to its stage; the others are spread evenly in
between. Stages are counted along the pipeline, virtual ones too, as in Megatron's
--pipeline-model-parallel-layout. Pure functions.
"""

from collections.abc import Mapping, Sequence
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

    A typed layout holds for each model whose layers it places. Else the teacher is cut evenly, and
    the student so that the layers of ``pairs`` meet.

    Raises:
        UserError: pairs that cross each other.
    """
    typed, pp = pipeline_layout(parallel, student_layers), parallel.pipeline_model_parallel_size
    if pp == 1:
        return parallel, parallel
    # They stand in ``typed``, which may not hold for the teacher.
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
    """Return the number of layers of each stage; free layers as even as the pinned ones allow."""
    order = sorted(pinned)
    for before, after in pairwise(order):
        if pinned[before] > pinned[after]:
            raise UserError(
                f"--kd-hidden-states: layer {before} of the student is compared with a later "
                f"pipeline stage of the teacher than layer {after}; pairs must not cross.",
                USAGE,
            )
    even = _even(num_layers, num_stages)
    free = [stage for stage, count in enumerate(even) for _ in range(count)]
    counts = [0] * num_stages
    for layer in range(num_layers):
        lower = max((pinned[p] for p in order if p <= layer), default=0)
        upper = min((pinned[p] for p in order if p >= layer), default=num_stages - 1)
        counts[min(max(free[layer], lower), upper)] += 1
    return counts
