"""Unpickling of checkpoints: they may ask for plain data alone, unless the user trusts them.

``safe_load`` reads with torch, ``quick_read`` without; both keep to this.
"""

# module: names. torch's dtypes and layouts are allowed on top of these.
ALLOWED = {
    "builtins": {"dict", "list", "set", "slice", "tuple"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
# Where megatron-core keeps what is not sharded: a file up to 0.18, from 0.19 on an object.
COMMON, COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
HINT = "--trust-checkpoint reads it all the same, and runs the code that it asks for"

_is_trusted = False


def trust(yes: bool = True) -> None:
    """Unpickle whatever checkpoints hold from now on, in this process."""
    global _is_trusted
    _is_trusted = yes


def is_trusted() -> bool:
    """Whether ``trust`` was called."""
    return _is_trusted
