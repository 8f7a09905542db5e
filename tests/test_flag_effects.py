"""Megatron-LM's flags that change what a run says or how it steps: what each of them does."""

import importlib
import json
import logging
import os
import shlex
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.cli.programs import parse_train
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.options import choose_kernels
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import INTERRUPTED, USAGE
from megatron_ext.training.optimizer import make_schedule, optimizer_config
from tests.models import MOE
from tests.programs import NEW_MODEL, fail, read_tensors, run_program, succeed
from tests.ranks import run_ranks

TWO_STEPS = (
    f"{NEW_MODEL} --train-iters 2 --log-interval 1 --eval-iters 0 --num-workers 0 "
    "--global-batch-size 2 "
)
EXPERTS = (
    "--num-experts 2 --moe-ffn-hidden-size 8 --disable-bias-linear --moe-router-topk 2 "
    "--sequence-parallel"
)
LAYOUTS = {
    "TP1": (1, ""),
    "TP2 + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "DP2, sharded": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "experts": (1, EXPERTS),
    "experts, EP2": (2, f"{EXPERTS} --expert-model-parallel-size 2"),
    "experts, TP2": (2, f"{EXPERTS} --tensor-model-parallel-size 2"),
}


def train(extra, world_size=1):
    """Run two steps; return what rank 0 printed."""
    return succeed("pretrain_distill", shlex.split(TWO_STEPS + extra), world_size)[0].stdout


def refuse(extra):
    return fail("pretrain_distill", shlex.split(TWO_STEPS + extra))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def norm_of_weights(folder):
    tensors = read_tensors(str(folder))
    weights = [x for name, x in tensors.items() if not name.startswith(("optimizer", "chained"))]
    return sum(x.double().square().sum() for x in weights).sqrt().item()


@pytest.mark.parametrize("name", LAYOUTS)
def test_norm_of_the_weights(name, tmp_path):
    world_size, flags = LAYOUTS[name]
    out = train(f"--log-params-norm --save-interval 9 {flags} --save {tmp_path}", world_size)
    assert metrics(tmp_path)[-1]["params-norm"] == pytest.approx(norm_of_weights(tmp_path), 1e-6)
    assert f"| params norm: {norm_of_weights(tmp_path):.3f} |" in out


@pytest.mark.parametrize("name", ["TP2 + SP", "PP2", "DP2, sharded"])
def test_zeros_of_the_gradient_are_counted_alike_under_any_layout(name, tmp_path):
    """Tokens that do not occur leave rows of the embedding's gradient zero."""
    zeros = []
    for folder, (world_size, flags) in (("a", LAYOUTS["TP1"]), ("b", LAYOUTS[name])):
        watched = (
            "--log-num-zeros-in-grad --save-interval 9 --vocab-size 120 --lr 1e-3 "
            "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
            f"{flags}"
        )
        out = train(f"{watched} --save {tmp_path / folder}", world_size)
        zeros.append(metrics(tmp_path / folder)[0]["num-zeros"])
        assert f"| num zeros: {zeros[-1]} |" in out
    assert zeros[0] == zeros[1] > 16 * 100


def test_times_of_a_step_are_printed_and_logged(tmp_path):
    out = train(
        "--timing-log-level 2 --timing-log-option max --log-timers-to-tensorboard "
        f"--save {tmp_path} --save-interval 9 --tensorboard-dir {tmp_path}",
    )
    assert out.count("max time across ranks (ms):") == 2
    assert "    forward-compute ......" in out
    line = metrics(tmp_path)[-1]
    parts = line["forward-compute-time"] + line["backward-compute-time"]
    assert 0 < parts <= line["forward-backward-time"] < line["iteration-time"]
    assert line["optimizer-inner-step-time"] <= line["optimizer-time"]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert len(board.Scalars("forward-backward-time")) == 2
    out = train("--timing-log-level 1")
    assert "(min, max) time across ranks (ms):\n    forward-backward .." in out
    assert "forward-compute" not in out
    assert "across ranks" not in train("")
    code, line = refuse("--log-timers-to-tensorboard")
    assert (code, "--timing-log-level 1 or 2" in line) == (USAGE, True)


def print_queue_size():
    from torch.utils import tensorboard

    class Writer(tensorboard.SummaryWriter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            print(f"queue of {self.file_writer.event_writer._async_writer._byte_queue.maxsize}")

    tensorboard.SummaryWriter = Writer


@pytest.mark.parametrize(("typed", "size"), [("", 1000), ("--tensorboard-queue-size 3", 3)])
def test_queue_of_the_tensorboard(typed, size, tmp_path):
    argv = shlex.split(f"{TWO_STEPS} {typed} --tensorboard-dir {tmp_path}")
    (outcome,) = run_program("pretrain_distill", argv, before=print_queue_size)
    assert outcome.code == 0
    assert f"queue of {size}\n" in outcome.stdout


def test_progress_is_appended_at_starts_and_checkpoints(tmp_path):
    for steps in (2, 4):
        train(
            f"--log-progress --save {tmp_path} --save-interval 1 --train-iters {steps} "
            "--override-opt-param-scheduler"
        )
    lines = (tmp_path / "progress.txt").read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    assert [c[3] for c in cells] == ["Starting job", "Saved checkpoint", "Saved checkpoint"] * 2
    assert [c[4] for c in cells if len(c) > 4] == [f"Iteration: {n}" for n in (1, 2, 3, 4)]
    assert all(c[2] == "# GPUs: 1" for c in cells)
    flops = [float(c[5].split()[-1]) for c in cells if len(c) > 4]
    assert flops[3] == pytest.approx(4 * flops[0], rel=0.01)
    code, line = refuse("--log-progress")
    assert (code, line) == (USAGE, "--log-progress needs --save.")


def level_after_training(level):
    sys.argv = ["pretrain_distill.py", *shlex.split(f"{TWO_STEPS} --logging-level {level}")]
    assert importlib.import_module("pretrain_distill").main() == 0
    return logging.getLogger().level


def test_level_of_pythons_logging():
    assert run_ranks(1, level_after_training, 40) == [40]


def test_torchs_profiler_writes_a_trace_of_the_steps(tmp_path):
    profile = "--profile --use-pytorch-profiler --profile-step-start 1 --profile-step-end 2"
    train(f"{profile} --pytorch-profiler-collect-shapes --tensorboard-dir {tmp_path}", 2)
    (trace,) = tmp_path.glob("*.pt.trace.json")  # of rank 0
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 1
    assert any("Input Dims" in e.get("args", {}) for e in events)
    for extra, message in (
        (profile, "--use-pytorch-profiler needs --tensorboard-dir."),
        ("--profile", "--profile needs a GPU; --use-pytorch-profiler does without one."),
        ("--profile --profile-step-end 3", "--profile-step-end 3 must be above"),
    ):
        code, line = refuse(extra)
        assert (code, message in line) == (USAGE, True), line


def test_embedding_and_output_layer_have_a_learning_rate_of_their_own(tmp_path):
    """Adam's first step moves every weight by its learning rate, whatever the gradient."""
    untied = "--untie-embeddings-and-output-weights --seed 5 --weight-decay 0 --adam-eps 1e-30"
    rates = "--lr 1e-3 --lr-decay-style constant --decoupled-lr 5e-3"
    base = f"{untied} {rates} --save-interval 9 --train-iters 3 --save"
    stopped = shlex.split(f"{TWO_STEPS} {base} {tmp_path / 'a'} --exit-interval 1")
    assert run_program("pretrain_distill", stopped)[0].code == INTERRUPTED
    moved = read_tensors(str(tmp_path / "a"))
    train(f"{untied} --lr 1e-30 --save-interval 9 --train-iters 1 --save {tmp_path / 'b'}")
    start = read_tensors(str(tmp_path / "b"))
    for name, rate in (
        ("output_layer.weight", 5e-3),
        ("embedding.word_embeddings.weight", 5e-3),
        ("decoder.layers.mlp.linear_fc1.weight", 1e-3),
        ("embedding.position_embeddings.weight", 1e-3),
    ):
        step = (moved[name] - start[name]).abs().max().item()
        assert step == pytest.approx(rate, rel=1e-3), name
    # Stopped and started again, the rates go on: bit for bit.
    for run in "ac":
        train(f"{base} {tmp_path / run}")
    left, right = (read_tensors(str(tmp_path / run)) for run in "ac")
    assert all(torch.equal(left[name], right[name]) for name in right)
    for extra, message in (
        ("--decoupled-min-lr 1e-3", "--decoupled-min-lr needs --decoupled-lr."),
        ("--lr 1 --min-lr 0.1 --decoupled-lr 0.01", "--min-lr 0.1 is larger than --decoupled-lr"),
    ):
        code, line = refuse(extra)
        assert (code, message in line) == (USAGE, True), line


def test_layers_of_the_first_stage(tmp_path):
    """Three layers on two stages: one and two, with the losses of one stage."""
    three = "--num-layers 3 --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --save-interval 9"
    pp2 = "--pipeline-model-parallel-size 2"
    for name, world_size, flags in (
        ("a", 1, ""),
        ("b", 2, f"{pp2} --decoder-first-pipeline-num-layers 1"),
        ("c", 2, f"{pp2} --decoder-last-pipeline-num-layers 1"),
    ):
        train(f"{three} {flags} --save {tmp_path / name}", world_size)
    losses = [[line["lm loss"] for line in metrics(tmp_path / run)] for run in "abc"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    for extra, message in (
        ("--decoder-first-pipeline-num-layers 1", "above 1"),
        (
            "--pipeline-model-parallel-layout EttL --decoder-last-pipeline-num-layers 1",
            "--pipeline-model-parallel-layout and --decoder-last-pipeline-num-layers place layers",
        ),
    ):
        code, line = refuse(extra)
        assert (code, message in line) == (USAGE, True), line


def flags_of(extra):
    base = "--micro-batch-size 1 --seq-length 8 --load x --mock-data --lr 1"
    return parse_train(shlex.split(f"{base} {extra}"), 1)


def test_scale_of_the_loss_under_fp16():
    typed = "--fp16 --min-loss-scale 4 --loss-scale-window 50 --hysteresis 3 --train-iters 1"
    config = optimizer_config(flags_of(typed), torch.float16)
    assert (config.min_loss_scale, config.loss_scale_window, config.hysteresis) == (4.0, 50.0, 3)


def test_last_decay_of_wsd_in_samples():
    typed = "--train-samples 40 --lr-decay-style WSD --global-batch-size 4 --lr-wsd-decay-samples 9"
    flags = flags_of(typed)
    optimizer = type("Optimizer", (), {"param_groups": []})()
    assert make_schedule(flags, optimizer).wsd_decay_steps == 9


def router_scores(dtypes):
    place = platform.initialize(device="cpu")
    found = []
    for dtype in dtypes:
        options = ModelOptions(params_dtype=torch.bfloat16, moe_router_dtype=dtype)
        (model,) = build_model(MOE, options, place.groups, seed=1)
        router = model.decoder.layers[0].mlp.router
        with torch.no_grad():
            found.append(router.gating(torch.randn(4, MOE.hidden_size).bfloat16()).dtype)
    return found


def test_dtype_of_a_routers_scores():
    (found,) = run_ranks(1, router_scores, [None, "fp32", "fp64"])
    assert found == [torch.bfloat16, torch.float32, torch.float64]
    assert flags_of("--train-iters 1 --moe-router-dtype fp64").parallel.moe_router_dtype == "fp64"


def kernels(extra):
    choose_kernels(flags_of(f"--train-iters 1 {extra}").parallel)
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return torch.are_deterministic_algorithms_enabled(), workspace, reduced


def test_kernels_that_give_the_same_bits_or_add_in_float32():
    assert run_ranks(1, kernels, "--deterministic-mode") == [(True, ":4096:8", True)]
    assert run_ranks(1, kernels, "--disable-bf16-reduced-precision-matmul")[0][2] is False
    for flags in ("", EXPERTS):
        train(f"--deterministic-mode {flags}")
