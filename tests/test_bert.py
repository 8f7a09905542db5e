"""BERT: samples of masked text, padding, training and evaluation under layouts, what is refused."""

import json
import math
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ext.arch import Arch, forward_flops, num_parameters
from megatron_ext.checkpoint import checkpoints
from megatron_ext.data.datasets import shard_for_context_parallel
from megatron_ext.data.documents import Documents
from megatron_ext.data.masked_lm import FRAME, MaskedTokens, SpecialTokens
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions, transformer_config
from megatron_ext.pruning.scores_file import load_scores
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import CHECKPOINT, DATA, INTERRUPTED, USAGE
from tests.models import BERT, GPT2, random_batch
from tests.programs import (
    LAYOUTS,
    data_flags,
    fail,
    read_metrics,
    read_model,
    run_program,
    succeed,
    tokenizer_flags,
    write_corpus,
    write_model,
)
from tests.ranks import run_ranks

STUDENT = replace(BERT, hidden_size=24, ffn_hidden_size=40, num_layers=2)
PRE_NORM = replace(BERT, num_tokentypes=0, apply_residual_connection_post_layernorm=False)
VOCAB = BERT.vocab_size
# The tokenizer of tests.programs.
SPECIAL = SpecialTokens(cls=58, sep=60, mask=59, pad=57, eod=60, vocab_size=VOCAB)


def test_saved_args_are_those_of_megatron():
    args = BERT.to_args()
    assert args["bert_binary_head"] is False
    assert Arch.from_args(args) == BERT
    # megatron-core computes a GPTModel pre-norm whatever the flag says, and has the other default.
    saved = GPT2.to_args() | {"apply_residual_connection_post_layernorm": True}
    assert Arch.from_args(saved) == GPT2


BASE = Arch(
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    num_query_groups=12,
    kv_channels=64,
    max_position_embeddings=512,
    vocab_size=30522,
    padded_vocab_size=30522,
    bert_binary_head=False,
    num_tokentypes=2,
    apply_residual_connection_post_layernorm=True,
)


def test_sizes_of_bert_base():
    """The count is that of transformers' BertForMaskedLM."""
    assert num_parameters(BASE) == 109_514_298
    layer = 4 * 768 * 768 + 2 * 768 * 3072 + 2 * 768 * 128
    assert forward_flops(BASE, 128) == 2 * (12 * layer + 768 * 768 + 30522 * 768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 2}, "--bert-no-binary-head does not go with --num-experts"),
        ({"position_embedding_type": "rope"}, "learned_absolute, not rope"),
        ({"bert_binary_head": True}, "num_tokentypes 2 needs --bert-no-binary-head"),
        ({"bert_binary_head": True, "num_tokentypes": 0}, "post-layernorm needs --bert"),
    ],
)
def test_what_a_bert_cannot_be(change, message):
    extra = {"moe_ffn_hidden_size": 8, "add_bias_linear": False} if "num_experts" in change else {}
    with pytest.raises(ValueError, match=message):
        replace(BERT, **change, **extra)


# Samples.


class Windows:
    """Random text in windows of 200 tokens, of which the last has 7."""

    def __init__(self):
        self.text = torch.randint(VOCAB, (30, 200), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.text)

    def __getitem__(self, index):
        count = 7 if index == len(self) - 1 else 200
        return {"tokens": self.text[index], "loss_mask": (torch.arange(200) < count).float()}


def test_samples_hide_15_percent_of_the_text():
    windows = Windows()
    samples = MaskedTokens(windows, SPECIAL, seed=5)
    special, read = {57, 58, 59, 60}, []
    for text, sample in zip(windows.text, map(samples.__getitem__, range(30)), strict=True):
        count = int(sample["padding_mask"].sum()) - FRAME
        assert count in (7, 200)
        expected = [SPECIAL.cls, *text[:count].tolist(), SPECIAL.sep] + [SPECIAL.pad] * (
            200 - count
        )
        assert sample["labels"].tolist() == expected
        assert torch.equal(sample["attention_mask"][0, 0], sample["padding_mask"] == 0)
        hidden = sample["loss_mask"].bool()
        assert not (sample["tokens"] != sample["labels"])[~hidden].any()
        ordinary = sum(token not in special for token in text[:count].tolist())
        assert hidden.sum() == max(1, round(0.15 * ordinary))
        assert not special & set(sample["labels"][hidden].tolist())
        read += zip(
            sample["tokens"][hidden].tolist(), sample["labels"][hidden].tolist(), strict=True
        )
    shares = [
        sum(token == SPECIAL.mask for token, _ in read) / len(read),
        sum(token == label for token, label in read) / len(read),
    ]
    assert shares == pytest.approx([0.8, 0.1], abs=0.04)


def test_what_is_hidden_follows_from_seed_and_number():
    first, again, other = (MaskedTokens(Windows(), SPECIAL, seed=s) for s in (5, 5, 6))
    first[0], first[3]
    assert torch.equal(first[7]["tokens"], again[7]["tokens"])
    assert not torch.equal(first[7]["tokens"], other[7]["tokens"])


# The model.


def logits_with_padding(arch, cp, dtype):
    """Logits of this rank's positions of 8 tokens, alone and with 8 positions of padding."""
    groups = platform.initialize(context_parallel_size=cp).groups
    (model,) = build_model(arch, ModelOptions(params_dtype=dtype), groups, seed=3)
    batch = random_batch(arch, num_samples=2, seq_length=16)
    batch["attention_mask"] = (torch.arange(16) >= 8).expand(2, 1, 1, 16)
    batch["number"] = torch.arange(16).expand(2, 16)
    part = shard_for_context_parallel(batch, groups.cp.rank(), cp)
    padded = model(part["tokens"], part["position_ids"], part["attention_mask"])
    return padded, part["number"][0]


@pytest.mark.parametrize("cp", [1, 2])
def test_padding_is_not_seen(cp):
    (serial,) = run_ranks(1, logits_with_padding, BERT, 1, torch.float64)
    (alone,) = run_ranks(1, logits_of_half, BERT)
    torch.testing.assert_close(serial[0][:8], alone, rtol=1e-12, atol=1e-12)
    for logits, numbers in run_ranks(cp, logits_with_padding, BERT, cp, torch.float64):
        torch.testing.assert_close(logits, serial[0][numbers], rtol=1e-12, atol=1e-12)


def logits_of_half(arch):
    groups = platform.initialize().groups
    (model,) = build_model(arch, ModelOptions(params_dtype=torch.float64), groups, seed=3)
    batch = random_batch(arch, num_samples=2, seq_length=16)
    return model(batch["tokens"][:, :8], batch["position_ids"][:, :8], None)


@pytest.mark.parametrize("arch", [BERT, GPT2], ids=["bert", "gpt2"])
def test_half_precision_is_half_everywhere(arch):
    (logits, _), (exact, _) = (
        run_ranks(1, logits_with_padding, arch, 1, dtype)[0]
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.double(), exact, rtol=0.1, atol=0.1)


def logits_of_both(folder):
    """Logits of a pre-norm checkpoint, of our model and of megatron-core's own BertModel."""
    ours, arch = read_model(folder), PRE_NORM
    config = transformer_config(
        arch,
        ModelOptions(params_dtype=torch.float64),
        ProcessGroupCollection.use_mpu_process_groups(),
    )
    theirs = BertModel(
        config,
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        share_embeddings_and_output_weights=True,
        add_binary_head=False,
    ).double()
    state = theirs.sharded_state_dict()
    assert set(state) == set(ours.sharded_state_dict())
    found = dist_checkpointing.load(state, str(checkpoints.find(folder)))
    theirs.load_state_dict({key: found[key] for key in theirs.state_dict()})
    batch = random_batch(arch, num_samples=2, seq_length=12)
    with torch.no_grad():
        found = theirs.eval()(batch["tokens"], torch.ones(2, 12))[0]
        return ours(batch["tokens"], batch["position_ids"], None), found.transpose(0, 1)


def test_megatron_core_reads_what_is_written(tmp_path):
    """Without this package, as far as megatron-core knows the model: pre-norm, no segments."""
    write_model(str(tmp_path), PRE_NORM)
    ((ours, theirs),) = run_ranks(1, logits_of_both, str(tmp_path))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# The programs.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    write_model(str(folder / "teacher"), BERT)
    write_model(str(folder / "student"), STUDENT)
    write_model(str(folder / "gpt"), GPT2)
    corpus = write_corpus(folder / "corpus", VOCAB)
    return SimpleNamespace(
        folder=folder,
        corpus=corpus,
        data=data_flags(BERT, corpus),
        models=["--load", str(folder / "student"), "--teacher-load", str(folder / "teacher")],
    )


STEPS = shlex.split(
    "--global-batch-size 4 --lr 3e-3 --train-iters 4 --save-interval 2 --log-interval 1 "
    "--eval-interval 2 --eval-iters 1"
)
KINDS = {
    "kl": "",
    "lm": "--kd-lm-loss-weight 0.5 --kd-fused-output",
    "hidden": "--kd-hidden-states 3:1,embedding --kd-loss reverse-kl",
}


def train(place, save, extra, layout="TP1"):
    world_size, flags = LAYOUTS[layout]
    argv = [*place.data, *place.models, *STEPS, "--save", str(save), *extra.split()]
    succeed("pretrain_distill", [*argv, *flags.split()], world_size)
    return read_metrics(str(save))


@pytest.fixture(scope="module")
def serial(place, tmp_path_factory):
    return {n: train(place, tmp_path_factory.mktemp("s") / "s", x) for n, x in KINDS.items()}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("kl", "DP2"), ("kl", "CP2"), ("lm", "TP2+SP"), ("hidden", "TP2+SP"), ("hidden", "PP2")],
)
def test_no_layout_changes_a_loss(kind, layout, place, serial, tmp_path):
    found = train(place, tmp_path / "save", KINDS[kind], layout)
    assert len(found) == len(serial[kind])
    for ours, theirs in zip(found, serial[kind], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_a_run_goes_on_as_if_it_had_not_stopped(place, serial, tmp_path):
    argv = [*place.data, *place.models, *STEPS, "--save", str(tmp_path / "save")]
    (stopped,) = run_program("pretrain_distill", [*argv, "--exit-interval", "2"])
    assert stopped.code == INTERRUPTED
    succeed("pretrain_distill", argv)
    assert read_metrics(str(tmp_path / "save")) == serial["kl"]


def test_recomputation_changes_nothing(place, serial, tmp_path):
    flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = train(place, tmp_path / "save", flags)
    for ours, theirs in zip(found, serial["kl"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_stored_teacher_is_the_loaded_one(place, tmp_path):
    store = ["--kd-teacher-store", str(tmp_path / "store")]
    top_k, steps = ["--kd-top-k", "9"], ["--train-iters", "4", "--global-batch-size", "4"]
    teacher = ["--teacher-load", str(place.folder / "teacher")]
    succeed("tools.store_teacher", [*place.data, *teacher, *store, *top_k, *steps])
    found = []
    for name, flags in (("loaded", teacher), ("stored", store)):
        argv = [*place.data, *place.models[:2], *STEPS, *flags, *top_k]
        succeed("pretrain_distill", [*argv, "--save", str(tmp_path / name)])
        metrics = read_metrics(str(tmp_path / name))
        found.append([step["kd loss"] for step in metrics if "kd loss" in step][:4])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_new_bert_is_made_from_flags(place, tmp_path):
    sizes = shlex.split(
        "--num-layers 2 --hidden-size 24 --num-attention-heads 4 --max-position-embeddings 16 "
        "--bert-no-binary-head --apply-residual-connection-post-layernorm"
    )
    succeed("pretrain_distill", [*place.data, *STEPS, *sizes, "--save", str(tmp_path)])
    arch = checkpoints.read(str(tmp_path)).arch
    assert arch.is_bert
    assert (arch.num_tokentypes, arch.apply_residual_connection_post_layernorm) == (0, True)


def naive_losses(load, prefix, seq_length):
    """Return the mean loss of all hidden tokens, sample by sample and without padding."""
    model, total, count = read_model(load), 0.0, 0
    samples = MaskedTokens(Documents([prefix], seq_length - FRAME, 1), SPECIAL, seed=1234)
    for sample in map(samples.__getitem__, range(len(samples))):
        real = int(sample["padding_mask"].sum())
        ids = sample["tokens"][None, :real]
        with torch.no_grad():
            logits = model(ids, torch.arange(real)[None], None)[:, 0, :VOCAB]
        losses = torch.nn.functional.cross_entropy(
            logits.double(), sample["labels"][:real], reduction="none"
        )
        total += (losses * sample["loss_mask"][:real]).sum().item()
        count += int(sample["loss_mask"].sum())
    return total / count


@pytest.fixture(scope="module")
def expected(place):
    return {
        name: run_ranks(1, naive_losses, str(place.folder / model), place.corpus, 16)[0]
        for name, model in (("lm loss", "student"), ("teacher lm loss", "teacher"))
    }


@pytest.mark.parametrize("layout", ["DP2", "CP2", "TP2+SP"])
def test_evaluation_is_the_naive_one(layout, place, expected, tmp_path):
    path, (ranks, flags) = tmp_path / "figures.json", LAYOUTS[layout]
    argv = [*place.models, "--data-path", place.corpus, "--json", str(path), "--num-workers", "0"]
    argv += ["--seq-length", "16", "--micro-batch-size", "2", *flags.split()]
    succeed("tools.evaluate", [*argv, *tokenizer_flags(BERT, place.corpus).split()], ranks)
    found = json.loads(path.read_text())
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["lm loss"]))


@pytest.mark.parametrize("depth", ["block", "kl", "loss"])
def test_depth_scores_do_not_depend_on_the_layout(depth, place, tmp_path):
    found = []
    for layout in ("TP1", "PP2"):
        ranks, flags = LAYOUTS[layout]
        path = str(tmp_path / layout)
        argv = ["--load", str(place.folder / "teacher"), *place.data, "--calibration-samples", "4"]
        argv += ["--depth-importance", depth, "--depth-rescore", "--target-num-layers", "2"]
        succeed("prune", [*argv, "--scores", path, *flags.split()], ranks)
        found.append(load_scores(path))
    one, two = found
    assert one.removal_order == two.removal_order
    layers = one.vectors["layers"]
    torch.testing.assert_close(layers, two.vectors["layers"], rtol=1e-4, atol=1e-6)
    assert layers.unique().numel() == BERT.num_layers


def test_all_the_data_can_be_asked_for(place, tmp_path):
    """A sample of 16 positions takes 14 tokens of text."""
    documents = IndexedDataset(place.corpus)
    tokens = int(documents.sequence_lengths[: round(0.8 * len(documents))].sum())
    count = (tokens - 1) // 14
    flags = ["--load", str(place.folder / "teacher"), *place.data, "--target-num-layers", "3"]
    flags += ["--scores", str(tmp_path / "scores"), "--calibration-samples"]
    code, line = fail("prune", [*flags, str(count + 1)])
    assert (code, f"has only {count} samples of 14 tokens" in line) == (DATA, True)
    succeed("prune", [*flags, str(count)])


# What is refused.


def test_what_a_bert_does_not_do(place, tmp_path):
    teacher = ["--load", str(place.folder / "teacher")]
    save = ["--save", str(tmp_path / "save")]
    null = shlex.split(f"--tokenizer-type NullTokenizer --vocab-size {VOCAB}")
    at = place.data.index("--tokenizer-type")
    no_mask = [*place.data[:at], *null, *place.data[at + 4 :]]
    prune = [*teacher, *save, "--calibration-samples", "2", "--target-num-layers", "2"]
    gpt = ["--load", str(place.folder / "gpt"), "--teacher-load", str(place.folder / "teacher")]
    engine = ["--transformer-impl", "transformer_engine"]
    for program, argv, expected, words in (
        ("prune", [*prune, *no_mask], DATA, "has no cls token, which a BertModel's samples need"),
        ("prune", [*prune, *place.data, "--reset-attention-mask"], USAGE, "mask: not for"),
        ("prune", [*prune, *place.data, *engine], USAGE, "local layers here"),
        ("prune", [*prune, *place.data, "--seq-length", "2"], USAGE, "no text; at least 3"),
        ("pretrain_distill", [*gpt, *STEPS, *save, *place.data], CHECKPOINT, "is a BertModel and"),
        ("tools.generate", [*teacher, *null, "--prompt", "1"], CHECKPOINT, "continues no texts"),
    ):
        code, line = fail(program, argv)
        assert words in line
        assert code == expected
        assert "\n" not in line
