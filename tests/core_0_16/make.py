"""Write checkpoints and what comes of them: python -m tests.core_0_16.make FOLDER.

Ran once, under megatron-core 0.16.1 (README.md). Under another version FOLDER is what that one
writes, to compare.
"""

import hashlib
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

from megatron_ext.checkpoint import checkpoints, writer
from megatron_ext.checkpoint.saved_args import complete
from megatron_ext.cli.programs import megatron_command_line
from megatron_ext.model.build import build_model, model_state_dict
from megatron_ext.model.config import ModelOptions
from megatron_ext.runtime import platform
from megatron_ext.training import saving
from tests.models import LLAMA, MOE
from tests.programs import logits_of, read_model, read_tensors
from tests.ranks import run_ranks
from tests.test_checkpoint import do_steps, make_run, turn_dropout_off

SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 8,
    "ffn_hidden_size": 8,
    "vocab_size": 14,
    "padded_vocab_size": 16,
}
DENSE = replace(LLAMA, **SIZES)
EXPERTS = replace(
    MOE,
    **SIZES,
    num_experts=2,
    moe_router_topk=1,
    moe_ffn_hidden_size=4,
    moe_shared_expert_intermediate_size=4,
    moe_aux_loss_coeff=0.1,
)
DISTRIBUTED = ["--use-distributed-optimizer", "--no-save-rng"]
# name: model, ranks, flags; after two steps, with the state of training.
TRAINED = {
    "dense": (DENSE, 1, []),
    "dense_distributed": (DENSE, 2, ["--bf16", *DISTRIBUTED]),
    "experts": (EXPERTS, 2, [*DISTRIBUTED, "--expert-model-parallel-size", "2"]),
}
RELEASE = "release"


def main(folder):
    os.chdir(folder)  # the names that are typed are saved
    expected = {}
    for name, (arch, world_size, flags) in TRAINED.items():
        steps = run_ranks(world_size, train, arch, name, flags)[0]
        expected[name] = {"steps": steps, **what_is_read(name)}
    run_ranks(1, release, RELEASE)
    expected[RELEASE] = what_is_read(RELEASE)
    for name in expected:
        with tarfile.open(f"{name}.tar.xz", "w:xz") as archive:
            archive.add(name, filter=anonymous)
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def anonymous(member):
    member.uname = member.gname = ""
    member.uid = member.gid = member.mtime = 0
    return member


def train(arch, folder, flags):
    """Save after two steps, and return losses and gradient norms of three more."""
    run = make_run(arch, folder, flags)
    do_steps(run, 0, 2)
    saving.save(run)
    return three_more(run, flags)


def go_on(arch, folder, flags):
    """Return losses and gradient norms of three steps from the state on disk."""
    run = make_run(arch, folder, flags, seed=99)
    saving.restore(run, checkpoints.read(folder))
    return three_more(run, flags)


def three_more(run, flags):
    if "--no-save-rng" in flags:
        turn_dropout_off(run)
    return do_steps(run, 2, 5)


def release(folder):
    groups = platform.initialize().groups
    chunks = build_model(DENSE, ModelOptions(), groups, seed=7)
    weights = model_state_dict(chunks) | {"args": complete(DENSE, {}), "iteration": 0}
    files = {"megatron_args.sh": megatron_command_line(DENSE) + "\n"}
    writer.save(folder, checkpoints.RELEASE, weights, files=files)


def what_is_read(folder):
    """Return what a reader of another version must find: arguments, tensors, logits."""
    source = checkpoints.read(folder)
    return {
        "args": hashlib.sha256(repr(sorted(source.args.items())).encode()).hexdigest(),
        "tensors": {k: digest(x) for k, x in sorted(read_tensors(folder).items())},
        "logits": run_ranks(1, some_logits, folder)[0],
    }


def digest(tensor):
    import torch

    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def some_logits(folder):
    """Return the float64 logits of the last position, and their sum over all positions."""
    model = read_model(folder)
    logits = logits_of(model, checkpoints.read(folder).arch)
    return [*logits[-1, 0].tolist(), logits.sum().item()]


if __name__ == "__main__":
    main(sys.argv[1])
