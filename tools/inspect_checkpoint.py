"""Say what is in a checkpoint: sizes, parameters, tensors, and what it was pruned from.

    python tools/inspect_checkpoint.py --load ckpt/pruned [--tensors]

Reads no weights and needs no model, no GPU and no other rank.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megatron_ext.arch import Arch, num_parameters
from megatron_ext.arch.kinds import KINDS
from megatron_ext.arch.sizes import BY_LAYER
from megatron_ext.checkpoint.folder import Checkpoint, locate
from megatron_ext.checkpoint.unpickling import trust
from megatron_ext.cli.megatron_flags import trust_flag
from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.pruning.plan import Plan, load_plan
from megatron_ext.runtime import heavy
from megatron_ext.runtime.errors import run_main

if TYPE_CHECKING:
    from megatron_ext.checkpoint.slices import SliceReader


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Inspection."""

    load: str = flag(REQUIRED, "folder of the checkpoint")
    ckpt_step: int | None = flag(None, "iteration to read; default the latest", at_least=0)
    tensors: bool = flag(False, "list every tensor with its shape and dtype")
    json: bool = flag(False, "print one JSON object instead of text")
    trust_checkpoint: bool = trust_flag()


@dataclass(frozen=True, kw_only=True)
class InspectFlags:
    """Say what is in a checkpoint."""

    inspection: Inspection


def main(argv: Sequence[str] | None = None) -> None:
    """Print what the checkpoint holds."""
    options = parse(InspectFlags, argv).inspection
    trust(options.trust_checkpoint)
    folder = locate(options.load, options.ckpt_step)
    with heavy.imports():
        from megatron_ext.checkpoint import checkpoints
        from megatron_ext.checkpoint.slices import SliceReader
    source = checkpoints.read(str(folder))
    reader = SliceReader(source.folder)
    plan_file = source.folder / "plan.json"
    plan = load_plan(plan_file) if plan_file.exists() else None
    if options.json:
        print(json.dumps(as_json(source, reader, plan), indent=1))
        return
    print("\n".join(describe(source, reader, plan)))
    if options.tensors:
        print("\n".join(tensor_lines(reader)))


def describe(source: Checkpoint, reader: "SliceReader", plan: Plan | None) -> Iterator[str]:
    """Yield the lines of the text form."""
    arch = source.arch
    yield f"{source.folder}: {'release' if not source.iteration else f'step {source.iteration}'}"
    values = asdict(arch) | {name: arch.span(name) for name in BY_LAYER}
    values |= {f"{name} of each": " ".join(map(str, each)) for name, each in values.pop("by_layer")}
    for name, value in values.items():
        if arch.num_experts is not None or not name.startswith(("moe_", "num_experts")):
            yield f"  {name:38} {value}"
    for name, count in parameters(arch).items():
        yield f"  {name:38} {count:,}"
    stored = sum(size_in_bytes(reader, key) for key in reader.shapes)
    yield f"  {'tensors':38} {len(reader.shapes)}, {stored / 2**20:,.1f} MiB"
    if plan is not None:
        yield f"pruned from {parameters(plan.source)['parameters']:,} parameters"
        for size in (size.name for axis in plan.axes for size in axis.sizes):
            yield f"  {size:38} {plan.source.span(size)} -> {plan.target.span(size)}"
        for name in ("layers", *KINDS):
            if name in plan.kept:
                yield f"  {f'{name} kept, from 0':38} {' '.join(map(str, plan.kept[name]))}"
        yield f"  {'head_residual':38} {plan.head_residual}"
        for name, value in plan.made.items():
            yield f"  {name:38} {value}"


def tensor_lines(reader: "SliceReader") -> Iterator[str]:
    """Yield a line per tensor: name, dtype, shape."""
    for key, (shape, dtype) in sorted(reader.shapes.items()):
        yield f"  {key:70} {str(dtype).removeprefix('torch.'):10} {list(shape)}"


def parameters(arch: Arch) -> dict[str, int]:
    """Return the parameter counts of ``arch`` by name."""
    return {
        "parameters": num_parameters(arch),
        "parameters without embeddings": num_parameters(arch, embeddings=False),
    }


def size_in_bytes(reader: "SliceReader", key: str) -> int:
    """Return what the tensor ``key`` takes on disk."""
    shape, dtype = reader.shapes[key]
    return math.prod(shape) * dtype.itemsize


def as_json(source: Checkpoint, reader: "SliceReader", plan: Plan | None) -> dict:
    """Return everything as plain data."""
    return {
        "folder": str(source.folder),
        "iteration": source.iteration,
        "arch": asdict(source.arch),
        **parameters(source.arch),
        "tensors": {
            key: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for key, (shape, dtype) in sorted(reader.shapes.items())
        },
        "plan": None if plan is None else json.loads(plan.to_json()),
    }


if __name__ == "__main__":
    run_main(main)
