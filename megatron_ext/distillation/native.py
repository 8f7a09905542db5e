"""The kernels that compute a loss: ``losses_c`` on CPUs, ``losses_triton`` on CUDA, or none.

Both have the same three functions, of contiguous logits student and teacher [S, B, v] with c > 0
real columns. s' and t' are logits centred on their rows' maxima, in bits (``chunks``).

    row_stats(student, teacher, temperature, columns, moments)
        -> [4 + m, S, B] float32, of this rank's columns: max s, max t, sum 2^s', sum 2^t', and the
        moments none (m = 0), gap (1: sum 2^t' (t' - s')) or products (3: sum 2^2s', sum 2^2t',
        sum 2^s' 2^t')
    mixture_sums(student, teacher, stats, temperature, columns, beta)
        -> [2, S, B] float32, of this rank's columns: sum p_s (log p_s - log m) and
        sum p_t (log p_t - log m), m = beta p_t + (1 - beta) p_s, in nats
    gradient(loss, student, teacher, stats, scale, temperature, columns, beta)
        -> [S, B, v] in the student's dtype, rounded once: the gradient of ``loss`` (a name of
        ``steps``) with respect to the student's logits

``stats`` are [k, S, B] float32 as ``steps.Steps`` says, over all ranks; ``scale`` is the factor of
each row, [S, B] float32. Padding is never read and gets a gradient of 0.
"""

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

MOMENTS = {"none": 0, "gap": 1, "products": 3}
MODULES = {"cpu": "losses_c", "cuda": "losses_triton"}


def kernels(
    student: Tensor, teacher: Tensor, columns: int, *, gradient_of: str | None = None
) -> ModuleType | None:
    """Return the module whose kernels take these logits, or None: ``steps`` computes in torch.

    ``gradient_of`` is the loss whose gradient is asked for; a module without it (``LOSSES``) takes
    nothing. None without a compiler (``compiled``) or Triton, for other dtypes and layouts, and for
    a rank without real columns. MEGATRON_EXT_NATIVE=0 has it always be None.
    """
    module = _module(student.device.type)
    if module is None or columns == 0 or not module.takes(student, teacher):
        return None
    if gradient_of is not None and gradient_of not in module.LOSSES:
        return None
    return module if student.is_contiguous() and teacher.is_contiguous() else None


def name(device: torch.device | int | str) -> str:
    """Return what computes losses on ``device``: a module of kernels, or torch.

    They differ in the last bits.
    """
    module = _module(torch.device(device).type)
    x = torch.empty(1, 1, 1, device="cpu")
    is_there = module is not None and (module.__name__.endswith("triton") or module.takes(x, x))
    return module.__name__.rpartition(".")[2] if is_there else "torch"


@functools.cache
def _module(device_type: str) -> ModuleType | None:
    """Return the module of kernels for a kind of device, or None without Triton."""
    if device_type not in MODULES or os.environ.get("MEGATRON_EXT_NATIVE") == "0":
        return None
    try:
        return importlib.import_module(f"{__package__}.{MODULES[device_type]}")
    except ImportError:
        return None
