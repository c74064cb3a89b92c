"""What a folder of safetensors holds, read from its headers alone. Never imports torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The tensors of a folder: shapes, and the file that each lies in, by name."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, str]

    @property
    def paths(self) -> list[Path]:
        """Every file, by name."""
        return [self.folder / name for name in sorted(set(self.files.values()))]


def read_tensor_files(folder: Path, where: str) -> TensorFiles:
    """Returns what a folder holds in `model.safetensors`, or in the shards that its index names.

    Args:
        where: opens every error, such as `model.weights=released`.

    Raises:
        ValueError: there is nothing to read, a file is missing, or one is damaged or cut short.
    """
    if not folder.is_dir():
        raise ValueError(f"{where}: there is no such folder. Name a folder that holds {SINGLE} or {INDEX}.")
    listed = _listed(folder, where)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, str] = {}
    for file in sorted(set(listed.values())) or [SINGLE]:
        found = read_header(folder / file, where)
        shapes |= found
        files |= dict.fromkeys(found, file)
    lost = [name for name, file in listed.items() if files.get(name) != file]
    if lost:
        raise ValueError(
            f"{where}: {INDEX} says that {listed[lost[0]]} holds {lost[0]}, but it does not. {_AGAIN}"
        )
    return TensorFiles(folder, shapes, files)


_AGAIN = "Copy the folder again."


def _listed(folder: Path, where: str) -> dict[str, str]:
    """Returns the file of every tensor as the index has it; nothing where there is one file alone."""
    index = folder / INDEX
    if index.is_file():
        try:
            return json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: {INDEX} is damaged ({error}). {_AGAIN}") from error
    if (folder / SINGLE).is_file():
        return {}
    pickled = [path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in sorted(folder.glob(pattern))]
    if pickled:
        raise ValueError(
            f"{where}: holds {pickled[0]} and no safetensors. A pickle can run any code, so it is not read: "
            "save it again with transformers' save_pretrained."
        )
    raise ValueError(f"{where}: holds neither {SINGLE} nor {INDEX}. Name a folder that does.")


def read_header(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a file's tensors, after checking that all of their bytes are there."""
    if not path.is_file():
        raise ValueError(f"{where}: {path.name} is missing, though {INDEX} names it. {_AGAIN}")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, LONGEST_HEADER):
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{where}: {path.name} is damaged or cut short ({error}). {_AGAIN}") from error
    if end != size:
        raise ValueError(f"{where}: {path.name} has {size} bytes, but its header promises {end}. {_AGAIN}")
    return shapes
