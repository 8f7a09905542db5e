"""Layers of student and teacher on pipeline stages."""

import pytest

from megatron_ext.cli.megatron_flags import Parallel
from megatron_ext.distillation.pairs import parse_pairs
from megatron_ext.distillation.placement import layouts_of_both
from megatron_ext.runtime.errors import UserError
from tests.models import LLAMA
from tests.programs import (
    data_flags,
    read_metrics,
    succeed,
    write_corpus,
    write_model,
)


def layouts(student, teacher, pairs="", **parallel):
    sizes = {"pipeline_model_parallel_size": 2, **parallel}
    pairs = parse_pairs(pairs, (teacher - 1, student - 1)) if pairs else ()
    both = layouts_of_both(Parallel(**sizes), student, teacher, pairs)
    return [each.pipeline_model_parallel_layout for each in both]


def test_what_megatron_cuts_evenly_is_left_to_it():
    assert layouts(4, 8) == [None, None]
    assert layouts(4, 8, "7:3,0:0,embedding") == [None, None]
    assert layouts(3, 7, pipeline_model_parallel_size=1) == [None, None]


def test_depths_that_do_not_divide():
    assert layouts(3, 4) == ["Ett|tL", "Ett|ttL"]
    assert layouts(5, 6, num_virtual_stages_per_pipeline_rank=2) == [
        "Ett|t|t|tL",
        "Ett|tt|t|tL",
    ]


def test_pieces_that_follow_from_the_depth_are_the_same_in_both():
    """Regression: the pieces of 2 layers were those of the student alone, one a rank: no pieces."""
    assert layouts(4, 8, num_layers_per_virtual_pipeline_stage=2) == ["Et|t|t|tL", "Ett|tt|tt|ttL"]


def test_layers_that_are_compared_meet():
    assert layouts(4, 8, "3:2") == ["Ettt|tL", "Etttt|ttttL"]
    assert layouts(4, 8, "4:1") == ["Et|tttL", "Etttt|ttttL"]
    assert layouts(6, 8, "2:2,mlp:5:3", pipeline_model_parallel_size=4) == [
        "Ett|t|tt|tL",
        "Ett|tt|tt|ttL",
    ]
    with pytest.raises(UserError, match="must not cross"):
        layouts(4, 8, "7:0,0:3")


def test_layers_of_the_ends_hold_for_the_student():
    first = {"decoder_first_pipeline_num_layers": 1}
    assert layouts(4, 4, **first) == ["Et|tttL", "Et|tttL"]
    assert layouts(4, 6, **first) == ["Et|tttL", "Ettt|tttL"]
    assert layouts(4, 8, decoder_last_pipeline_num_layers=2) == [None, None]


def test_a_typed_layout_holds_for_what_it_fits():
    typed = {"pipeline_model_parallel_layout": "Et|tttL"}
    assert layouts(4, 4, **typed) == ["Et|tttL", "Et|tttL"]
    assert layouts(4, 6, **typed) == ["Et|tttL", "Ettt|tttL"]
    assert layouts(2, 4, **typed) == ["Et|tL", "Et|tttL"]
    assert layouts(2, 4, "0:0,1:1", **typed) == ["Et|tL", "Et|tttL"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    corpus = data_flags(LLAMA, write_corpus(folder / "corpus", LLAMA.vocab_size))
    teacher, student = str(folder / "teacher"), str(folder / "student")
    write_model(teacher, LLAMA)
    sizes = ["--target-num-layers", "3", "--target-hidden-size", "40"]
    data = ["--load", teacher, "--calibration-samples", "8", "--micro-batch-size", "1"]
    succeed("prune", [*corpus, *data, *sizes, "--save", student])
    train = "--global-batch-size 4 --lr 3e-3 --train-iters 3 --save-interval 3 --log-interval 1"
    argv = [*corpus, *train.split(), "--eval-iters", "0", "--teacher-load", teacher]
    return [*argv, "--load", student], folder


@pytest.mark.parametrize(
    "layout",
    [
        "--pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|tL",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|ttL",
    ],
)
def test_three_layers_beside_four_on_two_stages(layout, place, tmp_path):
    argv, folder = place
    argv = [*argv, "--kd-hidden-states", "embedding,3:2,0:0"]
    serial = folder / "serial"
    if not serial.exists():
        succeed("pretrain_distill", [*argv, "--save", str(serial)])
    succeed("pretrain_distill", [*argv, *layout.split(), "--save", str(tmp_path)], 2)
    for ours, theirs in zip(read_metrics(tmp_path), read_metrics(serial), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
