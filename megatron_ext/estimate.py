"""What a run of given sizes and layout needs: bytes on the fullest rank, seconds of a step.

Arithmetic on sizes, before anything is built. What is not counted: fragmentation, buffers of
collectives, the CUDA context (a few GiB together).

Letters: s positions and b samples of a micro-batch, t tensor, p pipeline, c context and d data
parallel ranks, h hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.arch import Arch, Weight, dim_sizes, forward_flops, is_of_experts, shape, weights

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over ranks and what it holds."""

    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute: str | None = None
    """Megatron's recompute_granularity: None, "selective" or "full"."""
    param_bytes: int = 2
    """Of a weight and an activation: 2 for bf16 and fp16, 4 for float32."""
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seq_length: int
    fused_output: bool = False
    """Logits exist in chunks only (--kd-fused-output)."""

    @property
    def data_parallel_size(self) -> int:
        """The ranks that hold the same weights for other samples."""
        model_ranks = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return self.world_size // (model_ranks * self.context_parallel_size)


def rank_parameters(arch: Arch, layout: Layout) -> int:
    """Return the weights of the fullest rank: the first or the last pipeline stage."""
    t, p = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    sizes: dict[str, int] = {"layer": 0, "first": 0, "last": 0}
    for weight in weights(arch):
        numel = _rank_numel(weight, arch, t, layout.expert_model_parallel_size)
        if weight.per_layer:
            sizes["layer"] += numel
        else:
            sizes["first" if weight.key.startswith("embedding.") else "last"] += numel
    if not arch.untie_embeddings_and_output_weights and p > 1:  # the last stage has a copy
        sizes["last"] += arch.padded_vocab_size // t * arch.hidden_size
    layers = -(-arch.num_layers // p) * sizes["layer"]
    return layers + (
        sizes["first"] + sizes["last"] if p == 1 else max(sizes["first"], sizes["last"])
    )


def _rank_numel(weight: Weight, arch: Arch, t: int, ep: int) -> int:
    numel = 1
    for length in shape(weight, arch):
        numel *= length
    if is_of_experts(weight):
        return numel // (t * ep)
    split = {"vocab", "fc1", "ffn", "heads", "qkv", "shared_fc1", "shared_ffn"}
    return numel // t if split & set(weight.dims) else numel


def activation_bytes(arch: Arch, layout: Layout) -> int:
    """Return what one layer keeps of one micro-batch for backward.

    Inputs of the norms and matrices, of attention (whose scores are computed again, as flash
    attention does) and of the activation function. With full recomputation, the layer's input.
    """
    t, sizes = layout.tensor_model_parallel_size, dim_sizes(arch)
    between = t if layout.sequence_parallel else 1
    tokens = layout.seq_length // layout.context_parallel_size * layout.micro_batch_size
    if layout.recompute == "full":
        return tokens * arch.hidden_size // between * layout.param_bytes
    if arch.num_experts is None:
        mlp = sizes["fc1"] + sizes["ffn"]
    else:
        mlp = arch.moe_router_topk * (sizes["moe_fc1"] + sizes["moe_ffn"] + 2 * arch.hidden_size)
        mlp += sizes.get("shared_fc1", 0) + sizes.get("shared_ffn", 0)
    # Both norms' inputs and outputs; queries, keys, values and the attention's output.
    per_token = 4 * arch.hidden_size / between + (sizes["qkv"] + sizes["heads"] + mlp) / t
    return int(tokens * per_token * layout.param_bytes)


def memory(student: Arch, teacher: Arch | None, layout: Layout) -> dict[str, int]:
    """Return bytes on the fullest rank, by what they are for.

    Args:
        student: the model that is trained.
        teacher: the model beside it, if there is one.
        layout: of both.
    """
    t, p, wide = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, 4
    own = rank_parameters(student, layout)
    state = own * wide * (3 if layout.param_bytes < wide else 2)  # master weights, Adam's moments
    if layout.use_distributed_optimizer:
        state //= layout.data_parallel_size * layout.context_parallel_size
    # 1F1B: the first stage has p micro-batches in flight; virtual stages add a fraction.
    pieces = layout.virtual_pipeline_model_parallel_size
    in_flight = p * (1 + (p - 1) / (p * pieces)) if pieces > 1 else p
    layers = -(-student.num_layers // p)
    tokens = layout.seq_length // layout.context_parallel_size * layout.micro_batch_size
    logits = tokens * student.padded_vocab_size // t * layout.param_bytes
    copies = 0 if layout.fused_output else 3 if teacher else 2  # student, its gradient, teacher
    needs = {
        "weights": own * layout.param_bytes,
        "gradients": own * wide,
        "optimizer": state,
        "activations": int(activation_bytes(student, layout) * layers * in_flight),
        "logits": logits * copies,
    }
    if teacher is not None:
        needs["teacher weights"] = rank_parameters(teacher, layout) * layout.param_bytes
        needs["teacher activations"] = activation_bytes(teacher, layout)
    return needs


def step_seconds(
    student: Arch, teacher: Arch | None, layout: Layout, *, peak_tflops: float, mfu: float
) -> float:
    """Return the seconds of an optimizer step, pipeline bubble included.

    Args:
        student: a step costs three times its forward pass, four with full recomputation.
        teacher: a forward pass beside it.
        layout: of both.
        peak_tflops: of one GPU, dense, TFLOP/s.
        mfu: the share of it that is reached, 0 to 1.
    """
    passes = 4 if layout.recompute == "full" else 3
    flops = passes * forward_flops(student, layout.seq_length)
    flops += forward_flops(teacher, layout.seq_length) if teacher else 0
    tokens = layout.global_batch_size * layout.seq_length
    busy = flops * tokens / (layout.world_size * peak_tflops * 1e12 * mfu)
    return busy * (1 + bubble(layout))


def bubble(layout: Layout) -> float:
    """Return the idle share of the pipeline over its busy time: (p - 1) / (v m)."""
    samples = layout.global_batch_size // layout.data_parallel_size
    micro_batches = max(1, samples // layout.micro_batch_size)
    stages = layout.pipeline_model_parallel_size
    return (stages - 1) / (layout.virtual_pipeline_model_parallel_size * micro_batches)


def table(needs: Mapping[str, int], step: float, layout: Layout) -> str:
    """Return an estimate as lines of text; memory in GiB."""
    tokens = layout.global_batch_size * layout.seq_length
    rows = [(name, f"{value / GIB:9.2f} GiB") for name, value in needs.items()]
    rows += [("memory of the fullest rank", f"{sum(needs.values()) / GIB:9.2f} GiB")]
    rows += [("pipeline bubble", f"{bubble(layout):9.1%}"), ("step", f"{step:9.2f} s")]
    rows += [("throughput", f"{tokens / step:9,.0f} tokens/s")]
    return "\n".join(f"{name:28}{value}" for name, value in rows)
