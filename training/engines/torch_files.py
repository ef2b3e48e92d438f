"""torch.distributed.checkpoint's files, read without running what a pickle in them may ask for.

    load(state, Path(".../step_000200/state"), alone=True)         fills the tensors and values of `state`
    keys(Path(".../step_000200/state"))                            {"model.model.norm.weight", "scaler.scale", ...}

Torch itself unpickles both the list of contents and each value that is no tensor. So each is read here first, by a
reader that knows no names but those a checkpoint of ours is made of.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int32", "int64", "bool", "uint8"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # since Python 3.13
}  # fmt: skip


class KnownNames(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module, ()):
            raise ValueError(f"it asks for {module}.{name}, which no checkpoint of ours needs and which may run code")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                KnownNames(file).load()
        except (ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is not read: {error}") from None
        return super().read_metadata(*args, **kwargs)


class Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def keys(folder: Path) -> set[str]:
    return set(Reader(folder).read_metadata().state_dict_metadata)


def load(state: dict[str, Any], folder: Path, alone: bool) -> None:
    """Fill `state` in place, by all ranks together unless `alone`. Raises ValueError for what cannot be read."""
    try:
        dcp.load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=alone)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{folder} could not be read: {type(cause).__name__}: {str(cause).splitlines()[0]}") from error
