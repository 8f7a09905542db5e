"""Hooks, losses and checkpoints of Transformer Engine's kind of layers equal those of local ones.

The layers are a stand-in (``tests.engine``); ``tools/gpu_check.sh`` compares the real ones.
"""

import io
import pickle
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.checkpoint import checkpoints, safe_load, writer
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.pruning.depth import skipped
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.targets import target_arch
from megatron_ext.pruning.trim import trimmed_share
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from tests.engine import ENGINE, NormLinear, stand_in
from tests.models import GPT2, LLAMA, MOE, NEMOTRON, WINDOWS, random_batch
from tests.ranks import run_ranks
from tests.test_hidden import trained
from tests.test_importance import score_model
from tests.test_scores import random_scores

MODELS = {
    "llama": LLAMA,
    "windows": replace(WINDOWS, sandwich_norm=False),
    "gpt2": GPT2,
    "nemotron": NEMOTRON,
    "moe": MOE,
}
TP2 = ({"tensor_model_parallel_size": 2}, {"sequence_parallel": True})
PP2 = ({"pipeline_model_parallel_size": 2}, {})


def both(function, *args):
    """Return ``function``'s results with local layers and with the others; options come last."""
    local = function(*args)
    parallel_state.destroy_model_parallel()
    stand_in()
    return local, function(*args[:-1], args[-1] | ENGINE)


def logits(arch, chunks):
    batch = random_batch(arch, num_samples=2, seq_length=16)
    (model,) = chunks
    return model.eval()(batch["tokens"], batch["position_ids"], None).detach()


@pytest.mark.parametrize(
    ("name", "world_size", "layout"),
    [*((name, 1, ({}, {})) for name in MODELS), ("llama", 2, TP2), ("nemotron", 2, PP2)],
)
def test_scores_see_the_norms_inside_linear_layers(name, world_size, layout):
    for local, engine in run_ranks(world_size, both, score_model, MODELS[name], *layout):
        for scores, others in zip(local, engine, strict=True):
            assert scores.keys() == others.keys()
            assert all(torch.equal(scores[key], others[key]) for key in scores)


@pytest.mark.parametrize("layout", [(1, {}, {}), (2, *TP2)], ids=["serial", "TP2"])
@pytest.mark.parametrize("case", ["cosine, one map", "LayerNorm, tied"])
def test_hidden_state_losses_train_alike(case, layout):
    world_size, *layout = layout
    for local, engine in run_ranks(world_size, both, trained, case, *layout):
        for step, other in zip(local[0], engine[0], strict=True):
            assert step == pytest.approx(other, rel=1e-9)
        assert local[1].keys() == engine[1].keys()
        for key, tensor in local[1].items():
            torch.testing.assert_close(engine[1][key], tensor, rtol=1e-9, atol=1e-12)


def logits_without_a_layer(arch, options):
    groups = platform.initialize().groups
    chunks = build_model(arch, ModelOptions(**options), groups, seed=7)
    with skipped(chunks, (1, 2)):
        return logits(arch, chunks)


def test_layers_are_left_out_alike():
    assert torch.equal(*run_ranks(1, both, logits_without_a_layer, NEMOTRON, {})[0])


# Checkpoints.


def save(folder, arch, chunks):
    content = {**model_state_dict(chunks), "args": Namespace(**arch.to_args())}
    writer.save(folder, checkpoints.RELEASE, content, files={})


def save_and_load(folder, arch, written, read, remembered=None):
    """Return the logits of a model, of what another one loads of it, and what that remembers."""
    stand_in()
    groups = platform.initialize().groups
    chunks = build_model(arch, ModelOptions(**written), groups, seed=5)
    for module in (m for m in chunks[0].modules() if isinstance(m, NormLinear)):
        module.remembered = remembered() if callable(remembered) else remembered
    save(folder, arch, chunks)
    others = build_model(arch, ModelOptions(**read), groups, seed=6)
    restore_weights(others, checkpoints.read(folder))
    known = [m.remembered for m in others[0].modules() if isinstance(m, NormLinear)]
    return logits(arch, chunks), logits(arch, others), known


@pytest.mark.parametrize("name", ["gpt2", "nemotron", "moe"])
@pytest.mark.parametrize(("written", "read"), [({}, ENGINE), (ENGINE, {}), (ENGINE, ENGINE)])
def test_either_kind_of_layers_reads_the_other(name, written, read, tmp_path):
    args = (str(tmp_path), MODELS[name], written, read)
    ((before, after, _),) = run_ranks(1, save_and_load, *args)
    assert torch.equal(before, after)


SCALES = {"scale_fwd": torch.tensor([2.0, 4.0]), "extra_fp8_variables": {"num_gemms": 1}}


def test_scales_of_fp8_are_read_where_there_is_use_for_them(tmp_path):
    ((_, _, known),) = run_ranks(1, save_and_load, str(tmp_path), LLAMA, ENGINE, ENGINE, SCALES)
    assert len(known) == 2 * LLAMA.num_layers
    assert all(torch.equal(found["scale_fwd"], SCALES["scale_fwd"]) for found in known)
    ((before, after, known),) = run_ranks(
        1, save_and_load, str(tmp_path), LLAMA, ENGINE, {}, SCALES
    )
    assert torch.equal(before, after)
    assert not known


class Harmful:
    def __reduce__(self):
        return print, ("run by a checkpoint",)


def test_scales_that_would_run_code_are_refused(tmp_path, capfd):
    with pytest.raises(AssertionError, match=r"asks for builtins\.print, which is refused"):
        run_ranks(1, save_and_load, str(tmp_path), LLAMA, ENGINE, ENGINE, Harmful)
    assert "run by a checkpoint" not in capfd.readouterr().out


def test_scales_as_old_versions_hold_them():
    for content in (SCALES, {"recipe": Harmful()}):
        file = io.BytesIO()
        torch.save(content, file)
        if content is SCALES:
            safe_load.check_extra_state(file)
            continue
        with pytest.raises(pickle.UnpicklingError, match="which is refused"):
            safe_load.check_extra_state(file)


def trim_and_load(folder, arch, sizes, remembered):
    """Return the logits of both kinds of layers, loaded from what is left of a checkpoint."""
    stand_in()
    groups = platform.initialize().groups
    chunks = build_model(arch, ModelOptions(**ENGINE), groups, seed=5)
    for module in (m for m in chunks[0].modules() if isinstance(m, NormLinear)):
        module.remembered = remembered
    save(f"{folder}/whole", arch, chunks)
    target = target_arch(arch, **sizes)
    plan = make_plan(random_scores(arch), arch, target)
    share = trimmed_share(SliceReader(f"{folder}/whole/release"), plan, 0, 1)
    content = {"model": share, "args": Namespace(**target.to_args())}
    writer.save(f"{folder}/trimmed", checkpoints.RELEASE, content, files={})
    results = []
    for options in ({}, ENGINE):
        others = build_model(target, ModelOptions(**options), groups, seed=6)
        restore_weights(others, checkpoints.read(f"{folder}/trimmed"))
        results.append(logits(target, others))
        assert not any(getattr(m, "remembered", None) for m in others[0].modules())
    return results


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nemotron", {"num_layers": 3, "hidden_size": 20, "ffn_hidden_size": 33}),
        ("moe", {"num_layers": 2, "num_experts": 3, "hidden_size": 20}),
    ],
)
def test_a_trimmed_checkpoint_loads_into_either(name, sizes, tmp_path):
    args = (str(tmp_path), MODELS[name], sizes, SCALES)
    assert torch.equal(*run_ranks(1, trim_and_load, *args)[0])


def test_a_weight_that_is_missing_is_still_an_error(tmp_path):
    arch = replace(LLAMA, num_layers=3)
    with pytest.raises(AssertionError, match="does not fit this model"):
        run_ranks(1, load_other, str(tmp_path), LLAMA, arch)


def load_other(folder, arch, other):
    stand_in()
    groups = platform.initialize().groups
    save(folder, arch, build_model(arch, ModelOptions(), groups, seed=5))
    chunks = build_model(other, ModelOptions(**ENGINE), groups)
    try:
        restore_weights(chunks, checkpoints.read(folder))
    except UserError as error:
        raise AssertionError(str(error)) from error
