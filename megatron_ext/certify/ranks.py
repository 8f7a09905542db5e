"""Work of one rank in float64: one step of training, or scores and plans.

Float64 separates mistakes from rounding. megatron-core turns tensors into float32 in places (its
cross entropy, optimizers), whatever they are: here float64 stands for float32.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from tqdm import tqdm

from megatron_ext.arch import Arch
from megatron_ext.certify.trials import Trial
from megatron_ext.checkpoint.checkpoints import sharded_tensors
from megatron_ext.checkpoint.identity import padded_alike
from megatron_ext.data.masked_lm import FRAME, MaskedTokens, SpecialTokens
from megatron_ext.distillation.stored import STORED
from megatron_ext.model.build import LanguageModel, build_model, model_state_dict
from megatron_ext.model.initial import draw
from megatron_ext.model.options import join_ranks, model_options
from megatron_ext.pruning import run as pruning
from megatron_ext.pruning.calibrate import Passes
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores import Scores
from megatron_ext.runtime import platform
from megatron_ext.training import run as training
from megatron_ext.training.loop import step_of, weigh_first_step
from megatron_ext.training.state import Run

SEEDS = STUDENT, TEACHER, DATA = 7, 8, 9
STORED_TOKENS = 8

Piece = tuple[str, tuple[int, ...]]
"""Name of a weight and offset of a rank's part of it: layer and expert first, if it has them."""


def gradients(trial: Trial) -> dict[str, Any]:
    """Take one step on this rank of ``trial``. Collective.

    Returns:
        ``figures``: losses and gradient norm. ``states``: mean and mean square per channel of what
        embedding and layers of each model put out, over all samples, {name: [layers + 1, 2, H]}.
        ``gradients``: what the optimizer took off this rank's pieces, {Piece: tensor}.
    """
    use_float64()
    flags, arch = trial.flags, trial.arch
    place = join_ranks(flags, arch.num_layers)
    options = replace(training.options_of_both(flags, arch, place), params_dtype=torch.float64)
    models = {"student" if trial.teacher else "model": new_model(arch, options, place, STUDENT)}
    teachers: list[LanguageModel] = []
    if trial.teacher is not None:
        layout = trial.teacher_parallel.pipeline_model_parallel_layout
        teacher_options = replace(options, pipeline_model_parallel_layout=layout)
        alike = padded_alike(trial.teacher, arch)
        models["teacher"] = teachers = new_model(alike, teacher_options, place, TEACHER)
    (chunks, *_) = models.values()
    run = training.assemble(flags, arch, chunks, place, trial.teacher, teachers)
    data = samples(arch, flags, flags.batch.global_batch_size)
    make_batches = training.batch_maker(data, flags, place)
    weigh_first_step(run, make_batches)
    states = {name: States(each, place.groups) for name, each in models.items()}
    before = trained_pieces(run)
    batches = [make_batches(0) for _ in run.model]
    losses, apply = step_of(run, batches)
    _, grad_norm, _ = apply()
    if flags.parallel.overlap_param_gather:
        for chunk in run.model:
            chunk.disable_forward_pre_hook()  # gathers what the step updated
    after = trained_pieces(run)
    return {
        "figures": {**losses, "gradient norm": float(grad_norm)},
        "states": {name: each.collect() for name, each in states.items()},
        "gradients": {piece: before[piece] - after[piece] for piece in before},
    }


def scores(trial: Trial) -> dict[str, Any]:
    """Score the model of ``trial`` and plan its targets. Collective.

    Returns:
        ``scores``: {name: vector}, ``plans``: their JSON; of the whole model, on every rank.
    """
    use_float64()
    flags, arch = trial.flags, trial.arch
    place = join_ranks(flags, arch.num_layers)
    has_masks = flags.data.reset_attention_mask
    options = model_options(flags, place, arch.num_layers, has_masks=has_masks)
    options = replace(options, params_dtype=torch.float64)
    passes = Passes(
        chunks=new_model(arch, options, place, TEACHER),
        arch=arch,
        dataset=samples(arch, flags, flags.prune.calibration_samples),
        place=place,
        num_samples=flags.prune.calibration_samples,
        micro_batch_size=flags.batch.micro_batch_size,
        seq_length=flags.batch.seq_length,
        num_workers=0,
    )
    tqdm.set_lock(threading.RLock())  # its own would outlive a rank that is ended
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        vectors, order = pruning.measure(flags, passes, trial.targets)
    settings = pruning.scoring(flags, sublayers=False)
    found = Scores(vectors=vectors, removal_order=order, source=arch, **settings)
    residual = flags.prune.head_residual
    plans = [make_plan(found, arch, target, head_residual=residual) for target in trial.targets]
    return {"scores": vectors, "plans": [plan.to_json() for plan in plans]}


def use_float64() -> None:
    """Let megatron-core take float64 for float32, and keep it. Changes torch for this process."""
    platform.emulate_cuda_on_cpu()
    as_float32, kind = torch.Tensor.float, torch.Tensor.type

    def keep_float64(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if x.dtype == torch.float64 else as_float32(x, *args, **kwargs)

    def kind_of(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = kind(x, *args, **kwargs)
        return found.replace("Double", "Float") if isinstance(found, str) else found

    torch.Tensor.float, torch.Tensor.type = keep_float64, kind_of
    warnings.simplefilter("ignore")  # of a run that is none


@torch.no_grad()
def new_model(arch: Arch, options: Any, place: platform.Platform, seed: int) -> list[LanguageModel]:
    """Return this rank's part of a model with random weights, norms and biases among them."""
    chunks = build_model(arch, options, place.groups, seed=seed)
    for shard in sharded_tensors(model_state_dict(chunks)):
        if len(shard.global_shape) - shard.prepend_axis_num == 1:
            shard.data.add_(draw(shard, seed, 0.2))
    return chunks


def samples(arch: Arch, flags: Any, number: int) -> list[dict[str, Tensor]]:
    """Return ``number`` random samples, [s] each, as the flags have them made from data.

    The last token ends documents; about a fifth of the tokens counts in no loss.
    """
    generator = torch.Generator().manual_seed(DATA)
    length, eod = flags.batch.seq_length, arch.vocab_size - 1
    windows = []
    for _ in range(number):
        text = torch.randint(arch.vocab_size, (length + 1,), generator=generator)
        mask, counted, positions = _get_ltor_masks_and_position_ids(
            text[:-1],
            eod,
            flags.data.reset_position_ids,
            flags.data.reset_attention_mask,
            flags.data.eod_mask_loss,
            flags.data.reset_attention_mask,
        )
        window = {"tokens": text[:-1], "labels": text[1:], "position_ids": positions}
        window["loss_mask"] = counted * (torch.rand(length, generator=generator) > 0.2).float()
        if mask is not None:
            window["attention_mask"] = mask
        distill = getattr(flags, "distill", None)
        if distill is not None and distill.kd_teacher_store is not None:
            likely = torch.randn(length, arch.vocab_size, generator=generator).log_softmax(-1)
            top = likely.topk(distill.kd_top_k or STORED_TOKENS)
            window |= dict(zip(STORED, (top.indices, top.values), strict=True))
        windows.append(window)
    return masked(windows, arch) if arch.is_bert else windows


def masked(windows: list[dict[str, Tensor]], arch: Arch) -> list[dict[str, Tensor]]:
    """Return samples of a masked language model, text and padding of other lengths in each."""
    special = SpecialTokens(cls=0, sep=1, mask=2, pad=3, eod=4, vocab_size=arch.vocab_size)
    for number, window in enumerate(windows):
        window["tokens"] = window["tokens"][FRAME:]
        is_text = torch.arange(len(window["tokens"])) < len(window["tokens"]) - number % 4
        window["loss_mask"] = is_text.float()
    data = MaskedTokens(windows, special, DATA)
    return [data[number] for number in range(len(windows))]


def trained_pieces(run: Run) -> dict[Piece, Tensor]:
    """Return a copy of this rank's pieces of what is trained."""
    state = model_state_dict(run.chunks) | run.wrapped.hidden.sharded_state()
    return {
        (shard.key, tuple(shard.global_offset)): shard.data.detach().clone()
        for shard in sharded_tensors(state)
    }


class States:
    """Means over positions of the residual stream behind embedding and layers, and of its square.

    They depend on no layout: of each rank the sums are kept, and added in ``collect``.
    """

    def __init__(self, chunks: list[LanguageModel], groups: ProcessGroupCollection):
        """Hook the modules of ``chunks``."""
        config = chunks[0].config
        self.groups, self.is_split = groups, config.sequence_parallel
        self.sums = torch.zeros(config.num_layers + 1, 2, config.hidden_size, dtype=torch.float64)
        self.counts = torch.zeros(config.num_layers + 1, 1, 1, dtype=torch.float64)
        for row, module in self._modules(chunks):
            module.register_forward_hook(self._adding(row))

    def _modules(self, chunks: list[LanguageModel]) -> Iterator[tuple[int, nn.Module]]:
        for chunk in chunks:
            if chunk.pre_process:
                yield 0, chunk.embedding
            block = chunk.encoder if hasattr(chunk, "encoder") else chunk.decoder
            for layer in block.layers:
                yield layer.layer_number, layer

    def _adding(self, row: int) -> Any:
        @torch.no_grad()
        def add(_: nn.Module, args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output  # [s, b, H]
            x = x.detach().flatten(0, 1).double()
            self.sums[row] += torch.stack([x.sum(0), x.square().sum(0)])
            self.counts[row] += len(x)

        return add

    def collect(self) -> Tensor:
        """Return the means [layers + 1, 2, H], on every rank. Three collectives for each of two."""
        if not self.is_split and self.groups.tp.rank() > 0:  # all of them hold the same
            self.sums.zero_()
            self.counts.zero_()
        for group in (self.groups.dp_cp, self.groups.tp, self.groups.pp):
            torch.distributed.all_reduce(self.sums, group=group)
            torch.distributed.all_reduce(self.counts, group=group)
        return self.sums / self.counts
