"""Depth scores: what a model loses without some of its layers.

    block   1 - mean cos(what goes into the first of the layers, what comes out of the last)
    loss    language-model loss of the model without the layers, nats per token
    kl      KL(whole model || model without the layers) of the next token, nats per token

Layers here may be sub-layers, the attention or the MLP of a layer alone. Means are over the tokens
of the calibration samples that a loss counts, for block over all but padding. Higher means keep.
loss orders layers as the perplexity of arXiv:2407.14679 does, block is its block importance over
contiguous layers, kl the metric of arXiv:2504.11409.

No second model is built: a layer is left out by handing its input through, on the pipeline stage
where it lives.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from megatron_ext.arch import Arch
from megatron_ext.distillation.losses import vocab_parallel_kl
from megatron_ext.model.build import LanguageModel
from megatron_ext.model.forward import Batch, evaluating, inputs
from megatron_ext.pruning.calibrate import Passes, counted_positions
from megatron_ext.pruning.planner import lowest
from megatron_ext.runtime.errors import UserError

Layer = int | tuple[int, str]
"""A layer, its global number from 0; or one kind of sub-layer (``kinds``) of a layer that
has both."""
Layers = tuple[Layer, ...]
"""Layers or sub-layers that are left out together."""
Job = tuple[Batch, Layers]
"""One forward pass: what goes in, and which layers are left out."""

BLOCK, KL = "block", "kl"

# Elements of hidden states that are float32 at a time, 16 MiB.
CHUNK_NUMEL = 2**22


def score_depth(
    passes: Passes, importance: str, block: int, *, remove: int | None
) -> tuple[dict[str, Tensor], tuple[Layers, ...]]:
    """Score every block of contiguous layers and say in which order to remove them. Collective.

    Args:
        passes: the model and its data.
        importance: ``block``, ``loss`` or ``kl``.
        block: layers that go together; contiguous among those that are left.
        remove: layers to remove one block after the other, a multiple of ``block``. Each time, the
            blocks that are left are scored again in the model without those that are gone (kl still
            compares with the whole model). None: score once.

    Returns:
        The first scores, a float32 vector ``layers`` or ``layer_blocks.{block}``, and the removals.
        Scored once, these are the lowest block alone, or none for single layers, whose scores say
        it all. The same on every rank.

    Raises:
        UserError: on every rank; a score is NaN or infinite.
    """
    num_layers = passes.arch.num_layers
    blocks = contiguous(num_layers, block, ())
    scores = score_blocks(passes, importance, blocks, ())
    vectors = {"layers" if block == 1 else f"layer_blocks.{block}": scores}
    if block == 1 and remove is None:
        return vectors, ()
    order = [blocks[lowest(scores)]]
    while len(order) * block < (remove or block):
        removed = sum(order, ())
        blocks = contiguous(num_layers, block, removed)
        order.append(blocks[lowest(score_blocks(passes, importance, blocks, removed))])
    return vectors, tuple(order)


@torch.no_grad()
def score_blocks(
    passes: Passes, importance: str, blocks: Sequence[Layers], removed: Layers
) -> Tensor:
    """Return a score for each of ``blocks`` in the model without ``removed``, [n] float32.

    Collective; the same on every rank.

    Raises:
        UserError: on every rank; a score is NaN or infinite.
    """
    if importance == BLOCK:
        totals = change_totals(passes, blocks, removed)
    else:
        totals = loss_totals(passes, blocks, removed, kl=importance == KL)
    return _means(totals, passes.place.groups)


def score_sublayers(passes: Passes, importance: str) -> dict[str, Tensor]:
    """Score every sub-layer, left out alone. Collective; the same on every rank.

    Returns:
        Float32 vectors ``attention`` and ``mlp``, in the order of the sub-layers of each kind.

    Raises:
        UserError: as ``score_blocks``.
    """
    kinds = {kind: sublayers(passes.arch, kind) for kind in passes.arch.kinds}
    scores = score_blocks(passes, importance, list(chain(*kinds.values())), ())
    return dict(zip(kinds, scores.split([len(x) for x in kinds.values()]), strict=True))


def sublayers(arch: Arch, kind: str) -> list[Layers]:
    """Return the sub-layers of a kind, each to be left out alone."""
    layers = arch.layers_of(kind)
    return [(layer,) if arch.is_hybrid else ((layer, kind),) for layer in layers]


def contiguous(num_layers: int, block: int, removed: Layers) -> list[Layers]:
    """Return every ``block`` layers that follow each other once those ``removed`` are gone."""
    left = [layer for layer in range(num_layers) if layer not in removed]
    return [tuple(left[i : i + block]) for i in range(len(left) - block + 1)]


@contextmanager
def skipped(chunks: Sequence[nn.Module], layers: Layers) -> Iterator[None]:
    """Leave ``layers`` out of ``chunks``: each hands on its input and computes nothing.

    Forward hooks on whole layers still run. Not to be nested.
    """
    mine = []
    for number, layer in _layers_of(chunks):
        stand_ins = {
            number: ("forward", _hand_through),
            (number, "attention"): ("_forward_attention", _hand_through),
            (number, "mlp"): ("_forward_mlp", _hand_on),
            (number, "moe"): ("_forward_mlp", _hand_on),
        }
        mine += [(layer, *stand_ins[each]) for each in stand_ins if each in layers]
    for layer, method, stand_in in mine:
        setattr(layer, method, stand_in)  # found before the method of the class
    try:
        yield
    finally:
        for layer, method, _ in mine:
            delattr(layer, method)


# megatron-core's methods of a layer and of its attention return a pair, that of its MLP a tensor.
def _hand_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    return hidden_states, kwargs.get("context")


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _layers_of(chunks: Sequence[nn.Module]) -> Iterator[tuple[int, nn.Module]]:
    """Yield the transformer layers on this rank with their global numbers from 0."""
    for chunk in chunks:
        for layer in unwrap_model(chunk).decoder.layers:
            yield layer.layer_number - 1, layer


def loss_totals(passes: Passes, blocks: Sequence[Layers], removed: Layers, *, kl: bool) -> Tensor:
    """Sum the losses without ``removed`` and each block in turn, over this rank's samples.

    All models of one micro-batch go through the pipeline together, for the kl the whole one first:
    its logits are the only ones kept, until the next micro-batch.

    Returns:
        [blocks, 2] float64: sum over unmasked tokens and their number; zeros but on the first
        tensor-parallel rank of the last pipeline stage.
    """
    groups, device = passes.place.groups, passes.place.device
    whole: list[Tensor] = []

    def forward_step(jobs: Iterator[Job], model: LanguageModel) -> tuple:
        batch, layers = next(jobs)
        with skipped([model], layers):
            output = model(*inputs(batch), labels=None if kl else batch["labels"])
        return output, partial(report, batch["loss_mask"])

    def report(mask: Tensor, output: Tensor, non_loss_data: bool) -> Tensor:
        if kl:
            whole[:] = whole or [output]
            output = vocab_parallel_kl(
                output, whole[0], vocab_size=passes.arch.vocab_size, tp_group=groups.tp
            ).transpose(0, 1)
        return torch.stack([(output * mask).sum(), mask.sum()]).double()

    totals = torch.zeros(len(blocks), 2, dtype=torch.float64, device=device)
    models = [()] * kl + [(*removed, *block) for block in blocks]
    title = f"depth, {passes.arch.num_layers - len(removed)} layers"
    # Virtual stages take micro-batches by the number of stages.
    spare = -len(models) % groups.pp.size() if len(passes.chunks) > 1 else 0
    with evaluating(passes.chunks, logits=True):
        for batch in passes.batches(title):
            jobs = [(batch, layers) for layers in models + models[-1:] * spare]
            reports = passes.run(jobs, forward_step)[: len(models)]
            if reports and groups.tp.rank() == 0:  # the others hold the same
                totals += torch.stack(reports[-len(blocks) :])
            whole.clear()
    return totals


def change_totals(passes: Passes, blocks: Sequence[Layers], removed: Layers) -> Tensor:
    """Sum 1 - cos(input, output) of each block in the model without ``removed``.

    As many micro-batches as there are pipeline stages run at a time, their hidden states are kept
    by reference. A block that begins on another stage than it ends on is compared where it ends:
    one [s, b, hidden_size] per micro-batch is sent there.

    Returns:
        [blocks, 2] float64: sum over the unmasked positions on this rank and their number; zeros
        on all ranks but one of those that hold the same positions and layers.
    """
    groups, chunks = passes.place.groups, passes.chunks
    is_split = chunks[0].config.sequence_parallel
    stages = _stages(chunks, passes.arch, groups.pp)
    parts = any(isinstance(layer, tuple) for block in blocks for layer in block)

    def forward_step(jobs: Iterator[Job], model: LanguageModel) -> tuple:
        batch, layers = next(jobs)
        with skipped([model], layers):
            return model(*inputs(batch)), lambda output, non_loss_data: None

    totals = torch.zeros(len(blocks), 2, dtype=torch.float64, device=passes.place.device)
    batches = passes.batches(f"depth, {passes.arch.num_layers - len(removed)} layers")
    with evaluating(chunks, logits=False):
        while jobs := [(batch, removed) for batch in islice(batches, groups.pp.size())]:
            with _recorded(chunks, parts=parts) as states:
                passes.run(jobs, forward_step)
                for number, (batch, _) in enumerate(jobs):
                    mask = counted_positions(batch).T  # [s, b]
                    if is_split:
                        mask = mask.chunk(groups.tp.size())[groups.tp.rank()]
                    mine = {layer: seen[number] for layer, seen in states.items()}
                    totals += _changes(mine, mask, blocks, stages, groups.pp)
    return totals if is_split or groups.tp.rank() == 0 else totals.zero_()


@contextmanager
def _recorded(
    chunks: Sequence[nn.Module], *, parts: bool
) -> Iterator[dict[Layer, list[tuple[Tensor, Tensor]]]]:
    """Yield {layer: (input, output) of each forward pass}, [s, b, hidden_size], filled meanwhile.

    By reference: in evaluation megatron-core's layers write into neither. With ``parts``, those of
    the two sub-layers of each layer too: between them is what the norm of the MLP sees.
    """
    states: dict[Layer, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def listen(number: int, layer: nn.Module) -> list[RemovableHandle]:
        between: list[Tensor] = []

        def hook(_: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: tuple) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output  # Mamba's is no tuple
            states[number].append((before, after))
            if parts:
                middle = between.pop()
                states[number, "attention"].append((before, middle))
                for kind in ("mlp", "moe"):  # the layer has one of them
                    states[number, kind].append((middle, output[0]))

        handles = [layer.register_forward_hook(hook, with_kwargs=True)]
        if parts:
            norm = layer.pre_mlp_layernorm
            handles.append(norm.register_forward_pre_hook(lambda _, args: between.append(args[0])))
        return handles

    handles = [each for number, layer in _layers_of(chunks) for each in listen(number, layer)]
    try:
        yield states
    finally:
        states.clear()
        for handle in handles:
            handle.remove()


def _changes(
    states: Mapping[Layer, tuple[Tensor, Tensor]],
    mask: Tensor,
    blocks: Sequence[Layers],
    stages: Sequence[int],
    pp: ProcessGroup,
) -> Tensor:
    """Return [blocks, 2] float64 sums of one micro-batch; zeros for blocks that end elsewhere."""
    totals = torch.zeros(len(blocks), 2, dtype=torch.float64, device=mask.device)
    for block, total in zip(blocks, totals, strict=True):
        first, last = block[0], block[-1]
        before = states[first][0] if first in states else None
        after = states[last][1] if last in states else None
        ends = (stages[each if isinstance(each, int) else each[0]] for each in (first, last))
        before = _hand_over(before, after, *ends, pp)
        if after is not None:
            total.copy_(_change(before, after, mask))
    return totals


def _stages(chunks: Sequence[nn.Module], arch: Arch, pp: ProcessGroup) -> list[int]:
    """Return the rank in ``pp`` of every layer. One collective."""
    stages = torch.zeros(arch.num_layers, dtype=torch.int64, device=torch.cuda.current_device())
    for number, _ in _layers_of(chunks):
        stages[number] = pp.rank()
    torch.distributed.all_reduce(stages, group=pp)
    return stages.tolist()


def _hand_over(
    x: Tensor | None, like: Tensor | None, source: int, target: int, pp: ProcessGroup
) -> Tensor | None:
    """Send ``x`` from rank ``source`` of ``pp`` to ``target``, which returns it.

    ``like`` has the shape and dtype of what is received; only the target needs it.
    """
    if source != target and pp.rank() == source:
        torch.distributed.send(x.contiguous(), group=pp, group_dst=target)
    if source != target and pp.rank() == target:
        x = torch.empty_like(like)
        torch.distributed.recv(x, group=pp, group_src=source)
    return x


def _change(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Return sum mask (1 - cos) and sum mask, [2] float64, of two [s, b, H] and mask [s, b]."""
    num_positions = max(1, CHUNK_NUMEL // before[0].numel())
    change = sum(
        # A layer that changes nothing must not score below 0 by rounding.
        ((1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).clamp_(0, 2) * weight).sum()
        for x, y, weight in zip(
            *(x.split(num_positions) for x in (before, after, mask)), strict=True
        )
    )
    return torch.stack([change, mask.sum()]).double()


def _means(totals: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Return [n] float32 means on the CPU of [n, 2] sums and counts. Three collectives.

    Raises:
        UserError: on every rank; a mean is NaN or infinite.
    """
    for group in (groups.dp_cp, groups.tp, groups.pp):
        torch.distributed.all_reduce(totals, group=group)
    means = (totals[:, 0] / totals[:, 1].clamp_min(1)).float().cpu()
    if not means.isfinite().all():
        raise UserError(
            "depth scores are NaN or infinite: check the weights under --load and the dtype."
        )
    return means
