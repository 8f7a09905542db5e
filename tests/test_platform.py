"""Devices, seeds and what stands in for CUDA."""

import sys

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_ext.model.build import build_model
from megatron_ext.model.config import ModelOptions, choose_transformer_impl
from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import UserError
from megatron_ext.training.step import StepShape, train_step, wrap
from tests.models import LLAMA, random_batch
from tests.ranks import run_ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("options", "words"),
    [({"device": "cuda"}, "--device cuda"), ({"backend": "nccl"}, "--distributed-backend nccl")],
)
def test_what_is_not_there_is_refused(options, words):
    with pytest.raises(UserError, match=words) as caught:
        platform.initialize(**options)
    assert caught.value.code == 2


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert platform.choose_device(None) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="LOCAL_RANK 2: this machine shows 2 GPUs"):
        platform.choose_device("cuda")
    # srun may show each of its tasks a GPU of its own; torchrun's ranks would share it.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert platform.choose_device(None) == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match="LOCAL_RANK 2: this machine shows 1 GPUs"):
        platform.choose_device("cuda")


class BrokenEngine:
    """Finds Transformer Engine and fails to import it, as with libraries of another CUDA."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("transformer_engine"):
            raise OSError("libcudart.so.12: no such file")


def test_transformer_engine_is_looked_for_on_gpus_only(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(sys, "meta_path", [BrokenEngine(), *sys.meta_path])
    assert choose_transformer_impl(None, cpu) == choose_transformer_impl("local", gpu) == "local"
    with pytest.raises(UserError, match="cannot be imported"):
        choose_transformer_impl(None, gpu)
    with pytest.raises(UserError, match="needs a GPU with Transformer Engine"):
        choose_transformer_impl("transformer_engine", cpu)


def _draws(sizes):
    """Return this rank's layout and draws from the default and the tensor-parallel generator."""
    groups = platform.initialize(seed=7, device="cpu", **sizes).groups
    before = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    after = torch.rand(3)
    return (groups.tp.rank(), groups.pp.rank(), groups.dp.rank()), before, inside, after


def test_generators_differ_where_megatrons_do():
    """Dropout differs between tensor ranks in split regions only, and between pipeline stages."""
    results = run_ranks(
        4, _draws, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    )
    by_rank = {place[:2]: draws for place, *draws in results}
    for stage in (0, 1):
        (before, inside, after), (before_1, inside_1, after_1) = (
            by_rank[0, stage],
            by_rank[1, stage],
        )
        assert torch.equal(before, before_1)
        assert torch.equal(after, after_1)
        assert not torch.equal(inside, inside_1)
        assert not torch.equal(before, after)
    assert not torch.equal(by_rank[0, 0][0], by_rank[0, 1][0])


def test_data_parallel_ranks_draw_alike():
    (_, *first), (_, *second) = run_ranks(2, _draws, {})
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _cuda_calls():
    platform.initialize(device="cpu")
    tensor = torch.zeros(2, device="cuda") + torch.ones(2).cuda() + torch.ones(2).to("cuda:0")
    assert torch.cuda.current_device() == torch.device("cpu")
    return tensor.tolist(), tensor.device.type, tensor.type(), tensor.bfloat16().type()


def _optimizers():
    """Take a step where megatron-core has found the optimizers of a GPU, stood in for by None."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as steps

    optimizer.Adam = optimizer.SGD = steps.multi_tensor_applier = steps.multi_tensor_scale_impl = (
        None
    )
    optimizer.USING_PYTORCH_OPTIMIZER = False
    clip_grads.multi_tensor_applier = clip_grads.l2_norm_impl = None
    clip_grads.multi_tensor_scale_impl = None
    groups = platform.initialize(device="cpu").groups
    (chunk,) = build_model(LLAMA, ModelOptions(params_dtype=torch.bfloat16), groups, seed=1)
    wrapped = wrap([chunk], DistributedDataParallelConfig(grad_reduce_in_fp32=True), groups)
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16, clip_grad=0.1
    )
    adam = get_megatron_optimizer(
        config, wrapped.model, use_gloo_process_groups=False, pg_collection=groups
    )
    batch = random_batch(LLAMA, num_samples=2, seq_length=8)
    shape = StepShape(num_microbatches=1, micro_batch_size=2, seq_length=8)
    before = chunk.output_layer.weight.detach().clone()
    _, apply = train_step(wrapped, adam, [iter([batch])], shape, {"lm loss": 1.0})
    updated, norm, _ = apply()
    return updated, norm, (chunk.output_layer.weight - before).abs().max().item()


def test_optimizers_that_need_a_gpu_are_not_taken_on_a_cpu():
    updated, norm, moved = run_ranks(1, _optimizers)[0]
    assert updated
    assert norm > 0.1
    assert moved == pytest.approx(0.1, rel=0.1)


def test_cuda_calls_act_on_the_cpu():
    (result,) = run_ranks(1, _cuda_calls)
    assert result == ([2.0, 2.0], "cpu", "torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor")
