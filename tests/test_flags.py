"""The command lines: what is accepted, what is refused and how."""

import contextlib
import json
import shlex
import subprocess
import sys

import pytest

from megatron_ext.cli.parser import all_options
from megatron_ext.cli.programs import (
    PruneFlags,
    TrainFlags,
    flags_as_dict,
    format_flags,
    parse_prune,
    parse_train,
)
from megatron_ext.runtime.errors import DATA, USAGE, UserError

BATCH = "--micro-batch-size 2 --seq-length 16"
TRAIN = f"{BATCH} --train-iters 10 --lr 1e-3 --load teacher"
PRUNE = f"{BATCH} --load teacher --save pruned"
NEW = "--num-layers 4 --hidden-size 96 --num-attention-heads 6 --max-position-embeddings 32"


def train(extra="--mock-data", world_size=1, base=TRAIN):
    return parse_train(shlex.split(f"{base} {extra}"), world_size)


def prune(extra="--mock-data", world_size=1, base=PRUNE):
    return parse_prune(shlex.split(f"{base} {extra}"), world_size)


@contextlib.contextmanager
def refused(message, code=USAGE):
    """Expect a ``UserError`` that contains ``message``."""
    with pytest.raises(UserError) as caught:
        yield
    assert message in str(caught.value)
    assert caught.value.code == code


PP2, VPP = "--pipeline-model-parallel-size 2", "--num-virtual-stages-per-pipeline-rank"
PER_STAGE = "--num-layers-per-virtual-pipeline-stage 1"
LAYOUT = "--pipeline-model-parallel-layout"
# Typed after TRAIN and --mock-data: (flags, number of ranks, part of the message).
REFUSED = [
    ("--hiden-size 4", 1, "--hiden-size (did you mean --hidden-size?)"),
    ("--hidden 4", 1, "unknown flag --hidden"),  # no abbreviations
    ("--no-such-thing=3", 1, "unknown flag --no-such-thing. --help"),
    ("--bf16 1", 1, "unexpected 1"),
    ("--num-layers 1.5", 1, "--num-layers: invalid int value: '1.5'"),
    ("--normalization BatchNorm", 1, "--normalization: invalid choice: 'BatchNorm'"),
    ("--min-lr", 1, "--min-lr: expected one argument"),
    ("--optimizer sgd --use-distributed-optimizer", 1, "--use-distributed-optimizer shards Adam"),
    ("--lr nan", 1, "--lr nan: must be a finite number"),
    ("--clip-grad inf", 1, "--clip-grad inf: must be a finite number"),
    ("--world-size 4", 1, "--world-size needs --dry-run."),
    ("--gpu H200", 1, "--gpu needs --dry-run."),
    ("--lr 0", 1, "--lr 0.0: must be > 0"),
    ("--micro-batch-size 0", 1, "--micro-batch-size 0: must be >= 1"),
    ("--eval-iters -1", 1, "--eval-iters -1: must be >= 0"),
    ("--adam-beta2 1.0", 1, "--adam-beta2 1.0: must be < 1"),
    ("--rotary-percent 1.5", 1, "--rotary-percent 1.5: must be <= 1"),
    ("--kd-temperature 0", 1, "--kd-temperature 0.0: must be > 0"),
    (PP2, 3, "3 ranks are not a multiple of --tensor-model-parallel-size 1 x --pipeline"),
    ("--context-parallel-size 2 --seq-length 18", 2, "--seq-length 18 is not a multiple of 2 x"),
    (
        "--tensor-model-parallel-size 3 --sequence-parallel",
        3,
        "--seq-length 16 is not a multiple of --tensor-model-parallel-size 3",
    ),
    (
        "--tensor-model-parallel-size 4 --context-parallel-size 4 --seq-length 24 "
        "--sequence-parallel",
        16,
        "--seq-length 24 is not a multiple of --tensor-model-parallel-size 4 x --context-",
    ),
    (
        f"{PP2} --expert-model-parallel-size 2",
        2,
        "--expert-model-parallel-size 2 does not divide the 1 data and context parallel ranks",
    ),
    ("--moe-router-load-balancing-type sinkhorn", 1, "invalid choice: 'sinkhorn'"),
    (f"{PP2} {VPP} 2 {PER_STAGE}", 2, "place layers in different ways: give one"),
    (f"{PP2} {VPP} 2 {LAYOUT} Et|tL", 2, "place layers in different ways: give one"),
    (f"{VPP} 2", 1, f"{VPP} needs --pipeline-model-parallel-size above 1"),
    (f"{LAYOUT} Et|tL", 1, f"{LAYOUT} needs --pipeline-model-parallel-size above 1"),
    (f"{PP2} {LAYOUT} 'Et|t|tL'", 2, "has 3 stages, not a multiple of --pipeline"),
    (f"{PP2} {LAYOUT} 'tt|tL'", 2, "write E (embedding)"),
    (f"{PP2} {LAYOUT} 'Et|tx'", 2, "write E (embedding)"),
    (f"{PP2} {VPP} 2 --no-overlap-p2p-communication", 2, "gradients come out wrong"),
    (f"{PP2} {PER_STAGE} --no-overlap-p2p-communication", 2, "gradients come out wrong"),
    (f"{PP2} {LAYOUT} Et|t|t|L --no-overlap-p2p-communication", 2, "gradients come out wrong"),
    (
        "--global-batch-size 6",
        2,
        "--global-batch-size 6 is not a multiple of --micro-batch-size 2 x 2",
    ),
    (f"{PP2} {VPP} 2 --global-batch-size 6", 2, "makes 3 micro-batches; virtual stages need"),
    (f"{PP2} {LAYOUT} Et|t|t|L --global-batch-size 6", 2, "makes 3 micro-batches"),
    ("--recompute-granularity full", 1, "needs --recompute-method and --recompute-num-layers"),
    ("--recompute-num-layers 1", 1, "need --recompute-granularity full"),
    ("--overlap-param-gather --overlap-grad-reduce", 1, "needs --use-distributed-optimizer"),
    ("--min-lr 2e-3", 1, "--min-lr 0.002 is larger than --lr 0.001"),
    ("--lr-warmup-init 2e-3", 1, "--lr-warmup-init 0.002 is larger than --lr 0.001"),
    ("--lr-warmup-iters 10", 1, "--lr-warmup-iters 10 must be below --train-iters 10"),
    (
        "--lr-warmup-iters 5 --lr-decay-iters 5",
        1,
        "--lr-warmup-iters 5 must be below --lr-decay-iters 5",
    ),
    ("--lr-warmup-iters 2 --lr-warmup-fraction 0.1", 1, "both set the warm-up"),
    ("--train-samples 20", 1, "--train-iters counts steps and --train-samples samples"),
    ("--lr-decay-samples 20", 1, "--lr-decay-samples needs --train-samples"),
    ("--lr-warmup-samples 20", 1, "--lr-warmup-samples needs --train-samples"),
    ("--wandb-exp-name n", 1, "--wandb-exp-name n needs --wandb-project"),
    ("--manual-gc-interval 2", 1, "--manual-gc-interval 2 needs --manual-gc"),
    ("--data-args-path x --data-path a", 1, "--data-args-path and the paths on the command line"),
    (
        "--per-split-data-args-path x --valid-data-path a",
        1,
        "--per-split-data-args-path and the paths on the command line",
    ),
    ("--lr-decay-style WSD", 1, "--lr-decay-style WSD and --lr-wsd-decay-iters need each other"),
    ("--lr-wsd-decay-iters 3", 1, "--lr-decay-style WSD and --lr-wsd-decay-iters need each other"),
    (
        "--lr-decay-style WSD --lr-wsd-decay-iters 11",
        1,
        "--lr-wsd-decay-iters 11 is above --train-iters 10",
    ),
    ("--start-weight-decay 0.1", 1, "need --weight-decay-incr-style linear or cosine"),
    ("--weight-decay-incr-style linear", 1, "linear needs --start-weight-decay and --end-"),
    (
        "--weight-decay-incr-style cosine --start-weight-decay 0.2 --end-weight-decay 0.1",
        1,
        "--start-weight-decay 0.2 is larger than --end-weight-decay 0.1",
    ),
    (
        "--override-opt_param-scheduler --use-checkpoint-opt-param-scheduler",
        1,
        "contradict each other",
    ),
    ("--bf16 --fp16", 1, "--bf16 and --fp16 contradict each other"),
    ("--loss-scale 8", 1, "--loss-scale needs --fp16"),
    ("--grad-reduce-in-bf16", 1, "--grad-reduce-in-bf16 needs --bf16"),
    ("--swiglu --squared-relu", 1, "--swiglu and --squared-relu contradict each other"),
    ("--save out", 1, "--save needs --save-interval"),
    (
        "--save out --save-interval 4 --save-retain-interval 6",
        1,
        "--save-retain-interval 6 is not a multiple of --save-interval 4",
    ),
    ("--finetune --pretrained-checkpoint x", 1, "--finetune and --pretrained-checkpoint"),
    ("--kd-temperature 2", 1, "--kd-temperature needs --teacher-load"),
    ("--teacher-load t --kd-jsd-beta 0.2", 1, "--kd-jsd-beta 0.2 needs --kd-loss jsd"),
    ("--teacher-load t --kd-loss jsd --kd-jsd-beta 1", 1, "--kd-jsd-beta 1.0: must be < 1"),
    ("--teacher-load t --kd-top-k 8 --kd-loss mse", 1, "--kd-top-k 8 needs --kd-loss forward-kl"),
    ("--teacher-load t --kd-fused-output --fp16", 1, "--kd-fused-output makes gradients before"),
    ("--teacher-load t --kd-top-k-rest tail", 1, "--kd-top-k-rest tail needs --kd-top-k"),
    ("--data-path a", 1, "--mock-data and --data-path: give one source"),
    ("--valid-data-path a", 1, "--mock-data and --train-data-path (or"),
    ("--split 9;1", 1, "--split 9;1: write up to three shares"),
    ("--split 0,0", 1, "--split 0,0: write up to three shares"),
    ("--split 1,1,1,1", 1, "--split 1,1,1,1: write up to three shares"),
    ("--tokenizer-type NullTokenizer", 1, "--tokenizer-type NullTokenizer needs --vocab-size"),
    ("--tokenizer-type GPT2BPETokenizer", 1, "needs --vocab-file and --merge-file"),
]


@pytest.mark.parametrize(("extra", "world_size", "message"), REFUSED)
def test_refused_training_flags(extra, world_size, message):
    with refused(message):
        train(f"--mock-data {extra}", world_size)


def test_flags_that_are_refused_without_others():
    with refused("no data: give --data-path or --mock-data"):
        train("")
    with refused("--split 9,1 divides --data-path"):
        train("--train-data-path a --split 9,1")
    for flags in ("--finetune", "--ckpt-step 3"):
        with refused(f"{flags.split()[0]} needs --load"):
            train(f"--mock-data {flags}", base=TRAIN.replace("--load teacher", NEW))


def test_missing_flags_come_in_one_message():
    with refused(
        "missing --micro-batch-size, --seq-length, --train-iters, --lr, --num-layers, "
        "--hidden-size, --num-attention-heads, --max-position-embeddings."
    ):
        train("--mock-data", base="")
    with refused("missing --train-iters, --lr, --num-layers."):
        train("", base=f"{BATCH} {NEW.removeprefix('--num-layers 4')}")
    with refused("missing --train-iters."):
        train("--lr 1", base=f"{BATCH} --pretrained-checkpoint x")
    with refused("missing --micro-batch-size, --seq-length, --load."):
        prune("", base="--save x")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--mock-data --kd-loss jsd", "unknown flag --kd-loss"),
        ("--mock-data --hiden-size 8", "--hiden-size (did you mean --hidden-size?)"),
        ("--mock-data --target-hidden-size 0", "--target-hidden-size 0: must be >= 1"),
        ("--mock-data --calibration-samples 0", "--calibration-samples 0: must be >= 1"),
        ("--mock-data --save teacher", "--save teacher is also --load"),
        ("--mock-data --bf16 --fp16", "--bf16 and --fp16"),
        ("--mock-data --num-virtual-stages-per-pipeline-rank 2", "above 1"),
        ("--mock-data --tensor-model-parallel-size 2", "1 ranks are not a multiple"),
        ("--scores absent.safetensors --plan absent.json", "no data"),
        ("--plan absent.json --mock-data --data-path a", "give one source"),
        ("--mock-data --importance weights", "--importance: invalid choice: 'weights'"),
        ("--mock-data --importance-batch sum", "--importance-batch: invalid choice: 'sum'"),
        (
            "--importance random --importance-heads aggregate-first",
            "--importance-heads aggregate-first needs --importance activation",
        ),
        ("--importance random --depth-importance kl", "kl needs --importance activation"),
        ("--mock-data --depth-rescore", "--depth-rescore needs --target-num-layers"),
        ("--mock-data --target-params 4e9", "--target-params 4e+09 needs --search-space"),
        ("--mock-data --search-space s", "--search-space s needs --target-params"),
        ("--mock-data --target-tolerance 0.1", "--target-tolerance 0.1 needs --target-params"),
        ("--mock-data --target-budget active=3B", "--target-budget active=3B needs --search-space"),
        ("--mock-data --budget-batch 4", "--budget-batch 4 needs --target-budget"),
        ("--mock-data --target-tolerance 1", "--target-tolerance 1.0: must be < 1"),
        (
            "--mock-data --target-params 4e9 --search-space s --target-hidden-size 8",
            "--search-space s and --target-hidden-size",
        ),
        (
            "--mock-data --target-params 4e9 --search-space s --prune-iterations 2",
            "--search-space s and --prune-iterations 2",
        ),
        ("--mock-data --depth-block 0", "--depth-block 0: must be >= 1"),
        ("--mock-data --head-residual paper", "paper needs --target-num-attention-heads"),
        (
            "--mock-data --head-residual laco --target-num-attention-heads 4 --prune-iterations 2",
            "--head-residual laco and --prune-iterations 2",
        ),
    ],
)
def test_refused_prune_flags(extra, message):
    with refused(message):
        prune(extra)


def test_prune_needs_no_data_where_scores_or_a_plan_exist(tmp_path):
    path = tmp_path / "plan.json"
    path.touch()
    assert prune(f"--plan {path}").prune.plan == str(path)
    assert prune(f"--scores {path} --plan new.json").data.data_path == ()
    with refused("no data"):  # each iteration after the first is scored
        prune(f"--scores {path} --prune-iterations 2")


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_scores_without_activations_need_no_data(importance):
    assert prune(f"--importance {importance}").prune.importance == importance


def test_prune_needs_something_to_write():
    without_save = PRUNE.removesuffix("--save pruned")
    with refused("nothing to write: give --save, --plan or --scores"):
        prune(base=without_save)
    assert prune("--mock-data --scores s", base=without_save).checkpoint.save is None


def test_typed_values_and_what_is_filled_in():
    flags = train(
        "--data-path 0.3 a 0.7 b --disable-bias-linear --no-save-optim --sequence-parallel "
        "--use-rotary-position-embeddings --export-kd-teacher-load t --kd-temperature 2 "
        "--persistent-save-interval 5",
        world_size=3,
    )
    assert flags.sizes == {"add_bias_linear": False, "position_embedding_type": "rope"}
    assert flags.data.data_path == ("0.3", "a", "0.7", "b")
    assert not flags.checkpoint.save_optim
    assert flags.checkpoint.load_optim
    assert flags.checkpoint.save_interval == 5
    assert (flags.distill.teacher_load, flags.distill.kd_temperature) == ("t", 2.0)
    assert flags.batch.global_batch_size == 6
    assert not flags.parallel.sequence_parallel
    flags = train("--mock-data --sequence-parallel --tensor-model-parallel-size 2", world_size=4)
    assert flags.batch.global_batch_size == 4
    assert flags.parallel.sequence_parallel


def test_a_run_in_samples():
    base = f"{BATCH} --lr 1e-3 --load teacher --global-batch-size 4 --mock-data"
    flags = train("--train-samples 43 --lr-warmup-samples 6 --lr-decay-samples 41", base=base)
    assert flags.batch.train_iters == 10
    assert (flags.optimizer.lr_warmup_samples, flags.optimizer.lr_decay_samples) == (6, 41)
    for extra, message in (
        ("--train-samples 3", "--train-samples 3 is less than one --global-batch-size, 4"),
        ("--train-samples 40 --lr-warmup-samples 40", "must be below --train-samples"),
        ("--train-samples 40 --lr-warmup-iters 2", "--lr-warmup-iters counts steps"),
        ("--train-samples 40 --lr-decay-iters 2", "--lr-decay-iters counts steps"),
    ):
        with refused(message):
            train(extra, base=base)


def test_blends_from_files(tmp_path):
    words, splits = tmp_path / "words", tmp_path / "splits.json"
    words.write_text("0.3 a\n0.7 b\n")
    splits.write_text('{"train": ["0.3", "a", 0.7, "b"], "valid": ["c"], "test": null}')
    assert train(f"--data-args-path {words}").data.data_path == ("0.3", "a", "0.7", "b")
    assert prune(f"--data-args-path {words}").data.data_path == ("0.3", "a", "0.7", "b")
    data = train(f"--per-split-data-args-path {splits}").data
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    assert paths == (("0.3", "a", "0.7", "b"), ("c",), ())
    assert prune(f"--per-split-data-args-path {splits}").data.train_data_path == paths[0]
    for text in ("", "{", '{"train": 3}', '{"training": ["a"]}', '["a"]'):
        splits.write_text(text)
        with refused(f"--per-split-data-args-path {splits}: not of the form", DATA):
            train(f"--per-split-data-args-path {splits}")
    words.write_text(" ")
    for path, message in ((words, "the file is empty"), (tmp_path / "none", "cannot be read")):
        with refused(message, DATA):
            train(f"--data-args-path {path}")


def test_evaluation_needs_neither_steps_nor_a_learning_rate():
    flags = train("--mock-data --skip-train --save x", base=f"{BATCH} --load teacher")
    assert flags.batch.train_iters is None


def test_flags_without_effect_are_named_once_on_rank_0(monkeypatch, capsys):
    expected = train()
    assert train("--mock-data --use-flash-attn") == expected
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("RANK", "1")
    train("--mock-data --use-flash-attn")
    assert capsys.readouterr().err == ""


def test_help_shows_defaults_and_exits_0(capsys):
    for parse in (parse_train, parse_prune):
        with pytest.raises(SystemExit) as caught:
            parse(["--help"], 1)
        assert caught.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "--seed N of data order, new weights and dropout; default 1234" in text
        assert "--seq-length N tokens of a sample; required" in text


def test_argument_dump_has_the_form_that_people_grep():
    lines = format_flags(train("--mock-data --hidden-size 8")).splitlines()
    assert lines[0] == "------------------------ arguments ------------------------"
    assert lines[-1] == "-------------------- end of arguments ---------------------"
    assert f"  hidden_size {'.' * 37} 8" in lines
    assert lines[1:-1] == sorted(lines[1:-1], key=str.lower)


def test_flags_as_plain_values():
    values = flags_as_dict(train("--data-path a b --hidden-size 8"))
    assert json.loads(json.dumps(values)) == values
    assert (values["data_path"], values["hidden_size"], values["lr"]) == (["a", "b"], 8, 1e-3)
    assert "num_layers" not in values


# Frozen: a new flag is a change to see here.
TRAIN_OPTIONS = """
    --adam-beta1 --adam-beta2 --adam-eps --add-qkv-bias --apply-layernorm-1p
    --apply-residual-connection-post-layernorm --attention-backend --attention-dropout
    --bert-no-binary-head --bf16 --ckpt-format --ckpt-step --clip-grad --context-parallel-size
    --cp-comm-type --cuda-graph-impl --cuda-graph-modules --cuda-graph-scope
    --cuda-graph-warmup-steps --data-args-path --data-cache-path --data-path
    --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --decoupled-lr
    --decoupled-min-lr --deterministic-mode --device --disable-bf16-reduced-precision-matmul
    --disable-bias-linear --disable-fp8-wgrad --disable-pad-vocab-size --disable-tp-comm-bulk-dgrad
    --disable-tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs
    --distributed-backend --distributed-timeout-minutes --dry-run --enable-cuda-graph
    --end-weight-decay --eod-mask-loss --eval-interval --eval-iters --exit-duration-in-mins
    --exit-interval --exit-on-missing-checkpoint --expert-model-parallel-size
    --expert-tensor-parallel-size --export-kd-cfg --export-kd-teacher-load --external-cuda-graph
    --ffn-hidden-size --finetune --first-last-layers-bf16 --fp16 --fp8-amax-compute-algo
    --fp8-amax-history-len --fp8-format --fp8-margin --fp8-param-gather --fp8-recipe
    --global-batch-size --gpu --grad-reduce-in-bf16 --group-query-attention --help --hidden-dropout
    --hidden-size --hybrid-layer-pattern --hysteresis --init-method-std --initial-loss-scale
    --kd-alpha --kd-fused-output --kd-hidden-loss --kd-hidden-states --kd-jsd-beta
    --kd-lm-loss-weight --kd-loss --kd-loss-weight --kd-projection --kd-teacher-store
    --kd-temperature --kd-temperature-squared --kd-top-k --kd-top-k-rest --kv-channels --load
    --load-config --log-interval --log-num-zeros-in-grad --log-params-norm --log-progress
    --log-timers-to-tensorboard --logging-level --loss-scale --loss-scale-window --lr
    --lr-decay-iters --lr-decay-samples --lr-decay-style --lr-warmup-fraction --lr-warmup-init
    --lr-warmup-iters --lr-warmup-samples --lr-wsd-decay-iters --lr-wsd-decay-samples
    --lr-wsd-decay-style --make-vocab-size-divisible-by --mamba-head-dim --mamba-num-groups
    --mamba-num-heads --mamba-state-dim --manual-gc --manual-gc-interval --max-position-embeddings
    --merge-file --mfu --micro-batch-size --min-loss-scale --min-lr --mock-data
    --moe-aux-loss-coeff --moe-ffn-hidden-size --moe-grouped-gemm --moe-router-dtype
    --moe-router-load-balancing-type --moe-router-pre-softmax --moe-router-topk
    --moe-shared-expert-intermediate-size --moe-token-dispatcher-type --mscale --mscale-all-dim
    --no-barrier-with-level-1-timing --no-bias-gelu-fusion --no-fp8-wgrad --no-load-optim
    --no-load-rng --no-mmap-bin-files --no-overlap-p2p-communication --no-pad-vocab-size
    --no-rope-freq --no-save-optim --no-save-rng --no-tp-comm-bulk-dgrad --no-tp-comm-bulk-wgrad
    --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-verify-integrity
    --no-yarn-correction-range-round-to-int --norm-epsilon --normalization --num-attention-heads
    --num-experts --num-layers --num-layers-at-end-in-bf16 --num-layers-at-start-in-bf16
    --num-layers-per-virtual-pipeline-stage --num-query-groups
    --num-virtual-stages-per-pipeline-rank --num-workers --optimizer --overlap-grad-reduce
    --overlap-p2p-communication-warmup-flush --overlap-param-gather --override-opt-param-scheduler
    --override-opt_param-scheduler --padded-vocab-size --per-split-data-args-path
    --persistent-save-interval --pipeline-model-parallel-layout --pipeline-model-parallel-size
    --position-embedding-type --pretrained-checkpoint --profile --profile-ranks --profile-step-end
    --profile-step-start --progress --pytorch-profiler-collect-callstack
    --pytorch-profiler-collect-shapes --qk-layernorm --recompute-activations
    --recompute-granularity --recompute-method --recompute-modules --recompute-num-layers
    --reset-attention-mask --reset-position-ids --rope-scaling-factor --rotary-base
    --rotary-interleaved --rotary-percent --rotary-scaling-factor
    --rotary-seq-len-interpolation-factor --save --save-interval --save-retain-interval --seed
    --seq-length --sequence-parallel --sgd-momentum --skip-train --split --squared-relu
    --start-weight-decay --swiglu --teacher-config --teacher-fp8-format --teacher-load
    --tensor-model-parallel-size --tensorboard-dir --tensorboard-queue-size --test-data-path
    --timing-log-level --timing-log-option --tokenizer-model --tokenizer-type
    --tp-comm-bootstrap-backend --tp-comm-overlap --tp-comm-overlap-cfg --tp-comm-overlap-rs-dgrad
    --train-data-path --train-iters --train-samples --transformer-impl --trust-checkpoint
    --trust-remote-code --untie-embeddings-and-output-weights --use-checkpoint-opt-param-scheduler
    --use-checkpoint-opt_param-scheduler --use-distributed-optimizer --use-pytorch-profiler
    --use-rope-scaling --use-rotary-position-embeddings --valid-data-path --vocab-file --vocab-size
    --wandb-entity --wandb-exp-name --wandb-project --wandb-save-dir --weight-decay
    --weight-decay-incr-style --window-attn-skip-freq --window-size --world-size --yarn-beta-fast
    --yarn-beta-slow --yarn-correction-range-round-to-int --yarn-original-max-position-embeddings
"""
PRUNE_OPTIONS = """
    --add-qkv-bias --apply-layernorm-1p --apply-residual-connection-post-layernorm
    --attention-backend --attention-dropout --bert-no-binary-head --bf16 --budget-batch
    --budget-context --calibration-samples --ckpt-step --context-parallel-size --cp-comm-type
    --data-args-path --data-cache-path --data-path --decoder-first-pipeline-num-layers
    --decoder-last-pipeline-num-layers --depth-block --depth-importance --depth-rescore
    --deterministic-mode --device --disable-bf16-reduced-precision-matmul --disable-bias-linear
    --disable-pad-vocab-size --distributed-backend --distributed-timeout-minutes --dry-run
    --expert-model-parallel-size --expert-tensor-parallel-size --ffn-hidden-size --fp16 --gpu
    --group-query-attention --head-residual --help --hidden-dropout --hidden-size
    --hybrid-layer-pattern --importance --importance-batch --importance-heads --importance-neurons
    --importance-sequence --init-method-std --kv-channels --load --load-config
    --make-vocab-size-divisible-by --mamba-head-dim --mamba-num-groups --mamba-num-heads
    --mamba-state-dim --max-position-embeddings --merge-file --mfu --micro-batch-size --mock-data
    --moe-aux-loss-coeff --moe-ffn-hidden-size --moe-router-dtype --moe-router-load-balancing-type
    --moe-router-pre-softmax --moe-router-topk --moe-shared-expert-intermediate-size --mscale
    --mscale-all-dim --no-bias-gelu-fusion --no-mmap-bin-files --no-overlap-p2p-communication
    --no-pad-vocab-size --no-rope-freq --no-verify-integrity
    --no-yarn-correction-range-round-to-int --norm-epsilon --normalization --num-attention-heads
    --num-experts --num-layers --num-layers-per-virtual-pipeline-stage --num-query-groups
    --num-virtual-stages-per-pipeline-rank --num-workers --overlap-p2p-communication-warmup-flush
    --padded-vocab-size --per-split-data-args-path --pipeline-model-parallel-layout
    --pipeline-model-parallel-size --plan --position-embedding-type --prune-iterations
    --qk-layernorm --reset-attention-mask --reset-position-ids --rope-scaling-factor --rotary-base
    --rotary-interleaved --rotary-percent --rotary-scaling-factor
    --rotary-seq-len-interpolation-factor --save --scores --search-space --seed --seq-length
    --sequence-parallel --split --squared-relu --swiglu --target-attention-layers --target-budget
    --target-ffn-hidden-size --target-hidden-size --target-mamba-head-dim --target-mamba-layers
    --target-mamba-num-groups --target-mamba-num-heads --target-mlp-layers
    --target-moe-ffn-hidden-size --target-moe-layers --target-moe-shared-expert-intermediate-size
    --target-num-attention-heads --target-num-experts --target-num-layers --target-num-query-groups
    --target-params --target-tolerance --targets --tensor-model-parallel-size --tokenizer-model
    --tokenizer-type --train-data-path --transformer-impl --trust-checkpoint --trust-remote-code
    --untie-embeddings-and-output-weights --use-rope-scaling --use-rotary-position-embeddings
    --vocab-file --vocab-size --window-attn-skip-freq --window-size --world-size --yarn-beta-fast
    --yarn-beta-slow --yarn-correction-range-round-to-int --yarn-original-max-position-embeddings
"""


def test_the_command_lines_are_frozen():
    assert all_options(TrainFlags) == TRAIN_OPTIONS.split()
    assert all_options(PruneFlags) == PRUNE_OPTIONS.split()


def test_flags_import_neither_torch_nor_megatron():
    heavy = "{'torch', 'numpy', 'megatron'}"
    code = f"import sys, megatron_ext.cli.programs; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
