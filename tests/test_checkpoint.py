"""Checkpoint folders: resume bit for bit, any layout reads any other's, damage is seen."""

import contextlib
import io
import json
import os
import pickle
import re
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_ext.arch import shape, weights
from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.checkpoints import sharded_tensors
from megatron_ext.cli.fit import virtual_pipeline_size
from megatron_ext.cli.programs import parse_train
from megatron_ext.model import build
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from megatron_ext.training import saving, state
from megatron_ext.training.loop import step_of
from tests.models import GPT2, LLAMA, MOE, random_batch
from tests.ranks import run_ranks

SEQ_LENGTH = 16
LAYOUTS = {
    "TP1": (1, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "VPP": (
        2,
        ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
    ),
    "DP2": (2, []),
    "DP2 distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "TP2xPP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}
EP2 = ["--expert-model-parallel-size", "2"]
EXPERT_LAYOUTS = {
    "TP1": (1, []),
    "TP2": LAYOUTS["TP2"],
    "EP2": (2, EP2),
    "EP2 distributed optimizer": (2, [*EP2, "--use-distributed-optimizer"]),
    "EP2xPP2 distributed optimizer": (
        4,
        [*EP2, "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"],
    ),
}


def make_run(arch, folder, extra, *, seed=7):
    """Return a run of ``arch`` under the flags ``extra``, with dropout on."""
    argv = (
        f"--load {folder} --save {folder} --save-interval 1 --mock-data --lr 0.01 --train-iters 9 "
        f"--tokenizer-type NullTokenizer --vocab-size {arch.vocab_size} --micro-batch-size 1 "
        f"--global-batch-size 4 --seq-length {SEQ_LENGTH} --lr-warmup-iters 2"
    )
    flags = parse_train([*argv.split(), *extra], torch.distributed.get_world_size())
    pieces = virtual_pipeline_size(flags.parallel, arch.num_layers)
    place = platform.initialize(
        tensor_model_parallel_size=flags.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=flags.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=pieces,
        expert_model_parallel_size=flags.parallel.expert_model_parallel_size,
    )
    options = ModelOptions(
        params_dtype=torch.bfloat16 if flags.precision.bf16 else torch.float32,
        sequence_parallel=flags.parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=pieces,
        overlap_p2p_comm=bool(pieces),
    )
    arch = replace(arch, hidden_dropout=0.1, attention_dropout=0.1)
    chunks = build_model(arch, options, place.groups, seed=seed)
    losses = {"objective": {"lm loss": 1.0}, "eval_losses": ("lm loss",), "flops_per_token": 1.0}
    return state.make_run(flags, arch, place.groups, chunks, chunks, **losses)


def do_steps(run, first, last):
    """Train steps [first, last) and return their losses and gradient norms."""
    results = []
    for iteration in range(first, last):
        batch = random_batch(run.arch, num_samples=4, seq_length=SEQ_LENGTH, seed=iteration)
        dp, per_rank = run.groups.dp, 4 // run.groups.dp.size()
        own = range(dp.rank() * per_rank, (dp.rank() + 1) * per_rank)
        parts = [{key: x[i : i + 1] for key, x in batch.items()} for i in own]
        batches = [iter(parts) for _ in run.model]
        losses, apply = step_of(run, batches)
        results.append((losses["lm loss"], apply()[1]))
        run.schedule.step(increment=4)
        run.counters.iteration += 1
        run.counters.consumed_train_samples += 4
    return results


def weights_of(run):
    """Return this rank's weights by place."""
    return {
        (s.key, s.global_offset): s.data.clone()
        for s in sharded_tensors(model_state_dict(run.chunks))
    }


def uninterrupted(arch, folder, extra):
    run = make_run(arch, folder, extra)
    do_steps(run, 0, 2)
    saving.save(run)
    return do_steps(run, 2, 5), weights_of(run)


def resumed(arch, folder, extra):
    run = make_run(arch, folder, extra, seed=99)
    saving.restore(run, checkpoints.read(folder))
    assert run.counters.iteration == 2
    assert run.counters.consumed_train_samples == 8
    return do_steps(run, 2, 5), weights_of(run)


# In float32 optimizers hold the moments of what bf16 adds weights to: each of the two kinds once,
# and more layouts in test_pretrain_distill.py.
@pytest.mark.parametrize(
    ("layout", "bf16"),
    [
        *((layout, ["--bf16"]) for layout in LAYOUTS),
        *((layout, []) for layout in ("TP1", "DP2 distributed optimizer")),
    ],
)
def test_resume_is_bit_for_bit(layout, bf16, tmp_path):
    world_size, extra = LAYOUTS[layout]
    check_resume(LLAMA, world_size, [*extra, *bf16], tmp_path)


@pytest.mark.parametrize(
    ("layout", "bf16"), [("EP2", []), ("EP2xPP2 distributed optimizer", ["--bf16"])]
)
def test_resume_of_experts_is_bit_for_bit(layout, bf16, tmp_path):
    world_size, extra = EXPERT_LAYOUTS[layout]
    check_resume(MOE, world_size, [*extra, *bf16], tmp_path)


@pytest.mark.parametrize("extra", [[], ["--bf16"], ["--sgd-momentum", "0"]])
@pytest.mark.parametrize("layout", ["TP1", "TP2"])
def test_resume_of_sgd_is_bit_for_bit(layout, extra, tmp_path):
    """Regression: megatron-core calls a function that makes SGD's state, which it has not."""
    world_size, flags = LAYOUTS[layout]
    check_resume(LLAMA, world_size, [*flags, *extra, "--optimizer", "sgd"], tmp_path)


def check_resume(arch, world_size, extra, tmp_path):
    before = run_ranks(world_size, uninterrupted, arch, str(tmp_path), extra)
    after = run_ranks(world_size, resumed, arch, str(tmp_path), extra)
    for (losses, held), (losses_after, held_after) in zip(before, after, strict=True):
        assert losses == losses_after
        assert held.keys() == held_after.keys()
        assert all(torch.equal(held[key], held_after[key]) for key in held)


def resumed_without_optimizer(folder, extra):
    """Return how far a step with a fresh optimizer moves the weights, relative to their size."""
    run = make_run(LLAMA, folder, [*extra, "--no-load-optim", "--lr", "0.002"], seed=99)
    saving.restore(run, checkpoints.read(folder))
    before = weights_of(run)
    assert run.schedule.num_steps == 2 * 4, "the schedule begins anew"
    do_steps(run, 2, 4)
    after = weights_of(run)
    return max(((after[k] - x).norm() / x.norm()).item() for k, x in before.items())


@pytest.mark.parametrize(
    "extra", [[], ["--bf16"], ["--bf16", "--use-distributed-optimizer"]], ids=str
)
def test_without_its_state_an_optimizer_begins_at_the_weights(extra, tmp_path):
    run_ranks(1, uninterrupted, LLAMA, str(tmp_path), extra)
    (moved,) = run_ranks(1, resumed_without_optimizer, str(tmp_path), extra)
    assert 0 < moved < 0.2


def written_on_another_device(folder):
    """Return the message of a run that continues with a checkpoint whose generator is another."""
    run = make_run(GPT2, folder, ["--no-load-optim"])
    generator = torch.cuda.get_rng_state
    torch.cuda.get_rng_state = lambda: torch.zeros(16, dtype=torch.uint8)  # as CUDA's
    saving.save(run)
    torch.cuda.get_rng_state = generator
    with contextlib.redirect_stderr(io.StringIO()) as said:
        saving.restore(run, checkpoints.read(folder))
    do_steps(run, 0, 1)
    return said.getvalue()


def test_random_state_of_another_device_is_left(tmp_path):
    assert "another kind of device" in run_ranks(1, written_on_another_device, str(tmp_path))[0]


def resume_elsewhere(arch, folder, extra):
    """Load and train a step without dropout, which is the only thing that a layout may change."""
    run = make_run(arch, folder, extra, seed=99)
    saving.restore(run, checkpoints.read(folder))
    turn_dropout_off(run)
    return do_steps(run, 2, 4)


def turn_dropout_off(run):
    for chunk in run.chunks:
        chunk.config.attention_dropout = 0.0
        for module in chunk.modules():
            if isinstance(module, torch.nn.Dropout) or hasattr(module, "dropout"):
                module.p = module.dropout = 0.0
            if hasattr(module, "hidden_dropout"):
                module.hidden_dropout = 0.0


ARCHS = {"llama": LLAMA, "gpt2": GPT2}


# The first and the last stage each hold a copy of the tied embeddings of "gpt2".
@pytest.mark.parametrize(
    ("name", "written"),
    [
        *(("llama", layout) for layout in ("TP1", "TP2xPP2", "VPP", "DP2 distributed optimizer")),
        *(("gpt2", layout) for layout in ("TP2xPP2", "DP2 distributed optimizer")),
    ],
)
def test_any_layout_reads_any_other(name, written, tmp_path):
    readers = [LAYOUTS[x] for x in ("TP1", "TP2", "PP2", "DP2")]
    check_reads(ARCHS[name], LAYOUTS[written], readers, tmp_path)


@pytest.mark.parametrize("written", ["TP1", "EP2 distributed optimizer"])
def test_any_number_of_ranks_reads_experts(written, tmp_path):
    readers = [EXPERT_LAYOUTS[x] for x in ("TP1", "TP2", "EP2")]
    check_reads(MOE, EXPERT_LAYOUTS[written], readers, tmp_path)


def written_by_megatron(arch, folder):
    """Write a checkpoint without expert parallelism as Megatron-LM does: one optimizer for all."""
    build_chunk = build._build_chunk

    def build_plain(*args):
        chunk = build_chunk(*args)
        for parameter in chunk.parameters():
            parameter.allreduce = True
        return chunk

    build._build_chunk = build_plain
    return uninterrupted(arch, folder, [])


def test_optimizer_state_that_holds_experts_with_the_rest_is_refused(tmp_path):
    run_ranks(1, written_by_megatron, MOE, str(tmp_path))
    with pytest.raises(AssertionError, match="experts and other weights together"):
        run_ranks(1, resumed, MOE, str(tmp_path), [])
    run_ranks(1, resumed, MOE, str(tmp_path), ["--no-load-optim"])


def check_reads(arch, written, readers, tmp_path):
    world_size, extra = written
    run_ranks(world_size, uninterrupted, arch, str(tmp_path), extra)
    kind = ["--use-distributed-optimizer"] * ("--use-distributed-optimizer" in extra)
    results = []
    for world_size, extra in readers:
        args = (arch, str(tmp_path), extra + kind)
        results.append(run_ranks(world_size, resume_elsewhere, *args)[0])
    for (_, extra), steps in zip(readers, results, strict=True):
        for step, reference in zip(steps, results[0], strict=True):
            assert step == pytest.approx(reference, rel=2e-6), extra


def write(folder, arch, iteration=3, name=None):
    place = platform.initialize()
    chunks = build_model(arch, ModelOptions(), place.groups, seed=5)
    args = Namespace(**arch.to_args(), consumed_train_samples=0)
    common = {"args": args, "iteration": iteration}
    name = name or checkpoints.iteration_name(iteration)
    writer.save(folder, name, model_state_dict(chunks) | common, files={"note.txt": "hello"})


@pytest.mark.parametrize("arch", [LLAMA, MOE], ids=["llama", "moe"])
def test_tensors_on_disk_are_those_of_the_table(arch, tmp_path):
    """Names too, which are Transformer Engine's: either kind of layers reads the other's."""
    run_ranks(1, write, str(tmp_path), arch)
    found = dist_checkpointing.load_tensors_metadata(str(tmp_path / "iter_0000003"))
    expected = {
        weight.key: (*[arch.num_layers] * weight.per_layer, *shape(weight, arch))
        for weight in weights(arch)
    }
    assert {key: tuple(tensor.global_shape) for key, tensor in found.items()} == expected
    if arch is MOE:
        assert expected["decoder.layers.pre_mlp_layernorm.weight"] == (4, 24)
        assert expected["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (4, 4, 44, 24)


def read_into(folder, arch):
    """Return the message with which loading into a model of ``arch`` fails, or None."""
    place = platform.initialize()
    chunks = build_model(arch, ModelOptions(), place.groups, seed=6)
    try:
        checkpoints.verify_integrity(checkpoints.find(folder))
        restore_weights(chunks, checkpoints.read(folder))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"padded_vocab_size": 112}, ["output_layer.weight", "[104, 48]", "[112, 48]"]),
        ({"num_layers": 2}, ["mlp.linear_fc2.weight", "[4, 48, 80]", "[2, 48, 80]"]),
        ({"untie_embeddings_and_output_weights": False}, ["output_layer.weight", "-"]),
        ({"normalization": "LayerNorm"}, ["final_layernorm.bias", "-", "[48]"]),
    ],
    ids=["vocabulary", "fewer layers", "untied into tied", "norm"],
)
def test_strict_loading_names_what_differs(change, words, tmp_path):
    """megatron-core's default takes all of these without a word."""
    run_ranks(1, write, str(tmp_path), LLAMA)
    (message,) = run_ranks(1, read_into, str(tmp_path), replace(LLAMA, **change))
    assert "does not fit this model" in message
    assert all(word in message for word in words), message


def test_missing_optimizer_state_says_what_to_type(tmp_path):
    run_ranks(1, write, str(tmp_path), LLAMA)
    with pytest.raises(AssertionError, match="--no-load-optim"):
        run_ranks(1, resumed, LLAMA, str(tmp_path), [])


def test_damage_is_named_on_every_rank(tmp_path):
    run_ranks(2, write, str(tmp_path), LLAMA)
    shard = next((tmp_path / "iter_0000003").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    messages = run_ranks(2, read_into, str(tmp_path), LLAMA)
    assert all(f"{shard} is damaged" in message for message in messages)
    shard.unlink()
    messages = run_ranks(2, read_into, str(tmp_path), LLAMA)
    assert all(f"{shard} is missing" in message for message in messages)
    shard.mkdir()  # an error of reading that one rank alone meets
    messages = run_ranks(2, read_into, str(tmp_path), LLAMA)
    assert all(f"{shard} cannot be read: Is a directory" in message for message in messages)
    (shard.parent / checkpoints.INTEGRITY).write_text("{")
    messages = run_ranks(2, read_into, str(tmp_path), LLAMA)
    assert all("integrity.json cannot be read: " in message for message in messages)


def test_what_holds_the_args_is_named_where_it_cannot_be_read(tmp_path):
    run_ranks(1, write, str(tmp_path), LLAMA)
    (shard,) = (tmp_path / "iter_0000003").glob("*.distcp")
    content = shard.read_bytes()
    damages = {
        f"{shard} is missing": shard.unlink,
        f"{shard} cannot be read: Is a directory": shard.mkdir,
        "common_state/shard_0_1 cannot be read: ": lambda: shard.write_bytes(bytes(len(content))),
        ".metadata cannot be read: ": lambda: (shard.parent / ".metadata").write_text("{"),
    }
    for said, damage in damages.items():
        damage()
        with pytest.raises(UserError, match=re.escape(said)):
            checkpoints.read(str(tmp_path))
        if shard.is_dir():
            shard.rmdir()


def save_that_dies(folder, arch, phase):
    """Write iteration 3, then be killed in the given phase of writing iteration 4."""
    write(folder, arch)

    def die(*_, **__):
        os._exit(9)

    if phase == "shards":
        torch.distributed.checkpoint.FileSystemWriter.write_data = die
    elif phase == "metadata":
        dist_checkpointing.serialization.save_config = die
    elif phase == "publish":
        writer._finish = die
    elif phase == "tracker":
        writer.write_text = die
    place = platform.Platform(torch.device("cpu"), None, 0, 1)
    assert place.rank == 0
    chunks = build_model(arch, ModelOptions(), groups_now(), seed=8)
    common = {"args": Namespace(**arch.to_args()), "iteration": 4}
    writer.save(folder, "iter_0000004", model_state_dict(chunks) | common, files={})


def groups_now():
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


@pytest.mark.parametrize("phase", ["shards", "metadata", "publish", "tracker"])
def test_a_kill_while_saving_leaves_a_good_checkpoint(phase, tmp_path):
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, save_that_dies, str(tmp_path), LLAMA, phase)
    assert checkpoints.read(str(tmp_path)).iteration == 3
    assert run_ranks(1, read_into, str(tmp_path), LLAMA) == [None]
    run_ranks(1, write, str(tmp_path), LLAMA, 5)  # a later save clears what was left
    assert not list(tmp_path.glob(".*.tmp"))
    assert checkpoints.read(str(tmp_path)).iteration == 5


def save_that_fails(folder, arch, reason):
    write(folder, arch)

    def full(*_, **__):
        raise OSError(28, reason)

    def unreadable(path):
        if torch.distributed.get_rank() == 1:
            raise OSError(5, reason)
        return checkpoints.sha256(path)

    def silent(*_, **__):
        raise AssertionError

    if reason == "No space left on device":
        torch.distributed.checkpoint.FileSystemWriter.write_data = full
    elif reason == "Input/output error":
        writer.sha256 = unreadable
    else:
        dist_checkpointing.save = silent
    try:
        chunks = build_model(arch, ModelOptions(), groups_now(), seed=8)
        writer.save(
            folder,
            "iter_0000004",
            model_state_dict(chunks) | {"args": Namespace(), "iteration": 4},
            files={},
        )
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    "reason", ["No space left on device", "Input/output error", "AssertionError()"]
)
def test_a_full_or_bad_disk_keeps_the_old_checkpoint(reason, tmp_path):
    """The second error meets one rank alone, the third says nothing."""
    messages = run_ranks(2, save_that_fails, str(tmp_path), LLAMA, reason)
    assert all(reason in m and "GiB are free" in m for m in messages)
    assert checkpoints.read(str(tmp_path)).iteration == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000003",
        "latest_checkpointed_iteration.txt",
    ]


def test_tracker_missing_wrong_or_empty(tmp_path, capsys):
    run_ranks(1, write, str(tmp_path), LLAMA, 3)
    run_ranks(1, write, str(tmp_path), LLAMA, 7)
    tracker = tmp_path / checkpoints.TRACKER
    assert tracker.read_text() == "7"
    for text in ("", "nonsense", "12"):
        tracker.write_text(text)
        assert checkpoints.find(str(tmp_path)).name == "iter_0000007"
        assert "WARNING" in capsys.readouterr().err
    tracker.unlink()
    (tmp_path / "iter_0000007" / "metadata.json").write_text("")  # an unfinished save
    assert checkpoints.find(str(tmp_path)).name == "iter_0000003"
    assert checkpoints.find(str(tmp_path / "iter_0000003")).name == "iter_0000003"
    with pytest.raises(UserError, match=r"--ckpt-step 7: .*metadata\.json"):
        checkpoints.find(str(tmp_path), 7)
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoints.read(str(tmp_path / "nothing"))


def test_release_and_extra_files(tmp_path):
    run_ranks(1, write, str(tmp_path), LLAMA, 0, checkpoints.RELEASE)
    source = checkpoints.read(str(tmp_path))
    assert (source.folder.name, source.iteration, source.arch) == ("release", 0, LLAMA)
    assert (source.folder / "note.txt").read_text() == "hello"
    integrity = json.loads((source.folder / checkpoints.INTEGRITY).read_text())
    assert integrity["algorithm"] == "sha256"
    assert {".metadata", "metadata.json", "__0_0.distcp"} == integrity["files"].keys()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_only_plain_data_is_unpickled(name, tmp_path):
    run_ranks(1, write, str(tmp_path), LLAMA)
    folder, mark = tmp_path / "iter_0000003", tmp_path / "executed"
    (folder / checkpoints.INTEGRITY).unlink()
    if name == "common.pt":
        torch.save({"args": Malicious(str(mark))}, folder / name)
        with pytest.raises(UserError, match=r"common\.pt cannot be read"):
            checkpoints.read(str(tmp_path))
    else:
        (folder / name).write_bytes(pickle.dumps(Malicious(str(mark))))
        (message,) = run_ranks(1, read_into, str(tmp_path), LLAMA)
        assert "refused" in message
    assert not mark.exists()
