"""CUDA graphs: captured steps equal eager ones, and what cannot be captured is refused.

Graphs are replayed on the CPU op by op (``tests.graph_replay``), in float64: a replayed step has to
have the same bits. No GPU runs here.
"""

import functools
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import cuda_graphs as core
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.cli.programs import parse_train
from megatron_ext.distillation.hidden import HiddenLosses
from megatron_ext.distillation.losses import KD_LOSS, LM_LOSS, LogitLoss
from megatron_ext.distillation.model import Distillation, DistillationModel
from megatron_ext.distillation.pairs import HiddenStates, parse_pairs
from megatron_ext.model import cuda_graphs
from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions
from megatron_ext.model.cuda_graphs import Graphs
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.training.step import StepShape, evaluate, train_step, wrap
from tests import graph_replay
from tests.models import BERT, GPT2, LLAMA, MOE, random_batch
from tests.programs import NEW_MODEL as FLAGS
from tests.programs import fail
from tests.ranks import run_ranks
from tests.test_layouts import LAYOUTS

STUDENT = replace(LLAMA, hidden_size=32, ffn_hidden_size=48)
TIED = replace(GPT2, hidden_size=24)
STEPS = Graphs(cuda_graph_impl="local", cuda_graph_scope=("full_iteration",))
LAYERS = Graphs(cuda_graph_impl="local")
ENGINE = Graphs(cuda_graph_impl="transformer_engine")
ALL_LAYOUTS = {"one rank": (1, {}, {})} | LAYOUTS
NUM_SAMPLES, SEQ_LENGTH = 4, 16


def losses_and_gradients(how, layout, options, **settings):
    """Distil for six steps on different data, with an evaluation after every second.

    Returns:
        Of each step, its losses and every gradient of this rank; of each evaluation, its losses.
    """
    groups = platform.initialize(**layout).groups
    graph_replay.install()
    student, teacher = settings.pop("models", (STUDENT, LLAMA))
    options = ModelOptions(params_dtype=torch.float64, **options)
    own_options = replace(options, graphs=cuda_graphs.of_student(how))
    students = build_model(student, own_options, groups, seed=7)
    teachers = build_model(teacher, options, groups, seed=8)
    distillation = Distillation(vocab_size=student.vocab_size, lm_loss_weight=0.3, **settings)
    both = zip(students, teachers, strict=True)
    chunks = [DistillationModel(s, t, distillation, groups.tp) for s, t in both]
    hidden = HiddenLosses([chunk.hidden for chunk in chunks if chunk.hidden], groups, None)
    schedule = cuda_graphs.forward_backward(how)
    more = {"hidden": hidden, "forward_backward": schedule}
    wrapped = wrap(chunks, DistributedDataParallelConfig(), groups, **more)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=0.1, params_dtype=torch.float64, clip_grad=0.0),
        wrapped.model,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    found = []
    for step in range(6):
        shape, batches = batches_of_step(step, student, groups, len(chunks))
        hidden.constant = 1.0 + step
        losses, apply = train_step(wrapped, optimizer, batches, shape, distillation.objective)
        gradients = {
            f"{index} {name}": parameter.main_grad.clone()
            for index, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        }
        apply()
        found.append((losses, gradients))
        if step % 2:
            shape, batches = batches_of_step(7 + step, student, groups, len(chunks))
            found.append((evaluate(wrapped, batches, shape, (KD_LOSS, LM_LOSS)), {}))
    return found


def batches_of_step(step, arch, groups, num_chunks):
    batch = random_batch(arch, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)
    generator = torch.Generator().manual_seed(step)
    for name in ("tokens", "labels"):
        shape = batch[name].shape
        batch[name] = torch.randint(arch.vocab_size, shape, generator=generator)
    per_rank = NUM_SAMPLES // groups.dp.size()
    first = groups.dp.rank() * per_rank
    micro_batches = [
        {name: x[i : i + 1] for name, x in batch.items()} for i in range(first, first + per_rank)
    ]
    shape = StepShape(num_microbatches=per_rank, micro_batch_size=1, seq_length=SEQ_LENGTH)
    return shape, [iter(micro_batches) for _ in range(num_chunks)]


def assert_equal(captured, eager):
    for rank, expected in zip(captured, eager, strict=True):
        for step, (found, reference) in enumerate(zip(rank, expected, strict=True)):
            assert found[0] == reference[0], step
            for name, gradient in reference[1].items():
                assert torch.equal(found[1][name], gradient), (step, name)


HIDDEN = {"hidden_states": HiddenStates(pairs=parse_pairs("embedding,mlp:1:1,2:2,3:3", (3, 3)))}
WHOLE_STEPS = [
    ("one rank", {}),
    ("one rank", {"logit_loss": LogitLoss(kind="reverse-kl")}),
    ("one rank", {"logit_loss": LogitLoss(kind="jsd")}),
    ("one rank", {"logit_loss": LogitLoss(kind="mse")}),
    ("one rank", {"logit_loss": LogitLoss(kind="cosine")}),
    ("one rank", {"logit_loss": LogitLoss(top_k=5)}),
    ("one rank", {"fused_output": True}),
    ("one rank", {"models": (TIED, GPT2)}),
    ("TP2+SP", {"logit_loss": LogitLoss(top_k=5, top_k_rest="tail")} | HIDDEN),
    ("TP2+SP", {"fused_output": True}),
    ("PP2", HIDDEN),
    ("PP2", {"models": (TIED, GPT2)}),
    ("PP2xVPP2", {}),
    ("DP2", {}),
]


def name_of(value):  # of a case
    return value if isinstance(value, str) else " ".join(map(str, value.values())) or "plain"


def eager_with(layout, settings):
    world_size, sizes, options = ALL_LAYOUTS[layout]
    return run_ranks(world_size, with_settings, Graphs(), sizes, options, settings)


@functools.cache
def eager(layout):
    return eager_with(layout, {})


@pytest.mark.parametrize(("layout", "settings"), WHOLE_STEPS, ids=name_of)
def test_captured_steps_equal_eager_ones(layout, settings):
    world_size, sizes, options = ALL_LAYOUTS[layout]
    captured = run_ranks(world_size, with_settings, STEPS, sizes, options, settings)
    assert_equal(captured, eager(layout) if not settings else eager_with(layout, settings))


def with_settings(how, sizes, options, settings):
    return losses_and_gradients(how, sizes, options, **settings)


@pytest.mark.parametrize("layout", ["one rank", "TP2+SP", "PP2", "PP2xVPP2", "DP2"])
def test_captured_layers_equal_eager_ones(layout):
    """Regression of megatron-core 0.16.1: the gradient of the embedding was wrong."""
    world_size, sizes, options = ALL_LAYOUTS[layout]
    captured = run_ranks(world_size, losses_and_gradients, LAYERS, sizes, options)
    assert_equal(captured, eager(layout))


def test_reading_a_number_back_ends_the_capture():
    """The stand-in refuses what CUDA refuses; other tests here rely on it."""
    graph = graph_replay.RecordedGraph()
    with pytest.raises(RuntimeError, match="host waits"), graph_replay.capture(graph):
        torch.ones(1).sum().item()


def test_settings_are_megatron_cores():
    names = {f.name for f in fields(TransformerConfig)}
    assert cuda_graphs.of_student(LAYERS).keys() <= names
    assert cuda_graphs.of_student(Graphs()) == {}
    assert cuda_graphs.of_student(STEPS) == {
        "cuda_graph_impl": "full_iteration",
        "cuda_graph_modules": [],
    }


REFUSED = {
    "--cuda-graph-scope attn": "--cuda-graph-scope needs --cuda-graph-impl",
    "--cuda-graph-warmup-steps 5": "--cuda-graph-warmup-steps needs --cuda-graph-impl",
    "--enable-cuda-graph --cuda-graph-scope full_iteration attn": "give it alone",
    "--external-cuda-graph --bf16 --cuda-graph-scope full_iteration": "impl local",
    "--enable-cuda-graph --cuda-graph-scope full_iteration --fp16": "loss scale",
    "--enable-cuda-graph --cuda-graph-scope full_iteration --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather": "hooks do not run",
    "--cuda-graph-impl local --teacher-load t --kd-hidden-states 1:1": "capture whole steps",
    "--cuda-graph-impl local --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1": "cannot be a graph",
    "--cuda-graph-impl transformer_engine": "needs --bf16",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_flags_that_contradict_graphs_are_refused(typed):
    with pytest.raises(UserError, match=REFUSED[typed]) as error:
        parse_train((FLAGS + typed).split(), 1)
    assert error.value.code == USAGE


def test_older_spellings():
    flags = parse_train((FLAGS + "--external-cuda-graph --bf16").split(), 1).graphs
    assert flags == ENGINE
    assert cuda_graphs.steps_before_capture(flags) == 3
    assert cuda_graphs.steps_before_capture(LAYERS) is None


@pytest.mark.parametrize(
    ("how", "models", "words"),
    [
        (LAYERS, (BERT, None), "BertModel"),
        (STEPS, (MOE, None), "tokens each expert has"),
        (STEPS, (LLAMA, MOE), "tokens each expert has"),
        (LAYERS, (replace(LLAMA, hidden_dropout=0.1), None), "--hidden-dropout 0"),
    ],
)
def test_models_that_cannot_be_captured_are_refused(how, models, words):
    with pytest.raises(UserError, match=words):
        cuda_graphs.check_models(how, *models)
    cuda_graphs.check_models(Graphs(), *models)


@pytest.mark.parametrize("dry", [[], ["--dry-run", "--device", "cpu"]], ids=["run", "dry run"])
def test_graphs_need_a_gpu(dry):
    flags = (FLAGS + "--enable-cuda-graph --hidden-dropout 0 --attention-dropout 0").split()
    code, line = fail("pretrain_distill", [*flags, *dry])
    assert (code, line) == (USAGE, "--cuda-graph-impl local needs a GPU.")


class Layers:
    """Stands in for ``TECudaGraphHelper``: notes what is asked of it, and by whom."""

    asked: ClassVar = []

    def __init__(self, model, config, seq_length, micro_batch_size, optimizers):
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        self.asked.append((seq_length, micro_batch_size, get_num_microbatches()))

    def create_cudagraphs(self):
        self.asked.append("capture")

    def cuda_graph_set_manual_hooks(self):
        self.asked.append("hooks")


class Chunk:
    """A wrapped model chunk whose hooks are noted."""

    config = "its configuration"

    def disable_forward_pre_hook(self, param_sync):
        Layers.asked.append(("off", param_sync))

    def enable_forward_pre_hook(self):
        Layers.asked.append("on")


def asked_of_transformer_engine(overlaps):
    platform.initialize()
    core.TECudaGraphHelper = Layers
    batch = SimpleNamespace(global_batch_size=12, micro_batch_size=2, seq_length=8)
    cuda_graphs.capture_layers([Chunk()], None, batch, dp_size=3, overlaps=overlaps)
    return Layers.asked


@pytest.mark.parametrize("overlaps", [False, True])
def test_transformer_engine_captures_layers(overlaps):
    expected = [(8, 2, 2), "capture"]
    if overlaps:
        expected = [(8, 2, 2), ("off", False), "capture", "on", "hooks"]
    assert run_ranks(1, asked_of_transformer_engine, overlaps)[0] == expected


class Stream:
    """A stand-in for a GPU's stream; ``log`` holds the calls in their order."""

    log: ClassVar[list] = []

    def __init__(self, name="side"):
        self.name = name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *_):
        self.log.append(f"off {self.name}")


@pytest.mark.parametrize(("impl", "name"), [("full_iteration", "capture"), ("local", "side")])
def test_gradient_buffers_are_made_where_a_capture_may_run_them(impl, name, monkeypatch):
    """Regression: whole steps could not be captured on a GPU (cudaErrorStreamCaptureImplicit).

    The nodes that accumulate gradients had been made on the default stream.
    """
    from megatron.core import full_cuda_graph

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("default"))
    monkeypatch.setattr(full_cuda_graph, "get_shared_capture_stream", lambda: Stream("capture"))
    monkeypatch.setattr(Stream, "log", [])
    with cuda_graphs.initialization_stream(SimpleNamespace(cuda_graph_impl=impl)):
        Stream.log.append("buffers")
    assert Stream.log == [
        f"{name} waits for default",
        f"on {name}",
        "buffers",
        f"off {name}",
        f"default waits for {name}",
    ]
