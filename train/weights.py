"""Whole weights in standard files: what a finished stage leaves in `final/` and the next one reads."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9

Shapes = Mapping[str, tuple[int, ...]]


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file that is on the disk when this returns.

    Raises:
        OSError: the file system refused, a full disk for example.
    """
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Report = Callable[[str, int, int], None]
"""Is told of every file: its name, the bytes written so far, and those of all files."""


def write_weights(
    reader,
    folder: Path,
    leave_out: tuple[str, ...] = (),
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> str:
    """Writes whole weights as sharded safetensors with an index, and returns their digest.

    Holds one shard in memory at a time. `reader` is a `train.checkpoint.PieceReader` or a
    `WeightReader`; weights whose names begin with one of `leave_out` are not written. Without `dtype`
    they are stored as they are, and counted as fp32 when the shards are planned.
    """
    shapes = {name: reader.shapes[name] for name in reader.names() if not name.startswith(leave_out)}
    itemsize = (dtype or torch.float32).itemsize
    shards = plan_shards(shapes, itemsize, shard_bytes)
    index = weight_index(shards, shapes, itemsize)
    total = written = 0
    for file, names in shards.items():
        tensors = {name: _whole(reader, name, dtype) for name in names}
        save_tensors(tensors, folder / file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        written += sum(itemsize * math.prod(shapes[name]) for name in names)
        if report:
            report(file, written, index["metadata"]["total_size"])
    index["metadata"]["total_size"] = total
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    sync(folder / INDEX)
    return weights_digest(folder)


def plan_shards(shapes: Shapes, itemsize: int, shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Returns the names of each file's tensors, a file having at most `shard_bytes` or one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        wanted = itemsize * math.prod(shape)
        if shards[-1] and size + wanted > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += wanted
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def weight_index(shards: dict[str, list[str]], shapes: Shapes, itemsize: int) -> dict[str, Any]:
    """Returns the index of planned files: where each tensor is, and how many bytes all have."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(itemsize * math.prod(shape) for shape in shapes.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _whole(reader, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    shape = reader.shapes[name]
    whole = reader.read("weight", name, 0, math.prod(shape)).reshape(shape)
    return whole if dtype is None else whole.to(dtype)


def weights_digest(folder: Path) -> str:
    """Returns a digest over the bytes of every weight file of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("model-*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise ValueError(
        f"{folder}: has neither {INDEX} nor {SINGLE}. Name a folder of whole weights, or a run whose stage "
        "is complete."
    )


def _open(path: Path):
    if not path.is_file():
        raise ValueError(f"{path}: is missing, but {INDEX} names it. Copy the whole folder again.")
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged or cut off ({error}). Copy it again.") from error


class WeightReader:
    """Reads ranges of whole weights, with the interface of `train.checkpoint.PieceReader`.

    The folder holds an index and the files it names, or one model.safetensors.

    Raises:
        ValueError: it holds neither, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        handles = {file: _open(folder / file) for file in _files(folder)}
        self._handles = {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118
        self.shapes = {
            name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()
        }

    def names(self) -> list[str]:
        """Returns every parameter's name."""
        return sorted(self.shapes)

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a flattened weight."""
        assert kind == "weight"
        return self._handles[name].get_tensor(name).reshape(-1)[start:stop]
