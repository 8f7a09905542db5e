"""--tp-comm-overlap: what reaches megatron-core and Transformer Engine, and what is refused."""

import sys
from dataclasses import fields
from enum import Enum
from types import SimpleNamespace

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.cli.programs import parse_prune, parse_train
from megatron_ext.model import tp_overlap
from megatron_ext.model.fp8 import Fp8
from megatron_ext.model.tp_overlap import TpOverlap
from megatron_ext.runtime.errors import USAGE, UserError
from tests.models import LLAMA
from tests.programs import NEW_MODEL as FLAGS

ON = TpOverlap(tp_comm_overlap=True)
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel "


class Modes(Enum):
    NONE, FP8 = "none", "fp8"


def test_settings_are_megatron_cores_with_its_defaults():
    settings = tp_overlap.of_student(ON)
    default = {f.name: f.default for f in fields(TransformerConfig)}
    assert settings.pop("tp_comm_overlap") is True
    assert settings == {name: default[name] for name in settings}
    assert tp_overlap.of_student(TpOverlap()) == {}


def test_flags_are_read():
    overlap = parse_train((FLAGS + TP2 + "--tp-comm-overlap --no-tp-comm-bulk-wgrad").split(), 2)
    assert overlap.overlap == TpOverlap(tp_comm_overlap=True, tp_comm_bulk_wgrad=False)


@pytest.mark.parametrize(
    ("typed", "world_size", "words"),
    [
        ("--disable-tp-comm-overlap-rs", 1, "--disable-tp-comm-overlap-rs needs --tp-comm-overlap"),
        ("--tp-comm-overlap", 1, "--sequence-parallel"),
        ("--tp-comm-overlap --tensor-model-parallel-size 2", 2, "--sequence-parallel"),
        (TP2 + "--tp-comm-overlap --transformer-impl local", 2, "transformer_engine"),
    ],
)
def test_what_it_needs(typed, world_size, words):
    with pytest.raises(UserError, match=words) as error:
        parse_train((FLAGS + typed).split(), world_size)
    assert error.value.code == USAGE


def test_pruning_takes_the_flag_and_says_that_it_has_no_effect(capsys):
    flags = "--load a --save b --micro-batch-size 1 --seq-length 8 --mock-data --tp-comm-overlap"
    parse_prune([*flags.split(), *["--tokenizer-type", "NullTokenizer", "--vocab-size", "8"]], 1)
    assert "--tp-comm-overlap (scores are measured without it)" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """Calls to Transformer Engine, which is not here, in their order."""
    asked = []
    base = SimpleNamespace(
        UserBufferQuantizationMode=Modes, initialize_ub=lambda **wanted: asked.append(wanted)
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)
    return asked


@pytest.mark.parametrize(
    ("fp8", "modes"),
    [
        (Fp8(), [Modes.NONE]),
        (Fp8(fp8_format="hybrid"), [Modes.FP8]),
        (Fp8(fp8_format="hybrid", first_last_layers_bf16=True), [Modes.FP8, Modes.NONE]),
    ],
)
def test_buffers_are_the_students(fp8, modes, asked, tmp_path):
    file = tmp_path / "overlap.yaml"
    file.write_text("qkv_fprop: {method: ring_exchange, num_splits: 0}\n")
    overlap = TpOverlap(tp_comm_overlap=True, tp_comm_overlap_cfg=str(file))
    where = {"tokens": 64, "tp_size": 2, "transformer_impl": "transformer_engine"}
    tp_overlap.start(overlap, LLAMA, fp8, **where)
    assert asked == [
        {
            "shape": [64, LLAMA.hidden_size],
            "tp_size": 2,
            "quantization_modes": modes,
            "ub_cfgs": {"qkv_fprop": {"method": "ring_exchange", "num_splits": 0}},
            "bootstrap_backend": "nccl",
        }
    ]
    tp_overlap.start(TpOverlap(), LLAMA, fp8, **where)
    assert len(asked) == 1


def test_local_layers_cannot():
    with pytest.raises(UserError, match="needs a GPU and Transformer Engine"):
        tp_overlap.start(ON, LLAMA, Fp8(), tokens=1, tp_size=2, transformer_impl="local")


@pytest.mark.parametrize("text", [None, "- qkv_fprop", "qkv_fprop: 3", "a: {", "\0"])
def test_bad_files_are_refused(text, tmp_path):
    file = tmp_path / "overlap.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"--tp-comm-overlap-cfg .*overlap.yaml") as error:
        tp_overlap.read_settings(str(file))
    assert "\n" not in str(error.value)
