"""The boundary behind which torch and megatron-core are imported: flags are checked before it.

    flags = parse_train(argv)                # and whatever else can be refused without a model
    with heavy.imports():
        from megatron_ext.training import run
    run.pretrain(flags)

megatron-core decorates its small functions with torch.compile, which imports torch's whole compiler
for each process that imports megatron-core, on machines too that compile nothing. Inside the
boundary a decorated function is compiled when it is called first.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

DISABLE = "TORCH_COMPILE_DISABLE"


@contextmanager
def imports() -> Iterator[None]:
    """Import torch, and put off what ``torch.compile`` does while the block imports the rest."""
    import torch

    compile_now = torch.compile
    torch.compile = functools.partial(_compiled_later, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _compiled_later(
    compile_now: Callable, function: Callable | None = None, **options: Any
) -> Callable:
    """Stand in for ``torch.compile``: the same function, compiled at its first call."""
    if function is None:
        return functools.partial(_compiled_later, compile_now, **options)
    if not isinstance(function, FunctionType):
        return compile_now(function, **options)
    import torch

    compiled = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():  # a compiled caller takes it in
            return function(*args, **kwargs)
        if compiled is None:
            is_off = os.environ.get(DISABLE) == "1"
            compiled = function if is_off else compile_now(function, **options)
        return compiled(*args, **kwargs)

    return call


def never_compile() -> None:
    """Call what ``torch.compile`` decorates as it is, from now on in this process."""
    os.environ[DISABLE] = "1"  # torch's compiler reads it when something imports that
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
