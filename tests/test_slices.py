"""Slices of a checkpoint: any part of any saved sharding, only the files needed, damage named."""

import io
import pickle
from argparse import Namespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_ext.checkpoint import safe_load, writer
from megatron_ext.checkpoint.slices import SliceReader
from megatron_ext.runtime.errors import CHECKPOINT, UserError
from tests.ranks import run_ranks

NUM_LAYERS = 3
STACKED, PER_LAYER = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"


def global_tensors():
    return {
        "plain": torch.arange(6.0 * 10).view(6, 10),
        "vector": torch.arange(8, dtype=torch.float64),
        STACKED: torch.arange(NUM_LAYERS * 4 * 6).view(NUM_LAYERS, 4, 6).bfloat16(),
        PER_LAYER: 1000 + torch.arange(NUM_LAYERS * 6 * 4.0).view(NUM_LAYERS, 6, 4),
    }


def save_sharded(folder):
    """Write the tensors from two ranks: rows, columns or layers each."""
    rank, tensors = torch.distributed.get_rank(), global_tensors()

    def half(key, axis):
        mine = tensors[key].chunk(2, axis)[rank].contiguous()
        return ShardedTensor.from_rank_offsets(key, mine, (axis, rank, 2))

    state = {"plain": half("plain", 1), "vector": half("vector", 0)}
    for layer in range(NUM_LAYERS):
        columns = tensors[STACKED][layer].chunk(2, 1)[rank].contiguous()
        state[f"stacked.{layer}"] = ShardedTensor.from_rank_offsets(
            STACKED, columns, (0, layer, NUM_LAYERS), (2, rank, 2), prepend_axis_num=1
        )
        key = PER_LAYER.replace("layers.", f"layers.{layer}.")
        rows = tensors[PER_LAYER][layer].chunk(2, 0)[rank].contiguous()
        state[key] = ShardedTensor.from_rank_offsets(key, rows, (0, rank, 2))
    state["rng_state"] = ShardedObject("rng_state", {"seed": 7}, (2,), (rank,))
    writer.save(folder, "release", state | {"args": Namespace(num_layers=3)}, files={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    run_ranks(2, save_sharded, str(root))
    return root / "release"


@pytest.fixture
def copy(folder, tmp_path):
    """A checkpoint that a test may damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_shapes(folder):
    shapes = SliceReader(folder).shapes
    assert shapes["plain"] == ((6, 10), torch.float32)
    assert shapes[STACKED] == ((NUM_LAYERS, 4, 6), torch.bfloat16)
    assert shapes["decoder.layers.2.mlp.linear_fc2.weight"] == ((6, 4), torch.float32)
    assert "rng_state/shard_0_2" not in shapes  # not a tensor
    assert len(shapes) == 3 + NUM_LAYERS
    common = "common_state/shard_0_1"
    assert SliceReader(folder).objects == {common, "rng_state/shard_0_2", "rng_state/shard_1_2"}


@pytest.mark.parametrize(
    ("key", "index"),
    [
        ("plain", [slice(None), slice(None)]),
        ("plain", [slice(1, 4), slice(3, 8)]),  # across both ranks' shards
        ("plain", [slice(2, 3), slice(0, 5)]),
        ("plain", [slice(-2, None), slice(9, 100)]),  # bounds as in Python
        ("plain", [slice(3, 3), slice(None)]),
        ("vector", [slice(3, 5)]),
        (STACKED, [slice(1, 3), slice(2, 4), slice(None)]),
    ],
)
def test_any_slice(folder, key, index):
    found = SliceReader(folder).read(key, index)
    expected = global_tensors()[key][tuple(index)]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("key", [STACKED, PER_LAYER])
def test_layers_of_both_styles(folder, key):
    reader = SliceReader(folder)
    for layer in range(NUM_LAYERS):
        assert torch.equal(reader.read_layer(key, layer), global_tensors()[key][layer])


def test_layers_are_stacked_in_shapes_of_either_style(folder):
    whole = {key: tuple(tensor.shape) for key, tensor in global_tensors().items()}
    assert SliceReader(folder).global_shapes == whole


@pytest.mark.parametrize(
    ("layer", "size", "found"),
    [(0, (6, 5), "[6, 5]"), (2, (6, 5), "[6, 5]"), (1, None, "not there")],
)
def test_layers_of_different_shapes_are_refused(folder, layer, size, found):
    """Regression: the last layer's shape, and their number, stood for all layers."""
    reader = SliceReader(folder)
    key = PER_LAYER.replace("layers.", f"layers.{layer}.")
    del reader.shapes[key]
    if size is not None:
        reader.shapes[key] = (size, torch.float32)
    with pytest.raises(UserError) as error:
        _ = reader.global_shapes
    assert error.value.code == CHECKPOINT
    assert f"{key} is {found}, in other layers it is [6, 4]" in str(error.value)


def test_memory_is_reused_where_it_fits(folder):
    reader = SliceReader(folder)
    first = reader.read_layer(STACKED, 0)
    second = reader.read_layer(STACKED, 2, first)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, global_tensors()[STACKED][2])
    other = reader.read_layer(STACKED, 1, torch.empty(4, 6))  # another dtype
    assert torch.equal(other, global_tensors()[STACKED][1])


def test_only_the_chunks_that_overlap_are_read(copy):
    for path in copy.glob("__1_*"):
        path.unlink()
    reader = SliceReader(copy)
    assert reader.read("plain", [slice(None), slice(0, 5)]).shape == (6, 5)
    with pytest.raises(UserError, match=r"__1_0\.distcp cannot be read: it is missing") as error:
        reader.read("plain", [slice(None), slice(0, 6)])
    assert error.value.code == CHECKPOINT


@pytest.mark.parametrize("length", [0, 100, 0.5])
def test_a_truncated_shard_is_named(copy, length):
    path = copy / "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content)) if 0 < length < 1 else length])
    reader = SliceReader(copy)
    with pytest.raises(UserError, match=r"__0_0\.distcp cannot be read"):
        read_everything(reader)


def read_everything(reader):
    for key, (shape, _) in reader.shapes.items():
        reader.read(key, [slice(None)] * len(shape))


@pytest.mark.parametrize("content", [None, b"", b"garbage", pickle.dumps({"a": 1})])
def test_damaged_metadata_are_named(copy, content):
    (copy / ".metadata").unlink()
    if content is not None:
        (copy / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata cannot be read"):
        SliceReader(copy)


def test_metadata_without_data_for_a_part_are_refused(copy):
    metadata = safe_load.load_metadata((copy / ".metadata").open("rb"))
    metadata.state_dict_metadata["plain"].chunks.pop()
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="no data for part of plain"):
        SliceReader(copy).read("plain", [slice(None), slice(None)])


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_metadata_that_bring_code_are_refused(copy):
    (copy / ".metadata").write_bytes(pickle.dumps(Bomb(copy / "boom")))
    with pytest.raises(UserError, match=r"asks for .*io\.open, which is refused"):
        SliceReader(copy)
    assert not (copy / "boom").exists()


def load_through_core(folder):
    """Return both ranks' objects as megatron-core loads them."""
    safe_load.install()
    state = {f"rng{i}": ShardedObject("rng_state", None, (2,), (i,)) for i in range(2)}
    loaded = dist_checkpointing.load(state, folder)
    return [loaded["rng0"], loaded["rng1"]]


def save_and_load_bomb(folder, boom):
    safe_load.install()
    state = {"rng_state": ShardedObject("rng_state", Bomb(boom), (1,), (0,)), "args": Namespace()}
    writer.save(folder, "release", state, files={})
    state = {"rng_state": ShardedObject("rng_state", None, (1,), (0,))}
    try:
        dist_checkpointing.load(state, f"{folder}/release")
    except BaseException as error:  # torch's CheckpointException is no Exception
        return repr(error)


def test_objects_load_through_core_as_plain_data_only(folder, tmp_path):
    assert run_ranks(1, load_through_core, str(folder))[0] == [{"seed": 7}] * 2
    boom = tmp_path / "boom"
    error = run_ranks(1, save_and_load_bomb, str(tmp_path), str(boom))[0]
    assert "open, which is refused" in error
    assert not boom.exists()


def test_a_bomb_would_go_off_without_the_guard(tmp_path):
    content = pickle.dumps(Bomb(tmp_path / "boom"))
    pickle.load(io.BytesIO(content)).close()
    assert (tmp_path / "boom").exists()
