"""minitron certify: right layouts pass, planted mistakes are found and named."""

import importlib
import os
import shlex
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_ext.arch import Arch
from megatron_ext.certify import command, run, shrink
from megatron_ext.certify.layouts import Ranks, small_layouts
from megatron_ext.cli.fit import check_layout
from megatron_ext.cli.flag_checks import stages
from megatron_ext.cli.megatron_flags import Parallel
from megatron_ext.distillation.pairs import parse_pairs
from megatron_ext.pruning.targets import target_arch
from megatron_ext.runtime import local_ranks
from megatron_ext.runtime.errors import CHECKPOINT, DIFFERS, RUNTIME, USAGE, UserError
from tests.models import BERT, GPT2, LLAMA, MIXTRAL, MOE, NEMOTRON, WINDOWS
from tests.programs import ROOT, run_here
from tests.ranks import PRELOAD
from tests.test_examples import STEPS, bash, words_of, write_stub

CONFIG = str(ROOT / "examples/llama3.1-8b-to-4b/teacher.json")
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 1000 --seq-length 64"
STEP = f"--micro-batch-size 1 --global-batch-size 8 --train-iters 4 --lr 1e-3 {DATA}"
GPT = "--num-layers 8 --hidden-size 256 --num-attention-heads 8 --max-position-embeddings 64"
DISTILL = (
    "--pretrained-checkpoint none --teacher-load none --bf16 --micro-batch-size 1 --train-iters 4 "
    f"--global-batch-size 8 --lr 1e-3 --load-config {CONFIG} --teacher-config {CONFIG} "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --seq-length 64"
)
PRUNE = (
    f"--load none --save out --load-config {CONFIG} --micro-batch-size 1 --calibration-samples 64 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --seq-length 64 "
    "--target-hidden-size 3072 --target-num-layers 30"
)
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"


@pytest.fixture(autouse=True)
def one_server(monkeypatch):
    """Fork ranks from the server of the other tests."""
    for module in (command, run):
        monkeypatch.setattr(module, "PRELOAD", PRELOAD)


def certify(line):
    return run_here(["tools/certify.py", *shlex.split(line)])


# Layouts that are right.


@pytest.mark.parametrize(
    "line",
    [
        f"distill {DISTILL} --num-layers 22 {TP2} --sequence-parallel --world-size 16 "
        "--kd-hidden-states 31:last,embedding --kd-fused-output "
        "--kd-lm-loss-weight 0.5 --hidden-size 3072 --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather",
        f"pretrain_distill.py {GPT} {STEP} {PP2} --num-virtual-stages-per-pipeline-rank 2 "
        "--num-experts 8 --disable-bias-linear --ffn-hidden-size 512 --moe-aux-loss-coeff 0.1 "
        "--expert-model-parallel-size 2",
        f"pretrain_distill.py {GPT} {STEP} {PP2} --decoder-first-pipeline-num-layers 6 "
        "--num-experts 8 --disable-bias-linear --moe-router-dtype fp32 "
        "--expert-tensor-parallel-size 1 --log-num-zeros-in-grad --timing-log-level 2",
    ],
    ids=["distillation", "experts in virtual stages", "a long first stage"],
)
def test_a_right_training_layout(line):
    code, stdout, stderr = certify(f"--max-ranks 4 {line}")
    assert (code, stderr) == (0, ""), stdout
    assert stdout.splitlines()[-1].startswith("RIGHT"), stdout


def test_right_scores_and_plans():
    code, stdout, stderr = certify(
        f"prune.py {PRUNE} {TP2} --sequence-parallel --depth-importance kl"
    )
    assert (code, stderr) == (0, ""), stdout
    assert "plans                       1 of 1 equal" in stdout
    assert "RIGHT" in stdout


# Planted mistakes, in the ranks alone.


def second_layer(run):
    """Yield the second layer, where this rank has it."""
    for chunk in run.chunks:
        yield from (layer for layer in chunk.decoder.layers if layer.layer_number == 2)


def missing_all_reduce():
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def in_second_layer(change):
    """Change the second layer of a run when it is there."""
    from megatron_ext.certify import ranks

    assemble = ranks.training.assemble

    def assemble_wrongly(*args):
        built = assemble(*args)
        for layer in second_layer(built):
            change(layer, built.groups.tp.size())
        return built

    ranks.training.assemble = assemble_wrongly


def gradient_times_tp(layer, tp):
    layer.mlp.linear_fc2.weight.register_hook(lambda gradient: gradient * tp)


def unmarked_norm(layer, tp):
    layer.input_layernorm.weight.sequence_parallel = False


def bias_on_every_rank(layer, tp):
    layer.mlp.linear_fc2.bias.data.mul_(tp)


def sums_of_one_rank():
    from megatron_ext.pruning import aggregation

    add = aggregation.OverSamples.add

    def add_alone(self, *args):
        self.position_groups = []
        add(self, *args)

    aggregation.OverSamples.add = add_alone


def a_rank_dies():
    if torch.distributed.get_world_size() == 2 and torch.distributed.get_rank() == 1:
        os._exit(1)


def a_rank_raises():
    assert torch.distributed.get_world_size() == 1, "two are too many"


BUGS = {
    "missing all-reduce": missing_all_reduce,
    "gradient times TP": partial(in_second_layer, gradient_times_tp),
    "unmarked norm": partial(in_second_layer, unmarked_norm),
    "bias on every rank": partial(in_second_layer, bias_on_every_rank),
    "sums of one rank": sums_of_one_rank,
    "dies": a_rank_dies,
    "raises": a_rank_raises,
}


def with_bug(bug, function, *args):
    BUGS[bug]()
    return function(*args)


def certify_with(bug, line, monkeypatch):
    def run_ranks(world_size, function, *args, **options):
        return local_ranks.run_ranks(world_size, with_bug, bug, function, *args, **options)

    monkeypatch.setattr(run, "run_ranks", run_ranks)
    return certify(line)


LAYER = "decoder.layers.1"


@pytest.mark.parametrize(
    ("bug", "layout", "found"),
    [
        ("missing all-reduce", PP2, "backward pass first embedding.word_embeddings.weight"),
        ("gradient times TP", TP2, f"backward pass first {LAYER}.mlp.linear_fc2.weight, 1.0e+00"),
        (
            "unmarked norm",
            f"{TP2} --sequence-parallel",
            f"backward pass first {LAYER}.self_attention.linear_qkv.layer_norm_weight",
        ),
        ("bias on every rank", TP2, "forward pass first model: output of layer 1"),
    ],
)
def test_a_planted_mistake_is_found_and_named(bug, layout, found, monkeypatch):
    code, stdout, _ = certify_with(bug, f"pretrain_distill.py {GPT} {STEP} {layout}", monkeypatch)
    assert code == DIFFERS
    assert f"  DIFFERS: in the {found}" in stdout
    if "backward" in found:
        assert "forward pass" not in stdout
        assert "; 1 of " in stdout  # that weight alone
    assert "1 of 1 layouts differ from one rank" in stdout


def test_wrong_scores_are_found(monkeypatch):
    line = f"prune.py {PRUNE} {TP2} --sequence-parallel"
    code, stdout, _ = certify_with("sums of one rank", line, monkeypatch)
    assert code == DIFFERS
    assert "  DIFFERS: scores first layers" in stdout


@pytest.mark.parametrize(
    ("bug", "line"),
    [
        ("dies", "2 ranks = TP 2: rank 1 of 2 died"),
        ("raises", "2 ranks = TP 2: AssertionError: two are too many ("),
    ],
)
def test_a_rank_that_fails_is_one_line(bug, line, monkeypatch):
    code, _, stderr = certify_with(bug, f"pretrain_distill.py {GPT} {STEP} {TP2}", monkeypatch)
    assert code == RUNTIME
    assert stderr.startswith(f"ERROR: {line}")
    assert stderr.count("\n") == 1


# Flags as they stand, and what they become.


@pytest.mark.parametrize(
    ("name", "step"),
    [(name, step) for name, step in STEPS if step.startswith(("distil", "prune", "correct"))],
)
def test_flags_of_every_recipe(name, step, tmp_path, monkeypatch):
    log = tmp_path / "log"
    write_stub(tmp_path, "python", 'printf "%s\\0" "$@" >>"$LOG"; echo >>"$LOG"')
    script = ROOT / "examples" / name / "run.sh"
    bash(script, step, path=tmp_path, DRY_RUN="1", LOG=str(log), WORK=str(tmp_path))
    (argv,) = words_of(log)
    max_ranks, program, flags = command.split(argv)
    assert (max_ranks, program) == (8, argv[0])
    find = command.pruning_trials if program == "prune.py" else command.training_trials
    if "nano" in name:  # a hybrid: what is not certified says so
        with pytest.raises(UserError, match=r"a model of sub-layers \(M-.* has no form in small"):
            find(flags, max_ranks)
        return
    trials, models = find(flags, max_ranks)
    assert trials.reference.ranks == Ranks()
    assert all(1 < trial.ranks.total <= 8 for trial in trials.layouts)
    assert len(models) == (2 if step != "correct" else 1)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("", USAGE, "certify what? Name the program"),
        ("--ranks 3 prune.py", USAGE, "unknown flag --ranks"),
        (f"distill {GPT} {STEP} --tensor-model-parallel-size 3", USAGE, "--tensor-model-parallel"),
        ("torchrun --nproc-per-node gpu distill", USAGE, "torchrun: argument --nproc-per-node"),
        (f"distill --load none --finetune {STEP}", CHECKPOINT, "--load none: no checkpoint there"),
        (f"prune.py {PRUNE} --importance magnitude", USAGE, "--importance magnitude reads weights"),
    ],
)
def test_what_is_refused_is_one_line(line, code, message):
    found, stdout, stderr = certify(line)
    assert found == code, stderr
    assert stderr.startswith(f"ERROR: {message}"), stderr
    assert (stderr.count("\n"), stdout) == (1, "")


def test_ranks_of_the_launcher():
    line = "torchrun --nnodes 2 --nproc_per_node=4 --standalone pretrain_distill.py --lr 1"
    assert command.split(line.split()) == (
        8,
        "pretrain_distill.py",
        ["--world-size=8", "--lr", "1"],
    )
    assert command.ranks_typed(["--world-size=8"]) == 8
    sizes = ["--context-parallel-size=2", "--expert-model-parallel-size=4"]
    assert command.ranks_typed(sizes) == 4


def test_lists_of_data_are_not_read():
    words = ["prune.py", "--data-args-path", "a", "--per-split-data-args-path=b", "--lr", "1"]
    assert command.split(words)[2] == ["--mock-data", "--mock-data", "--lr", "1"]


@pytest.mark.parametrize(
    ("real", "max_ranks", "small"),
    [
        (Ranks(), 8, [Ranks()]),
        (Ranks(tp=8), 8, [Ranks(tp=8)]),
        (Ranks(tp=8, dp=4), 8, [Ranks(tp=2, dp=2)]),
        (Ranks(pp=4, dp=64), 8, [Ranks(pp=4, dp=2)]),
        (Ranks(dp=64, ep=8), 8, [Ranks(dp=4, ep=2)]),
        (Ranks(cp=4, dp=2, ep=8), 8, [Ranks(cp=4, dp=2, ep=8)]),
        (Ranks(tp=4, pp=4), 2, [Ranks(tp=2), Ranks(pp=2)]),
        (
            Ranks(tp=2, pp=2, cp=2, dp=2),
            8,
            [
                Ranks(tp=2, pp=2, cp=2),
                Ranks(tp=2, pp=2, dp=2),
                Ranks(tp=2, cp=2, dp=2),
                Ranks(pp=2, cp=2, dp=2),
            ],
        ),
    ],
)
def test_small_layouts(real, max_ranks, small):
    assert small_layouts(real, max_ranks) == small


@pytest.mark.parametrize("arch", [LLAMA, GPT2, NEMOTRON, BERT, MOE, MIXTRAL])
@pytest.mark.parametrize(("tp", "small_tp"), [(1, 1), (2, 2), (2, 4), (4, 2)])
def test_a_small_model_keeps_its_proportions(arch: Arch, tp, small_tp):
    large = replace(
        arch,
        hidden_size=64 * arch.hidden_size,
        ffn_hidden_size=64 * arch.ffn_hidden_size,
        num_attention_heads=4 * arch.num_attention_heads,
        num_query_groups=4 * arch.num_query_groups,
        kv_channels=16 * arch.kv_channels,
        num_layers=32,
    )
    real, small = Ranks(tp=tp, dp=8), Ranks(tp=small_tp, dp=2)
    found = shrink.small_arch(large, real, small, 4)
    parallel = Parallel(tensor_model_parallel_size=small_tp, sequence_parallel=small_tp > 1)
    check_layout(found, parallel, seq_length=shrink.seq_length(small))
    assert found.hidden_size < 200
    ratio = large.num_attention_heads // large.num_query_groups
    assert found.num_attention_heads == ratio * found.num_query_groups
    widths = [a.num_attention_heads * a.kv_channels / a.hidden_size for a in (large, found)]
    assert widths[0] == pytest.approx(widths[1], rel=0.05)
    kept = ("normalization", "swiglu", "qk_layernorm", "add_bias_linear", "moe_router_topk")
    assert all(getattr(found, name) == getattr(large, name) for name in kept)
    padded = [a.padded_vocab_size > a.vocab_size for a in (large, found)]
    assert padded[0] == padded[1]


def test_a_small_model_keeps_what_differs_between_its_layers():
    ranks, large = Ranks(tp=1, dp=1), replace(WINDOWS, window_size="900,0")
    small = shrink.small_arch(large, ranks, ranks, 6)
    assert (small.window_size, small.no_rope_freq) == ("5,0", "[0,1,0,0,0,1]")
    assert small.window_attn_skip_freq == "[1,0,1,1,1,0]"
    target = target_arch(large, num_layers=3, hidden_size=40)
    pruned = shrink.small_target(large, target, small, 2)
    assert (pruned.num_layers, pruned.no_rope_freq) == (2, "[0,1]")
    assert pruned.hidden_size < small.hidden_size


def test_depths_keep_order_and_unevenness():
    assert shrink.small_depths([32, 32], {}, 4, 2) == [4, 4]
    assert shrink.small_depths([22, 32], {}, 4, 2) == [5, 6]
    assert shrink.small_depths([4], {}, 4, 4) == [4]
    assert shrink.small_depths([2, 32], {}, 4, 2) == [1, 6]
    assert shrink.small_depths([16, 32], {32: 6}, 4, 2) == [4, 6]
    assert shrink.small_depths([16, 32], {16: 6}, 4, 2) == [6, 8]


@pytest.mark.parametrize(
    ("layout", "num_stages", "small"),
    [
        ("Et*2|t*5|t*5|t*4L", 4, "Et|tt|tt|ttL"),
        ("Et*2|t*5|t*5|t*4L", 2, "Et|ttL"),
        ("E|t*4|t*4|L", 4, "E|t|t|L"),
        ("Et*3|(tt|)*6tL", 4, "Ett|tt|tt|tL"),
    ],
)
def test_a_typed_pipeline_layout(layout, num_stages, small):
    assert shrink.small_stages(layout, num_stages) == small
    assert len(stages(small)) == num_stages


def test_pairs_of_layers_that_fall_together_are_one():
    pairs = parse_pairs("31:21,30:20,embedding,mlp:15:11", last=(31, 21))
    assert shrink.small_pairs(pairs, [22, 32], [3, 4]) == "3:2,embedding,mlp:1:1"
    assert shrink.small_pairs((), [22, 32], [3, 4]) is None
