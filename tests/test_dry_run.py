"""--dry-run of the programs, and the estimate from their flags, with and without checkpoints."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import safe_load
from megatron_ext.distillation import stored
from megatron_ext.runtime.errors import CHECKPOINT, DATA, USAGE
from tests.models import LLAMA
from tests.programs import (
    ROOT,
    data_flags,
    fail,
    run_here,
    succeed,
    write_corpus,
    write_model,
)

CONFIG = str(ROOT / "examples/llama3.1-8b-to-4b/teacher.json")
RUN = "--seq-length 16 --micro-batch-size 1 --train-iters 4 --lr 1e-3"
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 100"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a teacher of LLAMA's sizes, half a student and data."""
    folder = tmp_path_factory.mktemp("dry")
    write_model(str(folder / "teacher"), LLAMA)
    write_model(str(folder / "student"), replace(LLAMA, hidden_size=40, ffn_hidden_size=48))
    write_corpus(folder / "corpus", LLAMA.vocab_size)
    write_corpus(folder / "wide", 1000)
    return folder


def dry(program, line, place=None):
    return run_here([program, "--dry-run", *shlex.split(line.format(p=place, c=CONFIG))])


def refused(program, line, place=None):
    """Return code and message of a dry run that ends in one line."""
    code, stdout, stderr = dry(program, line, place)
    assert stderr.startswith("ERROR: "), stdout + stderr
    assert stderr.count("\n") == 1
    assert not stdout.endswith("OK\n")
    return code, stderr.removeprefix("ERROR: ").rstrip()


def data_of(place):
    return shlex.join(data_flags(LLAMA, str(place / "corpus")))


def test_a_distillation_whose_files_are_there(place):
    line = (
        f"--load {place}/student --finetune --teacher-load {place}/teacher --train-iters 4 "
        "--lr 1e-3 --world-size 4 --tensor-model-parallel-size 2 --global-batch-size 8 "
        f"{data_of(place)}"
    )
    code, stdout, stderr = dry("pretrain_distill.py", line)
    assert (code, stderr) == (0, "")
    assert "layout      4 ranks = TP 2 x PP 1 x CP 1 x DP 2" in stdout
    assert "4 micro-batches of 1 on each of 2 data-parallel ranks" in stdout
    assert f"hidden 40, ffn 48, heads 4/2, vocabulary 104; from {place}/student" in stdout
    assert f"from {place}/teacher" in stdout
    assert "teacher weights" in stdout
    assert "not checked" not in stdout
    assert stdout.endswith("OK\n")
    assert not torch.distributed.is_initialized()


def test_world_size_of_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    line = f"--load x --load-config {{c}} --hidden-size 3072 {RUN} --bf16 --gpu B200 --mock-data"
    line += " --tokenizer-type NullTokenizer --vocab-size 128256 --tensor-model-parallel-size 2"
    code, stdout, stderr = dry("pretrain_distill.py", line)
    assert (code, stderr) == (0, "")
    assert "layout      6 ranks = TP 2 x PP 1 x CP 1 x DP 3" in stdout
    monkeypatch.setenv("WORLD_SIZE", "5")
    code, message = refused("pretrain_distill.py", line)
    assert code == USAGE
    assert message.startswith("5 ranks are not a multiple of --tensor-model-parallel-size 2")


def test_an_even_teacher_beside_a_student_of_half_its_layers(place, tmp_path):
    """The stages are those of the run: the student's layers are placed by hand."""
    write_model(str(tmp_path / "three"), replace(LLAMA, num_layers=3))
    line = (
        f"--load {tmp_path}/three --finetune --teacher-load {place}/teacher {RUN} {MOCK} "
        "--world-size 2 --pipeline-model-parallel-size 2"
    )
    code, stdout, stderr = dry("pretrain_distill.py", line)
    assert (code, stderr) == (0, "")
    assert "stages Ett|tL" in stdout


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (f"--load {{p}}/none {RUN} {MOCK}", CHECKPOINT, "--load {p}/none: no checkpoint there yet"),
        (
            f"--load {{p}}/student --finetune --teacher-load {{p}}/none {RUN} {MOCK}",
            CHECKPOINT,
            "--teacher-load {p}/none: no checkpoint there yet; --teacher-config can say the sizes.",
        ),
        (
            f"--load {{p}}/student --hidden-size 32 {RUN} {MOCK}",
            CHECKPOINT,
            None,  # a table of the sizes that differ
        ),
        (
            f"--load x --load-config {{c}} --hidden-size 5000 {RUN} {MOCK}",
            USAGE,
            "--hidden-size 5000: choose from 1 to the checkpoint's 4096.",
        ),
        (
            f"--load {{p}}/student --finetune --world-size 8 --tensor-model-parallel-size 8 {RUN} "
            f"{MOCK}",
            USAGE,
            "--tensor-model-parallel-size 8 does not divide --num-attention-heads, 4;",
        ),
        (
            f"--load x --load-config {{c}} {RUN} {MOCK} --bf16 --gpu A100",
            USAGE,
            "--gpu A100 has 80 GB, the fullest rank needs 145, 96 of them optimizer: try "
            "--use-distributed-optimizer",
        ),
        (f"--load x --load-config {{p}}/corpus.idx {RUN} {MOCK}", CHECKPOINT, "--load-config {p}"),
        (
            f"--load x --load-config {{c}} {RUN} {MOCK} --fp8-format e4m3 --transformer-impl local",
            USAGE,
            "--fp8-format e4m3 needs a GPU with Transformer Engine installed, and",
        ),
        (
            f"--load x --load-config {{c}} {RUN} {MOCK} --fp8-format e4m3 --gpu A100",
            USAGE,
            "--fp8-format e4m3: --gpu A100 has no FP8.",
        ),
        (
            f"--load {{p}}/student --finetune {RUN} --data-path {{p}}/half --tokenizer-type "
            "NullTokenizer --vocab-size 100 --eval-iters 0",
            DATA,
            "{p}/half.bin: no such file.",
        ),
        (
            f"--load {{p}}/student --finetune {RUN} --data-path {{p}}/wide --tokenizer-type "
            "NullTokenizer --vocab-size 100 --eval-iters 0",
            DATA,
            "{p}/wide.bin: document 0 has token ids from",
        ),
        (
            f"--load {{p}}/student --finetune {RUN} --mock-data --tokenizer-type NullTokenizer "
            "--vocab-size 99",
            CHECKPOINT,
            "{p}/student/release was trained with 100 tokens, the tokenizer has 99",
        ),
    ],
)
def test_what_could_not_run(line, code, message, place):
    (place / "half.idx").write_bytes((place / "corpus.idx").read_bytes())
    if message is None:
        found, _, stderr = dry("pretrain_distill.py", line, place)
        assert (found, "--hidden-size  40          32" in stderr) == (code, True)
        return
    found, said = refused("pretrain_distill.py", line, place)
    assert (found, said.startswith(message.format(p=place))) == (code, True), said


def test_pruning(place, tmp_path):
    line = (
        f"--load {place}/teacher --save {tmp_path}/pruned --target-hidden-size 40 --world-size 2 "
        f"--calibration-samples 8 {data_of(place)}"
    )
    code, stdout, stderr = dry("prune.py", line)
    assert (code, stderr) == (0, "")
    assert f"from {place}/teacher" in stdout
    assert f"hidden 40, ffn 80, heads 4/2, vocabulary 104; to {tmp_path}/pruned" in stdout
    assert "1 forward passes over 8 samples" in stdout
    assert stdout.endswith("OK\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("--target-hidden-size 40", 1),
        ("--target-hidden-size 24 --prune-iterations 3", 3),
        ("--target-num-layers 2 --depth-importance loss", 1 + 4),
        ("--target-num-layers 2 --depth-importance kl", 1 + 5),
        ("--target-num-layers 2 --depth-importance kl --depth-rescore", 1 + 5 + 4),
        ("--target-num-layers 2 --depth-importance loss --depth-block 2", 1 + 3),
        ("--target-num-layers 2 --depth-block 2", 1 + 1),
        ("--target-num-layers 2 --depth-rescore", 1 + 2),
        ("--target-attention-layers 3", 1 + 1),
        ("--target-attention-layers 3 --depth-importance kl", 1 + 9),
    ],
)
def test_every_pass_counts(line, passes, place, tmp_path):
    line += f" --load {place}/teacher --save {tmp_path}/pruned --calibration-samples 8"
    code, stdout, stderr = dry("prune.py", f"{line} {data_of(place)}")
    assert (code, stderr) == (0, "")
    assert f"{passes} forward passes over 8 samples" in stdout


@pytest.mark.parametrize("what", ["scores", "plan", "targets"])
def test_pruning_without_data_where_the_run_needs_none(what, place, tmp_path):
    """Scores or a plan that are there; a search that only lists its candidates."""
    flags = f"--load {place}/teacher --seq-length 16 --micro-batch-size 1 --importance random"
    if what == "targets":
        (tmp_path / "space.yaml").write_text("hidden_size: [40]")
        line = f"--target-params 1e5 --target-tolerance 0.9 --search-space {tmp_path}/space.yaml"
    else:
        line = "--target-hidden-size 40"
        made = f"{flags} {line} --{what} {tmp_path}/{what}"
        succeed("prune", shlex.split(made))
        assert (tmp_path / what).exists()
        line += f" --save {tmp_path}/new"
    line = f"{flags} {line} --{what} {tmp_path}/{what}".replace(" --importance random", "")
    code, stdout, stderr = dry("prune.py", line)
    assert (code, stderr, "forward passes" in stdout) == (0, "", False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--target-hidden-size 64",
            "--target-hidden-size 64: choose from 1 to the checkpoint's 48.",
        ),
        (
            "--target-num-attention-heads 3",
            "--target-num-attention-heads 3: each of 2 query groups",
        ),
        ("--calibration-samples 9", "--calibration-samples 9 is not a multiple of"),
        ("--tensor-model-parallel-size 4", "2 ranks are not a multiple of"),
        ("--save {p}/student", "--save {p}/student: a checkpoint is there already."),
    ],
)
def test_what_could_not_be_pruned(line, message, place):
    base = f"--load {place}/teacher --save {place}/new --world-size 2 --calibration-samples 8"
    code, said = refused("prune.py", f"{base} {data_of(place)} {line}", place)
    assert (code, said.startswith(message.format(p=place))) == (USAGE, True), said


def convert(line):
    return run_here(["tools/convert.py", *shlex.split(line.format(c=CONFIG))])


def test_conversions(place, tmp_path):
    code, stdout, stderr = convert(f"import --dry-run --hf {tmp_path} --save x --load-config {{c}}")
    assert (code, stderr) == (0, "")
    assert "8,030,261,248 parameters" in stdout
    assert stdout.endswith("bfloat16    16.06 GB on disk\nOK\n")
    # A folder that is there counts before --load-config.
    config = json.loads(Path(CONFIG).read_text()) | {"num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, stdout, _ = convert(f"import --dry-run --hf {tmp_path} --save x --load-config {{c}}")
    assert (code, "16 layers" in stdout) == (0, True)
    # A Ministral, as far as it does not scale queries.
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    scaled = {"model_type": "ministral3", "rope_scaling": rope | {"llama_4_scaling_beta": 0.1}}
    (tmp_path / "config.json").write_text(json.dumps(config | scaled))
    line = f"import --dry-run --hf {tmp_path} --save x"
    code, _, stderr = convert(line)
    assert (code, "llama_4_scaling_beta 0.1 scales queries" in stderr) == (CHECKPOINT, True)
    assert convert(f"{line} --max-position-embeddings 4096")[0] == 0
    line = f"export --dry-run --load {place}/student --hf {tmp_path}/new --model-type mistral"
    code, stdout, stderr = convert(f"{line} --hidden-size 40 --max-shard-size 20KB")
    assert (code, stderr, stdout.endswith("OK\n")) == (0, "", True)
    assert "hidden 40" in stdout
    for flag in ("--vocab-size 99", f"--tokenizer-model {place}/nowhere"):
        code, _, stderr = convert(f"{line} {flag}")
        assert (code, stderr.startswith(f"ERROR: {flag}: ")) == (USAGE, True)
    code, _, stderr = convert(f"{line} --hidden-size 41")
    assert (code, "other sizes" in stderr) == (CHECKPOINT, True)
    code, _, stderr = convert(f"{line.replace('mistral', 'gpt2')}")
    assert (code, stderr.startswith("ERROR: --model-type gpt2: ")) == (USAGE, True)
    code, _, stderr = convert("export --load x --hf y --load-config {c}")
    assert (code, stderr) == (USAGE, "ERROR: --load-config needs --dry-run.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_the_estimate_is_that_of_the_dry_run():
    """From flags alone; and nothing is refused for want of memory."""
    flags = (
        f"--load-config {CONFIG} --teacher-config {CONFIG} --hidden-size 3072 "
        "--ffn-hidden-size 9216 --seq-length 8192 --micro-batch-size 1 --train-iters 10 --bf16 "
        "--world-size 2"
    )
    code, stdout, stderr = run_here(["tools/estimate.py", *shlex.split(flags)])
    assert (code, stderr) == (0, "")
    _, rehearsed, _ = dry("pretrain_distill.py", f"{flags} --lr 1 {MOCK}")
    assert stdout.splitlines()[:-1] == rehearsed.splitlines()
    assert stdout.splitlines()[-1].startswith("share of the memory: A100 1")
    sizes = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64"
    argv = shlex.split(f"{sizes} --vocab-size 1000 --seq-length 64 --micro-batch-size 2")
    code, stdout, _ = run_here(["tools/estimate.py", *argv])
    assert (code, "vocabulary 1024; from the flags" in stdout, "days" in stdout) == (0, True, False)


def test_a_checkpoint_that_does_not_know_its_tokens(place, tmp_path):
    """Regression: dry runs refused what the programs take, checkpoints of Megatron-LM."""
    shutil.copytree(place / "teacher", tmp_path / "foreign")
    path = tmp_path / "foreign/release/common.pt"
    common = safe_load.load_common(path.parent)
    vars(common["args"]).update(vocab_size=None, tokenizer_type="NullTokenizer")
    torch.save(common, path)
    source = f"--load {tmp_path}/foreign"
    code, _, stderr = dry("pretrain_distill.py", f"{source} --finetune {RUN} {MOCK}")
    assert (code, stderr) == (0, "")
    line = f"{source} --save {tmp_path}/x --calibration-samples 8 {data_of(place)}"
    code, _, stderr = dry("prune.py", line)
    assert (code, stderr) == (0, "")


def test_the_tokenizer_of_the_teacher(place):
    """Regression: that of the student alone was compared."""
    line = (
        f"--load x --load-config {{c}} --hidden-size 48 --teacher-load {place}/teacher {RUN} "
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 128256"
    )
    code, said = refused("pretrain_distill.py", line)
    assert code == CHECKPOINT
    assert said.startswith(f"{place}/teacher/release was trained with 100 tokens"), said


def test_a_stored_teacher(place, tmp_path):
    """Regression: the folder was not looked at."""
    line = f"--load {place}/student --finetune {RUN} {MOCK} --kd-teacher-store {tmp_path}/store"
    code, stdout, _ = dry("pretrain_distill.py", line)
    assert (code, f"not checked stored teacher {tmp_path}/store" in stdout) == (0, True)
    stored.begin(
        tmp_path / "store",
        stored.StoreIndex(
            top_k=4,
            temperature=2.0,
            seq_length=16,
            vocab_size=100,
            tokenizer_sha256=None,
            num_samples=4,
            samples_per_file=4,
            teacher="t",
        ),
    )
    code, said = refused("pretrain_distill.py", line)
    assert (code, said.startswith("the stored teacher has temperature 2.0, this run 1.0")) == (
        DATA,
        True,
    )


def test_a_run_that_must_not_begin_anew(place, tmp_path):
    """Regression: a dry run said OK to what the program refuses."""
    sizes = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 16"
    line = (
        f"--load {tmp_path}/a --save {tmp_path}/a --save-interval 1 {sizes} {RUN} {MOCK} "
        "--exit-on-missing-checkpoint"
    )
    code, said = refused("pretrain_distill.py", line)
    assert (code, said.startswith(f"--load {tmp_path}/a: no checkpoint there")) == (
        CHECKPOINT,
        True,
    )


def test_fp8_weights_of_a_new_model(tmp_path):
    """Regression: --load was taken for weights, also where it names the run's own empty folder."""
    sizes = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 16"
    line = (
        f"--load {tmp_path}/a --save {tmp_path}/a --save-interval 1 {sizes} {RUN} {MOCK} --bf16 "
        "--fp8-format e4m3 --fp8-param-gather --use-distributed-optimizer"
    )
    code, said = refused("pretrain_distill.py", line)
    assert (code, said.startswith("--fp8-param-gather: new weights are not drawn in FP8")) == (
        USAGE,
        True,
    )
    assert fail("pretrain_distill", shlex.split(line)) == (code, said)


def test_a_plan_that_is_there(place, tmp_path):
    """Regression: data were asked for that no step reads, and the plan was not looked at."""
    plan = f"--plan {tmp_path}/plan.json"
    base = f"--load {place}/teacher --save {tmp_path}/x --seq-length 16 --micro-batch-size 1"
    making = f"{base} --importance magnitude --target-hidden-size 40 {plan}"
    succeed("prune", shlex.split(making.replace(f"--save {tmp_path}/x", "")))
    code, stdout, stderr = dry("prune.py", f"{base} {plan}")
    assert (code, stderr) == (0, "")
    assert "forward passes" not in stdout
    assert f"hidden 40, ffn 80, heads 4/2, vocabulary 104; to {tmp_path}/x" in stdout
    code, said = refused("prune.py", f"{base} {plan} --target-hidden-size 24")
    assert (code, "leads to other sizes than the --target flags" in said) == (USAGE, True)
    (tmp_path / "scores.safetensors").write_text("no scores")
    scores = f"--scores {tmp_path}/scores.safetensors"
    code, said = refused("prune.py", f"{base} {scores} --target-hidden-size 24")
    assert (code, said.startswith(f"{scores} cannot be read")) == (CHECKPOINT, True), said


def test_data_without_a_tokenizer(place):
    """Regression: a dry run said OK to what the programs refuse."""
    data = f"--data-path {place}/corpus"
    line = f"--load {place}/teacher --save {place}/new --target-hidden-size 40 {data}"
    line += " --seq-length 16 --micro-batch-size 1 --calibration-samples 8"
    code, said = refused("prune.py", line)
    assert (code, said.startswith("--tokenizer-type None: choose")) == (USAGE, True)
    code, said = refused("pretrain_distill.py", f"--load {place}/student --finetune {RUN} {data}")
    assert (code, said.startswith("--tokenizer-type None: choose")) == (USAGE, True)
