"""Whole weights in standard files: what a finished stage leaves in `final/` and the next one reads."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from train.first_weights import PATCH_POSITIONS, FirstWeights
from train.model.initial import RandomWeights
from train.model.shapes import ADAPTER, DOWN, UP
from train.stored import Stored
from train.tensor_files import INDEX, read_tensor_files

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
        found = re.search(r"os error (\d+)", str(error))  # as Rust prints an OSError
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error
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
    names: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> str:
    """Writes whole weights as sharded safetensors with an index, and returns their digest.

    Holds one shard in memory at a time. `reader` is a `train.checkpoint.PieceReader` or a
    `WeightReader`; its `names` (all) are written, but for those that begin with one of `leave_out`.
    Without `dtype` they are stored as they are, and counted as fp32 when the shards are planned.
    """
    chosen = reader.names() if names is None else sorted(names)
    shapes = {name: reader.shapes[name] for name in chosen if not name.startswith(leave_out)}
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
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class WeightReader:
    """Reads ranges of whole weights from a folder, with the interface of `train.checkpoint.PieceReader`.

    One file is open at a time, since what was read of a mapped file counts as memory in use. Read
    in the order of `place`, every file is opened once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = read_tensor_files(folder, str(folder))
        self.shapes = found.shapes
        self._files = found.files
        self._open: tuple[str, Any] = ("", None)

    def names(self) -> list[str]:
        """Returns every weight's name."""
        return sorted(self.shapes)

    def place(self, name: str) -> str:
        """Returns the file of a weight."""
        return self._files.get(name, "")

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a flattened weight."""
        assert kind == "weight"
        tensor = self._handle(self._files[name]).get_slice(name)
        shape = self.shapes[name]
        if len(shape) < 2:
            return tensor[start:stop]
        row = math.prod(shape[1:])
        first, last = start // row, -(-min(stop, shape[0] * row) // row)
        return tensor[first:last].reshape(-1)[start - first * row : stop - first * row]

    def _handle(self, file: str):
        if self._open[0] != file:
            self._open = ("", None)  # closes the one before
            self._open = (file, safe_open(str(self.folder / file), framework="pt"))
        return self._open[1]


class StoredReader:
    """Reads weights from wherever they lie, with the products of adapters added, fp32 then.

    It has the interface of `train.checkpoint.PieceReader`.
    """

    def __init__(self, stored: Mapping[str, Stored], folder: Path | str) -> None:
        self.folder = folder
        self.shapes = {name: entry.shape for name, entry in stored.items()}
        self._stored = stored
        self._readers = {
            folder: WeightReader(folder) for folder in {entry.folder for entry in stored.values()}
        }

    def names(self) -> list[str]:
        """Returns every weight's name."""
        return sorted(self.shapes)

    def place(self, name: str) -> str:
        """Returns the file that a weight is read from; nothing for one that is stored nowhere."""
        stored = self._stored.get(name)
        return f"{stored.folder}/{stored.file}" if stored else ""

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a flattened weight."""
        stored = self._stored[name]
        piece = self._readers[stored.folder].read(kind, stored.name, start, stop)
        for product in stored.added:
            with safe_open(product.file, framework="pt") as file:
                up, down = file.get_slice(product.up), file.get_tensor(product.down)
                piece = add_product(piece, start, product.scale, up, down)
        return piece


def add_product(piece: torch.Tensor, start: int, scale: float, up, down: torch.Tensor) -> torch.Tensor:
    """Returns elements of a flattened weight, from `start` on, plus those of scale * up @ down, fp32.

    Only the rows that they lie in are computed.

    Shapes: piece [n], up [outputs, rank] (a tensor, or a slice of a file), down [rank, inputs].
    """
    row = down.shape[1]
    first, last = start // row, -(-(start + len(piece)) // row)
    product = (up[first:last].float() @ down.float()).reshape(-1)
    return piece.float() + scale * product[start - first * row :][: len(piece)]


class MergedReader:
    """Reads weights beside which adapters lie as the model that both make: W + scale * up @ down, fp32."""

    def __init__(self, reader, scale: float) -> None:
        self.folder = reader.folder
        self.shapes = {name: shape for name, shape in reader.shapes.items() if ADAPTER not in name}
        self.place = reader.place
        self._reader = reader
        self._scale = scale

    def names(self) -> list[str]:
        """Returns every weight's name."""
        return sorted(self.shapes)

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a flattened weight."""
        piece = self._reader.read(kind, name, start, stop)
        layer = name.removesuffix(".weight")
        if layer + UP not in self._reader.shapes:
            return piece
        up, down = (self._whole(kind, layer + end) for end in (UP, DOWN))
        return add_product(piece, start, self._scale, up, down)

    def _whole(self, kind: str, name: str) -> torch.Tensor:
        shape = self._reader.shapes[name]
        return self._reader.read(kind, name, 0, math.prod(shape)).reshape(shape)


class FirstWeightsReader:
    """Reads the first weights of a stage: stored ones, changed where their shape asks for it, and drawn ones.

    Args:
        first: where every weight comes from.
        drawn: makes those that are stored nowhere.
    """

    def __init__(self, first: FirstWeights, drawn: RandomWeights) -> None:
        self.first = first
        self.folder = first.title
        self.shapes = drawn.shapes
        self._drawn = drawn
        self._stored = StoredReader(first.stored, first.title)
        self.place = self._stored.place

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a flattened weight."""
        then = self._stored.shapes.get(name)
        if then is None:
            return self._drawn.read(kind, name, start, stop)
        if then == self.shapes[name]:
            return self._stored.read(kind, name, start, stop)
        whole = self._stored.read(kind, name, 0, math.prod(then)).reshape(then)
        change = interpolate_positions if name == PATCH_POSITIONS else grow_rows
        return change(whole, self.shapes[name][0]).reshape(-1)[start:stop]


def grow_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns a table with rows added below, each the mean of those that were there."""
    mean = table.mean(0, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def interpolate_positions(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns a square table of positions resized to `rows` = side^2 rows, bicubic, fp32."""
    then, now = math.isqrt(len(table)), math.isqrt(rows)
    grid = table.float().reshape(1, then, then, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(now, now), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(rows, -1)
