"""Checkpoints that Megatron-LM and Megatron Bridge wrote: tests/foreign/README.md."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import checkpoints
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.open import restore_weights
from megatron_ext.runtime import platform
from tests.core_0_16.make import DENSE
from tests.programs import assert_same_bytes, read_tensors, succeed
from tests.ranks import run_ranks

FOLDER = Path(__file__).parent / "foreign"
EXPECTED = json.loads((FOLDER / "logits.json").read_text())
# Bridge was given no number of tokens beside that of rows; its factor, 1, scales nothing.
BRIDGE = replace(DENSE, vocab_size=16, rope_scaling_factor=1.0)
ARCHS = {
    "megatron-0.17.1": DENSE,
    "megatron-0.18.2": DENSE,
    "megatron-0.18.2-hybrid": DENSE.by_sublayers(),
    "bridge-0.3.1": BRIDGE,
    "bridge-0.6.2": BRIDGE,
}


def unpack(name, tmp_path):
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return str(tmp_path / name)


def last_logits(folder):
    """Return the logits of the last position, as the writer computed them, [b, v]."""
    source = checkpoints.read(folder)
    chunks = build_model(source.arch, ModelOptions(), platform.initialize().groups)
    restore_weights(chunks, source)
    tokens = torch.tensor(EXPECTED["tokens"])  # [b, s]
    with torch.no_grad():
        return chunks[0].eval()(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)[-1]


@pytest.mark.parametrize("name", ARCHS)
def test_logits_are_those_of_the_writer(name, tmp_path):
    folder = unpack(name, tmp_path)
    arch = checkpoints.read(folder).arch
    assert replace(arch, init_method_std=DENSE.init_method_std) == ARCHS[name]
    (found,) = run_ranks(1, last_logits, folder)
    torch.testing.assert_close(found, torch.tensor(EXPECTED[name]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ARCHS)
def test_it_is_pruned_and_changes_its_form(name, tmp_path):
    folder, arch = unpack(name, tmp_path), ARCHS[name]
    pruned, other, back = (str(tmp_path / x) for x in ("pruned", "other", "back"))
    random = ["--importance", "random", "--seq-length", "16", "--micro-batch-size", "1"]
    argv = ["--load", folder, "--save", pruned, "--target-ffn-hidden-size", "4", *random]
    succeed("prune", argv)
    assert checkpoints.read(pruned).arch.is_hybrid == arch.is_hybrid
    forms = ["gpt", "hybrid"] if arch.is_hybrid else ["hybrid", "gpt"]
    for load, save, to in ((pruned, other, forms[0]), (other, back, forms[1])):
        succeed("tools.convert", ["layers", "--to", to, "--load", load, "--save", save])
    assert_same_bytes(read_tensors(back), read_tensors(pruned))
    assert torch.equal(*(run_ranks(1, last_logits, x)[0] for x in (pruned, other)))
