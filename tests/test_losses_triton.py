"""The Triton kernels in Triton's interpreter, which needs no GPU, and compiled for one."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.distillation import native
from megatron_ext.distillation.row_stats import row_stats
from tests import test_losses
from tests.faults import test_broken_logits
from tests.programs import ROOT
from tests.ranks import run_ranks
from tests.test_native import logits as more_logits

pytest.importorskip("triton", exc_type=ImportError)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# dtype, columns, columns of padding, temperature; blocks are of 64 columns.
CASES = list(itertools.product(("fp32", "bf16"), (1, 63, 64, 150), (0, 70), (1.0, 0.3)))
CASES += [("fp16", 150, 70, 0.3)]
# Real columns, columns of student and of teacher over all ranks. In the last a rank has none.
LAYOUTS = [(147, 150, 150), (20, 64, 64)]
UNEQUAL = (150, 153, 161)  # on one rank
# dtypes of student and teacher, the latter two with one layout
PAIRS = [("fp32", "fp32"), ("bf16", "bf16")], [("fp16", "fp16"), ("bf16", "fp32")]
TEMPERATURE = 0.7


def run_kernels(path):
    """Save what the kernels return for every case, and the losses on one rank and on two."""
    use_kernels()
    from megatron_ext.distillation import losses_triton

    found = {}
    for case in CASES:
        dtype, columns, padding, temperature = case
        student, teacher = logits(columns + padding, DTYPES[dtype])
        where = (temperature, columns)
        for moments in native.MOMENTS:
            found[moments, case] = losses_triton.row_stats(student, teacher, *where, moments)
        stats = found["gap", case]
        scale = factors(stats[0]) / temperature
        arguments = ("forward-kl", student, teacher, stats[:4], scale)
        found["gradient", case] = losses_triton.gradient(*arguments, *where, 0.0)
    for moments in native.MOMENTS:
        found["rising", moments] = losses_triton.row_stats(*rising(), 1.0, 150, moments)
    found |= {size: run_ranks(size, losses_on_a_rank) for size in (1, 2)}
    found |= {name: run_ranks(1, broken_on_a_rank, name)[0] for name in test_broken_logits.LOSSES}
    torch.save(found, path)


def use_kernels():
    """Have the losses computed by the Triton kernels, in blocks smaller than a row."""
    from megatron_ext.distillation import losses_triton

    losses_triton.BLOCK = 64
    losses_triton.BLOCKS = dict.fromkeys(native.MOMENTS, 64)
    native._module = lambda device_type: losses_triton


def broken_on_a_rank(name):
    """Return a loss of logits that are not finite."""
    use_kernels()
    return test_broken_logits.losses_on_a_rank(name)


def losses_on_a_rank():
    """Return this rank's value and gradient of every loss, and what computing them allocates."""
    use_kernels()
    group = torch.distributed.group.WORLD
    found = {}
    for name, layout, pair in loss_cases(group.size()):
        student, teacher, weights = inputs(layout, pair)
        s, t = (x.chunk(group.size(), -1)[group.rank()].contiguous() for x in (student, teacher))
        where = {"temperature": TEMPERATURE, "vocab_size": layout[0], "tp_group": group}
        loss = test_losses.LOSSES[name][0]
        found[name, layout, pair] = test_losses._value_and_grad(loss, s, t, weights, **where)
    if group.size() > 1:
        found |= {name: collectives_equal_models_and_memory(name) for name in test_losses.LOSSES}
    return found


def collectives_equal_models_and_memory(name):
    """Return what ``test_losses`` counts, loss and gradient of equal models, what is allocated."""
    loss = test_losses.LOSSES[name][0]
    same, _, weights = test_losses._inputs((2, 2, 103), torch.bfloat16)
    equal = test_losses._value_and_grad(loss, same, same.clone(), weights)
    large = test_losses._large_allocations(loss, same, same.clone(), weights)
    return test_losses._collectives(name), equal, large


def loss_cases(size):
    """Return (loss, layout, dtypes): all on ``size`` ranks."""
    layouts = LAYOUTS if size > 1 else [LAYOUTS[0], UNEQUAL]
    cases = [*itertools.product(layouts, PAIRS[0]), *itertools.product(layouts[:1], PAIRS[1])]
    return [(name, *case) for name in test_losses.LOSSES for case in cases]


def inputs(layout, pair):
    """Return logits [2, 2, v], with nonsense in their padding, and weights [2, 2]."""
    columns, *widths = layout
    student, teacher, weights = test_losses._inputs((2, 2, columns), torch.float64, seed=columns)
    student, teacher = (
        F.pad(x.to(DTYPES[kind]), (0, width - columns), value=math.nan)
        for x, kind, width in zip((student, teacher), pair, widths, strict=True)
    )
    return student, teacher, weights


def logits(columns, dtype):
    return [x[:2] for x in more_logits(columns, dtype)]


def rising():
    """Return logits whose largest come last, and far above the first."""
    student, teacher = logits(150, torch.float32)
    slope = torch.linspace(-400, 0, 150)
    return student + slope, teacher + slope.flip(-1).cumsum(-1).flip(-1) / 100


def factors(loss):
    return torch.linspace(-1, 2, loss.numel()).view_as(loss)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return interpreted(__name__, tmp_path_factory.mktemp("triton") / "found.pt")


def interpreted(module, path):
    """Return what ``run_kernels`` of a module saves in ``path``.

    The process that runs it interprets from its first import of Triton on.
    """
    code = f"from {module} import run_kernels; run_kernels({str(path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
    return torch.load(path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_float64(case, found, monkeypatch):
    test_losses.in_torch(monkeypatch)
    dtype, columns, padding, temperature = case
    student, teacher = logits(columns + padding, DTYPES[dtype])
    for moments in native.MOMENTS:
        expected = row_stats(student, teacher, temperature, columns, moments)
        torch.testing.assert_close(found[moments, case], expected, rtol=1e-5, atol=1e-5)
    # In float64: torch's own in float32 are off by more than is allowed here.
    p_s, p_t = ((x[..., :columns].double() / temperature).softmax(-1) for x in (student, teacher))
    scale = factors(expected[0]).unsqueeze(-1) / temperature
    gradient = found["gradient", case]
    reference = ((p_s - p_t) * scale).to(gradient.dtype)
    rounding = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 1e-5}[dtype]
    torch.testing.assert_close(
        gradient[..., :columns], reference, rtol=rounding, atol=4e-7 / temperature
    )
    assert not gradient[..., columns:].any()


@pytest.mark.parametrize("name", test_broken_logits.LOSSES)
def test_a_broken_number_is_no_better_loss(name, found):
    test_broken_logits.check(name, found[name])


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", test_losses.LOSSES)
def test_losses_equal_float64_autograd(name, tp_size, found, monkeypatch):
    # The interpreter cuts bits off where a GPU rounds to bfloat16.
    monkeypatch.setitem(test_losses.GRAD_TOLERANCE, torch.bfloat16, (2**-7, 1e-6))
    reference = test_losses.LOSSES[name][1]
    for _, layout, pair in [x for x in loss_cases(tp_size) if x[0] == name]:
        ranks = [rank[name, layout, pair] for rank in found[tp_size]]
        assert all(torch.equal(value, ranks[0][0]) for value, _ in ranks), (layout, pair)
        student, teacher, weights = inputs(layout, pair)
        grad = torch.cat([grad for _, grad in ranks], -1)
        assert grad.dtype == student.dtype
        assert grad[..., layout[0] :].eq(0).all()
        s, t = (x[..., : layout[0]] for x in (student, teacher))
        where = {"temperature": TEMPERATURE, "vocab_size": layout[0]}
        expected = test_losses._value_and_grad(reference, s, t, weights, **where)
        got = ranks[0][0], grad[..., : layout[0]]
        test_losses._check(got, expected, student.dtype, name=name)


@pytest.mark.parametrize("name", test_losses.LOSSES)
def test_collectives_equal_models_and_memory(name, found):
    number = 2 if name == "jsd" else 1
    for rank in found[2]:
        collectives, (value, grad), large = rank[name]
        assert collectives == (1, number, 0, [0, 2])
        # Exactly, but for cosine, as in torch.
        assert value.abs().max() <= (5e-7 if name in ("cosine", "jsd") else 0)
        assert grad.abs().max() <= (5e-7 if name in ("cosine", "jsd") else 0)
        # The gradient; the interpreter itself copies what kernels get, as bytes.
        assert large - {torch.uint8} == {torch.bfloat16}


def test_sums_follow_rising_maxima(found):
    student, teacher = (x.double() for x in rising())
    highest = student.amax(-1, keepdim=True), teacher.amax(-1, keepdim=True)
    s, t = student - highest[0], teacher - highest[1]
    expected = [*(x.squeeze(-1) for x in highest), s.exp().sum(-1), t.exp().sum(-1)]
    moments = {
        "none": [],
        "gap": [(t.exp() * (t - s)).sum(-1) / math.log(2)],
        "products": [(x.exp() * y.exp()).sum(-1) for x, y in ((s, s), (t, t), (s, t))],
    }
    for name, sums in moments.items():
        stats = found["rising", name].double()
        torch.testing.assert_close(stats, torch.stack(expected + sums), rtol=2e-6, atol=1e-6)


CHOICES = [
    *(("_stats_kernel", {"moments": name}) for name in native.MOMENTS),
    *(("_mixture_kernel", {"is_fast": is_fast}) for is_fast in (True, False)),
    *(("_gradient_kernel", {"is_fast": True, "loss": name}) for name in test_losses.LOSSES),
]


@pytest.mark.parametrize(("name", "choice"), CHOICES, ids=str)
def test_kernels_compile_for_a_gpu(name, choice, monkeypatch, tmp_path):
    from megatron_ext.distillation import losses_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("student", "teacher", "gradient"), "*bf16")
    types |= dict.fromkeys(("stats", "known", "sums", "factor"), "*fp32")
    types |= {"scale": "fp32", "beta": "fp32"}
    kernel = getattr(losses_triton, name)
    compile_for_gpu(kernel, types, choice | {"block": 4096}, num_warps=8)


def compile_for_gpu(kernel, types, choice, num_warps):
    """Compile to machine code, without a GPU: NVIDIA's assembler comes with Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(choice, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=choice)
    options = {"num_warps": num_warps}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
