"""CUDA graphs on a CPU: what a captured step runs is recorded op by op and replayed in place.

A replay runs the recorded ops on the very tensors of the capture and nothing of Python, as a graph
on a GPU does: whatever a step reads from Python (a number, a new tensor) stays as it was captured.
Reading a number back to Python while capturing raises, as CUDA does.
"""

import contextlib

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer import cuda_graphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
BETWEEN_STAGES = {torch.ops.c10d.send.default, torch.ops.c10d.recv_.default}
REDUCE_SCATTER = torch.ops.c10d._reduce_scatter_base_.default

MEMORY = ("allocated_bytes.all.current", "reserved_bytes.all.current")


class Recorder(TorchDispatchMode):
    """Records ops with their arguments and results while it is on, and undoes what they did.

    A graph on a GPU runs nothing while it is captured.
    """

    def __init__(self, graph):
        super().__init__()
        self.graph, self.made, self.before = graph, set(), {}
        self.unfinished, self.copies = 0, False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in READS:
            raise RuntimeError(f"{op} while a graph is captured: the host waits for the device")
        kwargs = kwargs or {}
        if self._is_part_of_reduce_scatter(op, args):
            return op(*args, **kwargs)
        for tensor in _tensors((args, kwargs)):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.made and place not in self.before:
                flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[place] = flat, flat.clone()
        results = op(*args, **kwargs)
        for tensor in _tensors(results):
            if tensor.untyped_storage().data_ptr() not in self.before:
                self.made.add(tensor.untyped_storage().data_ptr())
        # Aliases: what Python does to a tensor object later (x.data = y) is not the graph's.
        self.graph.ops.append((op, *tree_map(_alias, (args, kwargs, results))))
        return results

    def _is_part_of_reduce_scatter(self, op, args):
        """gloo reduces into a tensor of its own and copies a rank's part of it when waited for."""
        if op is REDUCE_SCATTER:
            self.unfinished += 1
        elif self.unfinished and op is torch.ops.aten.split.Tensor:
            place = args[0].untyped_storage().data_ptr()
            self.copies = place not in self.made and place not in self.before
            return self.copies
        elif self.copies and op is torch.ops.aten.copy_.default:
            self.unfinished, self.copies = self.unfinished - 1, False
            return True
        return False

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, content in self.before.values():
            tensor.copy_(content)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _alias(leaf):
    return leaf.data if isinstance(leaf, torch.Tensor) else leaf


class RecordedGraph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.ops = []

    def register_generator_state(self, state):
        """Take part in nothing: there is no dropout in a test of graphs."""

    @torch.no_grad()
    def replay(self):
        between_stages = []  # sends and receives under way: all begin before any is waited for
        for op, args, kwargs, results in self.ops:
            if op not in BETWEEN_STAGES:
                while between_stages:
                    between_stages.pop().wait()
            again = op(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if not isinstance(old, torch.Tensor):
                    if op in BETWEEN_STAGES:
                        between_stages.append(new)
                    elif op.namespace == "c10d":
                        new.wait()
                elif old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph, **_):
    """Stand in for ``torch.cuda.graph``."""
    with Recorder(graph):
        yield


class Stream:
    """Stands in for ``torch.cuda.Stream`` and ``torch.cuda.Event``: what is asked is done."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        pass

    wait_event = record = wait_stream


def install():
    """Put the stand-ins where megatron-core finds CUDA's, in this process."""
    torch.cuda.CUDAGraph = RecordedGraph
    torch.cuda.graph = capture
    torch.cuda.Stream = torch.cuda.Event = Stream
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool"):
        setattr(torch._C, name, lambda *_: None)
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda device=None: Stream())
    torch.cuda.set_stream = torch.cuda.graph_pool_handle = lambda *_: None
    torch.cuda.memory_stats = lambda: dict.fromkeys(MEMORY, 0)
    torch.cuda.get_device_capability = lambda: (9, 0)
    cuda_graphs.get_all_rng_states = dict
    random.get_cuda_rng_tracker().use_cudagraphable_rng = True
