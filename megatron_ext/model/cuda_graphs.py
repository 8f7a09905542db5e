"""CUDA graphs: their flags, what cannot be captured, and how megatron-core captures the rest.

    --cuda-graph-impl    --cuda-graph-scope   captured
    local                full_iteration       forward and backward of a whole step, teacher included
    local                other, none          the student's layers, or those parts of them
    transformer_engine   other, none          the same by Transformer Engine

A graph replays kernels on the tensors of its capture and runs no Python: what a step reads from the
host, and hooks, are those of the capture. The teacher's layers, frozen, are never captured alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from megatron_ext.arch import Arch
from megatron_ext.cli.parser import dashed, flag
from megatron_ext.runtime.errors import USAGE, UserError

STEP = "full_iteration"
SCOPES = (STEP, "full", "attn", "mlp", "moe_router", "moe_preprocess")


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """CUDA graphs."""

    cuda_graph_impl: str = flag(
        "none",
        "replay kernels as CUDA graphs, captured by megatron-core (local) or Transformer Engine",
        choices=("none", "local", "transformer_engine"),
        shorthands={
            "--enable-cuda-graph": "local",
            "--external-cuda-graph": "transformer_engine",
        },
    )
    cuda_graph_scope: tuple[str, ...] = flag(
        (),
        "what is captured: whole steps (full_iteration), or of the student's layers the parts "
        "named; default these layers (full)",
        choices=SCOPES,
        aliases=("--cuda-graph-modules",),
    )
    cuda_graph_warmup_steps: int = flag(3, "steps before the capture", at_least=0)

    @property
    def of_steps(self) -> bool:
        """Whether whole steps are captured."""
        return self.cuda_graph_impl != "none" and STEP in self.cuda_graph_scope

    @property
    def of_layers(self) -> bool:
        """Whether layers are captured."""
        return self.cuda_graph_impl != "none" and STEP not in self.cuda_graph_scope


def of_student(graphs: Graphs) -> dict[str, Any]:
    """Return megatron-core's settings of the model that is trained; empty without graphs."""
    if graphs.cuda_graph_impl == "none":
        return {}
    if graphs.of_steps:
        return {"cuda_graph_impl": STEP, "cuda_graph_modules": []}
    return {
        "cuda_graph_impl": graphs.cuda_graph_impl,
        "cuda_graph_modules": [scope for scope in graphs.cuda_graph_scope if scope != "full"],
        "cuda_graph_warmup_steps": graphs.cuda_graph_warmup_steps,
    }


def problems(graphs: Graphs, flags: Any) -> Iterator[str]:
    """Problems of flags among each other, a line each; ``flags`` are ``pretrain_distill.py``'s."""
    impl, scope = graphs.cuda_graph_impl, graphs.cuda_graph_scope
    name, typed = f"--cuda-graph-impl {impl}", f"--cuda-graph-scope {' '.join(scope)}"
    if impl == "none":
        for field in fields(graphs):
            if getattr(graphs, field.name) != field.default:
                yield f"{dashed(field.name)} needs --cuda-graph-impl local or transformer_engine."
        return
    for whole in (STEP, "full"):
        if whole in scope and len(scope) > 1:
            yield f"{typed}: {whole} covers the others; give it alone."
    if graphs.of_steps:
        if impl != "local":
            yield f"{typed} needs --cuda-graph-impl local."
        if flags.precision.fp16:
            yield f"{typed}: fp16's loss scale changes from step to step; use --bf16."
        if flags.parallel.overlap_param_gather:
            yield f"{typed} and --overlap-param-gather: hooks do not run in a graph; give one."
        return
    if flags.distill.kd_hidden_states is not None:
        yield (
            f"{name} and --kd-hidden-states: hooks do not run in the graph of a layer; capture "
            f"whole steps, --cuda-graph-scope {STEP}."
        )
    if flags.batch.recompute_granularity == "full":
        yield (
            f"{name} and --recompute-granularity full: a recomputed layer cannot be a graph; use "
            f"selective, or --cuda-graph-scope {STEP}."
        )
    if impl == "transformer_engine" and not flags.precision.bf16:
        yield f"{name} needs --bf16."


def check_machine(graphs: Graphs, *, device: str, transformer_impl: str | None) -> None:
    """Refuse graphs where nothing can capture them; None: layers that are not chosen yet.

    Raises:
        UserError: with code ``USAGE``.
    """
    if graphs.cuda_graph_impl != "none" and device == "cpu":
        raise UserError(f"--cuda-graph-impl {graphs.cuda_graph_impl} needs a GPU.", USAGE)
    if graphs.cuda_graph_impl == "transformer_engine" and transformer_impl == "local":
        raise UserError(
            "--cuda-graph-impl transformer_engine needs --transformer-impl transformer_engine.",
            USAGE,
        )


def check_models(graphs: Graphs, arch: Arch, teacher: Arch | None) -> None:
    """Refuse models that cannot be captured.

    Raises:
        UserError: with code ``USAGE``.
    """
    name = f"--cuda-graph-impl {graphs.cuda_graph_impl}"
    if graphs.cuda_graph_impl == "none":
        return
    if arch.is_bert:
        raise UserError(f"{name}: not for a BertModel.", USAGE)
    if arch.is_hybrid or (teacher and teacher.is_hybrid):
        raise UserError(
            f"{name} has not been tried with a model of sub-layers (--hybrid-layer-pattern); leave "
            "it out.",
            USAGE,
        )
    if graphs.of_steps and (arch.num_experts or (teacher and teacher.num_experts)):
        raise UserError(
            f"--cuda-graph-scope {STEP}: the host reads how many tokens each expert has; capture "
            "attn and moe_router.",
            USAGE,
        )
    if graphs.cuda_graph_impl == "local" and arch.attention_dropout + arch.hidden_dropout:
        raise UserError(
            f"{name}: evaluations would replay the dropout of training; give "
            "--attention-dropout 0 and --hidden-dropout 0.",
            USAGE,
        )


def forward_backward(graphs: Graphs) -> Callable[..., list[Any]]:
    """Return megatron-core's schedule, captured if whole steps are to be."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper
    from megatron.core.pipeline_parallel import get_forward_backward_func

    schedule = get_forward_backward_func()
    if not graphs.of_steps:
        return schedule
    return FullCudaGraphWrapper(schedule, graphs.cuda_graph_warmup_steps)


@contextmanager
def initialization_stream(config: Any) -> Iterator[None]:
    """Run on the stream on which gradient buffers must be made, where there is a GPU.

    DistributedDataParallel keeps the node that accumulates each gradient, and autograd runs a node
    on the stream of its making. A capture fails on a node of the default stream
    (cudaErrorStreamCaptureImplicit); Megatron-LM makes them on another one too.
    """
    import torch
    from megatron.core.full_cuda_graph import get_shared_capture_stream

    if not torch.cuda.is_available():
        yield
        return
    of_steps = config.cuda_graph_impl == STEP
    stream = get_shared_capture_stream() if of_steps else torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def make_own_tables(model: Any) -> None:
    """Have a GPTModel make its rotary table anew for each micro-batch.

    megatron-core 0.19.2 keeps one for all of them, and refuses to capture a layer's backward (an
    AssertionError) while a tensor waits to be read by the forward graph of another micro-batch, as
    in every pipeline.
    """
    table = getattr(model, "rotary_pos_emb", None)
    if table is not None:
        table.forward = partial(type(table).forward.__wrapped__, table)


def steps_before_capture(graphs: Graphs) -> int | None:
    """Return after how many steps of a start ``capture_layers`` is due; None for never."""
    is_due = graphs.cuda_graph_impl == "transformer_engine"
    return graphs.cuda_graph_warmup_steps if is_due else None


def capture_layers(
    model: Sequence[Any], optimizer: Any, batch: Any, *, dp_size: int, overlaps: bool
) -> None:
    """Have Transformer Engine capture the student's layers, between two steps. Collective.

    Args:
        model: this rank's chunks, wrapped.
        optimizer: as of ``get_megatron_optimizer``.
        batch: sizes of a step: global_batch_size, micro_batch_size, seq_length.
        dp_size: data-parallel ranks.
        overlaps: --overlap-param-gather: what waits for parameters becomes part of the replay.
    """
    import torch
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
    from megatron.core.utils import get_model_config

    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(
        torch.distributed.get_rank(), None, batch.global_batch_size, batch.micro_batch_size, dp_size
    )
    config = get_model_config(model[0])
    sizes = batch.seq_length, batch.micro_batch_size
    helper = TECudaGraphHelper(list(model), config, *sizes, [optimizer])
    if not overlaps:
        helper.create_cudagraphs()
        return
    for chunk in model:
        chunk.disable_forward_pre_hook(param_sync=False)
    helper.create_cudagraphs()
    for chunk in model:
        chunk.enable_forward_pre_hook()
    helper.cuda_graph_set_manual_hooks()
