"""Cost of a run of given sizes and layout: bytes on the fullest rank; ``speed`` counts seconds.

Arithmetic on sizes, before anything is built. Not counted: fragmentation, buffers of collectives
and of FP8, the CUDA context, maps between hidden states.

Letters: t tensor, p pipeline, c context, d data parallel ranks; v model pieces of a pipeline rank;
m micro-batches of a rank in a step. A rank here is a pipeline rank: those of a stage are alike.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from megatron_ext.arch import Arch, dim_sizes, is_of_experts, numel_of, weights
from megatron_ext.arch.axes import AXES

WIDE = 4
"""Bytes of float32."""
# Output layers and losses of --kd-fused-output: fused.CHUNK_TOKENS on a GPU.
FUSED_TOKENS = 1024
# Dims of which a tensor-parallel rank holds a share.
SPLIT_DIMS = {"vocab", *(dim for axis in AXES if axis.tp_split for dim in axis.dims)}


@dataclass(frozen=True)
class Placed:
    """A model, and how many of its layers each pipeline stage holds, virtual stages too.

    A HybridModel's layers are its sub-layers.
    """

    arch: Arch
    stages: tuple[int, ...]

    def on(self, rank: int, num_ranks: int) -> Arch:
        """Return the model with the layers of a pipeline rank; a GPTModel's are all alike."""
        if not self.arch.is_hybrid:
            return self.arch
        ends = list(accumulate(self.stages))
        parts = [range(end - n, end) for end, n in zip(ends, self.stages, strict=True)]
        layers = [layer for part in parts[rank::num_ranks] for layer in part]
        return self.arch.part(layers) if layers else self.arch  # there are none of these layers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of a run and the choices that decide what a rank holds. Names are the flags'."""

    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute_granularity: str | None = None
    """None and "selective" differ in the modules only: attention scores are never kept."""
    recompute_modules: tuple[str, ...] = ()
    """Of "selective"; core_attn makes no difference."""
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    param_bytes: int = 2
    """Of a weight and an activation: 2 for bf16 and fp16, 4 for float32."""
    grad_bytes: int = 4
    """Of a gradient in its buffer."""
    moments: int = 2
    """Float32 numbers that the optimizer keeps of a weight, beside its float32 copy."""
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seq_length: int
    fused_output: bool = False
    """Logits exist in chunks only (--kd-fused-output)."""
    lm_loss: bool = False
    """The language-model loss is computed beside that of distillation."""
    stored_teacher: bool = False
    """The teacher's likeliest tokens come from files (--kd-teacher-store)."""
    fp8: bool = False
    """The linear layers compute in FP8; the output layer and attention do not."""
    teacher_fp8: bool = False

    @property
    def data_parallel_size(self) -> int:
        """The ranks that hold the same weights for other samples."""
        model_ranks = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return self.world_size // (model_ranks * self.context_parallel_size)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a rank in a step."""
        return max(1, self.global_batch_size // (self.micro_batch_size * self.data_parallel_size))

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch on a rank."""
        return self.seq_length // self.context_parallel_size * self.micro_batch_size


def rank_parameters(model: Placed, layout: Layout, rank: int) -> tuple[int, int]:
    """Return how many weights pipeline rank ``rank`` holds: (those of experts, all others)."""
    arch, t, p = (
        model.arch,
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
    )
    is_first, is_last = rank == 0, rank == p - 1
    experts = others = 0
    own, held = model.on(rank, p), sum(model.stages[rank::p])
    for weight in weights(arch):
        numel = numel_of(weight, own if weight.per_layer else arch)
        at_start = weight.key.startswith("embedding.")
        here = is_first if at_start else is_last
        # A GPTModel's layers are all alike; of a HybridModel, ``own`` has those of this rank alone.
        numel = numel * held // own.num_layers if weight.per_layer else numel * here
        if is_of_experts(weight):
            experts += numel // (t * layout.expert_model_parallel_size)
        else:
            others += numel // t if SPLIT_DIMS & set(weight.dims) else numel
    if not arch.untie_embeddings_and_output_weights and is_last and not is_first:
        others += arch.padded_vocab_size // t * arch.hidden_size  # a copy of the embedding
    return experts, others


def layer_bytes(arch: Arch, layout: Layout) -> float:
    """Return what one layer keeps of one micro-batch for backward.

    Inputs of norms and matrices, of attention (not its scores) and of the activation function, and
    masks of dropout. For GPT with an MLP of 4 hidden sizes that is Table 2 of arXiv:2205.05198:
    34 s b h / t with sequence parallelism and selective recomputation, s b h (10 + 24 / t) without.
    Tokens are taken to spread evenly over experts. Modules that are computed again
    (--recompute-modules) keep nothing.

    Of kernels that fuse norms and gated activations, as on GPUs. Plain torch on a CPU keeps 1.9
    times as much of a Llama layer: tests/test_estimate.py counts the difference.
    """
    parts = layer_parts(arch, layout)
    return sum(parts.values()) - sum(
        parts[name] for name in parts_made_again(layout) & parts.keys()
    )


def layer_parts(arch: Arch, layout: Layout) -> dict[str, float]:
    """Return the bytes of ``layer_bytes``, by what keeps them."""
    t = layout.tensor_model_parallel_size
    between = t if layout.sequence_parallel else 1
    # How many a layer has: 1, or of a HybridModel's mean sub-layer less.
    numbers = {kind: len(arch.layers_of(kind)) / arch.num_layers for kind in arch.kinds}
    norms = sum(numbers.values())

    def mean(kind: str, *dims: str) -> float:
        """Return the length of these dims together, on average over all layers."""
        each = arch.alike(kind).items() if kind in numbers else ()
        lengths = [n * dim_sizes(layer).get(dim, 0) for layer, n in each for dim in dims]
        return sum(lengths) / arch.num_layers

    elements = {
        # Norms' inputs; queries, keys, values and the attention's output.
        "residual": norms * arch.hidden_size / between,
        "attention": mean("attention", "qkv", "heads") / t,
        "layernorm": norms * arch.hidden_size / between,  # what they return
    }
    if "mlp" in numbers:
        elements["mlp"] = mean("mlp", "fc1", "ffn") / t
    if "mamba" in numbers:
        # What in_proj returns, what heads read and out_proj gets: mamba_ssm keeps no more.
        inner, states = mean("mamba", "mamba_inner"), mean("mamba", "mamba_states")
        elements["mamba"] = (4 * inner + 2 * states + mean("mamba", "mamba_heads")) / t
    if moes := numbers.get("moe"):
        chosen = arch.moe_router_topk
        # In front of experts and behind.
        elements["moe"] = chosen * (2 * moes * arch.hidden_size + mean("moe", "moe_fc1") / t)
        elements["moe_act"] = chosen * mean("moe", "moe_ffn") / t
        elements["shared_experts"] = mean("moe", "shared_fc1", "shared_ffn") / t
    found = {name: layout.tokens * layout.param_bytes * n for name, n in elements.items()}
    # Masks of dropout, a byte each.
    masks = norms * arch.hidden_size / between if arch.hidden_dropout else 0
    return found | {"masks": layout.tokens * masks}


def parts_made_again(layout: Layout) -> set[str]:
    """Return the parts of a layer that --recompute-modules computes again in backward."""
    names = set(layout.recompute_modules)
    return names | {"moe_act", "shared_experts"} if "moe" in names else names


def kept_bytes(arch: Arch, layout: Layout, num_layers: float) -> tuple[float, float]:
    """Return what ``num_layers`` layers keep of one micro-batch, and what backward makes again.

    The second is there once, whatever is kept.
    """
    each = layer_bytes(arch, layout)
    if layout.recompute_granularity != "full":
        parts = layer_parts(arch, layout)
        return num_layers * each, sum(parts.values()) - each
    between = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    only_input = layout.tokens * arch.hidden_size / between * layout.param_bytes
    group = min(layout.recompute_num_layers, num_layers)
    if layout.recompute_method == "uniform":
        return ceil(num_layers / group) * only_input, group * each
    return group * only_input + (num_layers - group) * each, each


def in_flight(layout: Layout, pieces: int, rank: int) -> int:
    """Return how many micro-batches of a model piece wait for backward at most on ``rank``.

    1F1B: p - rank; interleaved: megatron-core's warm-up of 2 (p - rank - 1) + (v - 1) p and one.
    """
    p = layout.pipeline_model_parallel_size
    waiting = 2 * (p - rank - 1) + (pieces - 1) * p + 1 if pieces > 1 else p - rank
    return min(waiting, pieces * layout.num_microbatches)


def logits_bytes(student: Arch, teacher: Arch | None, layout: Layout) -> dict[str, int]:
    """Return what the last stage holds of logits and their gradients, one micro-batch.

    Without any teacher the loss is megatron-core's cross entropy: a float32 copy, which becomes the
    gradient, beside half-precision logits or their gradient.
    """
    width, t = layout.param_bytes, layout.tensor_model_parallel_size
    columns = student.padded_vocab_size // t
    extra = WIDE if layout.lm_loss else 0
    if layout.fused_output:
        rows = min(FUSED_TOKENS, layout.tokens)
        grads = (layout.tokens + columns) * student.hidden_size * WIDE
        return {"logits": rows * columns * (3 * width + extra), "gradients of outputs": grads}
    elements = layout.tokens * columns
    if teacher is None and not layout.stored_teacher:
        return {"logits": elements * (WIDE + (width if width < WIDE else 0))}
    kept = (1 if layout.stored_teacher else 2) * width + extra
    return {"logits": elements * kept, "gradient of logits": elements * width}


def rank_memory(
    student: Placed, teacher: Placed | None, layout: Layout, rank: int
) -> dict[str, int]:
    """Return bytes on pipeline rank ``rank`` by what they are for; see ``memory``."""
    p, width = layout.pipeline_model_parallel_size, layout.param_bytes
    between = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    experts, others = rank_parameters(student, layout, rank)
    replicas, per_weight = 1, WIDE * layout.moments + (WIDE if width < WIDE else 0)
    if layout.use_distributed_optimizer:
        replicas = layout.data_parallel_size * layout.context_parallel_size
    expert_replicas = max(1, replicas // layout.expert_model_parallel_size)
    held = student.stages[rank::p]
    waiting = in_flight(layout, len(held), rank)
    kept, again = kept_bytes(student.on(rank, p), layout, sum(held) / len(held))
    activations = waiting * kept + again
    last = rank == p - 1
    if last:  # input and output of the last norm
        activations += layout.tokens * 2 * student.arch.hidden_size / between * width
    needs = {
        "weights": (experts + others) * width,
        "gradients": (experts + others) * layout.grad_bytes,
        "optimizer": ceil(others / replicas + experts / expert_replicas) * per_weight,
        "activations": int(activations),
    }
    if last:
        needs |= logits_bytes(student.arch, teacher and teacher.arch, layout)
    if teacher is not None:
        passing = layer_bytes(teacher.arch, layout)
        if p > 1:  # what came from the stage before stays with the student's part of it
            passing += waiting * layout.tokens * teacher.arch.hidden_size / between * width
        needs["teacher weights"] = sum(rank_parameters(teacher, layout, rank)) * width
        needs["teacher activations"] = int(passing)
    return needs


def memory(student: Placed, teacher: Placed | None, layout: Layout) -> dict[str, int]:
    """Return bytes on the fullest rank, by what they are for.

    Args:
        student: the model that is trained.
        teacher: the model beside it, if there is one.
        layout: of both.
    """
    ranks = range(layout.pipeline_model_parallel_size)
    each = [rank_memory(student, teacher, layout, rank) for rank in ranks]
    return max(each, key=lambda needs: sum(needs.values()))


def forward_memory(model: Placed, layout: Layout, *, logits: bool) -> dict[str, int]:
    """Return bytes on the fullest rank of forward passes alone, as ``memory``.

    Args:
        model: whose weights are used.
        layout: of it.
        logits: whether they are computed and compared with those of another pass.
    """
    p = layout.pipeline_model_parallel_size
    columns = model.arch.padded_vocab_size // layout.tensor_model_parallel_size
    needs = {
        "weights": max(sum(rank_parameters(model, layout, rank)) for rank in range(p))
        * layout.param_bytes,
        "activations": int(layer_bytes(model.arch, layout)),
    }
    return needs | ({"logits": 2 * layout.tokens * columns * layout.param_bytes} if logits else {})
