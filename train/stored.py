"""Where stored weights lie, and what is added to them. Never imports torch.

The result of a stage with adapters (`lora`) does not hold the weights that stayed frozen. Its `base.json`
says in which files they are, so that it reads as one whole model all the same: frozen weights of the base,
whole ones of its own, and the products of its adapters on top.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train.model.shapes import DOWN, UP
from train.tensor_files import TensorFiles, read_header, read_tensor_files

BASE = "base.json"
ADAPTER_FILE = "adapter_model.safetensors"
FINGERPRINT_BLOCKS, BLOCK_BYTES = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class LowRank:
    """A product that is added to a weight: scale * `up` [outputs, rank] @ `down` [rank, inputs] of a file."""

    file: str
    down: str
    up: str
    scale: float


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a weight lies: tensor `name` of `shape` in `folder`/`file`, and what is to be added to it."""

    folder: Path
    file: str
    name: str
    shape: tuple[int, ...]
    added: tuple[LowRank, ...] = ()

    @property
    def paths(self) -> list[str]:
        """Every file that the weight is read from."""
        return [str(self.folder / self.file), *(product.file for product in self.added)]


def all_of(files: TensorFiles) -> dict[str, Stored]:
    """Returns every tensor of a folder, by its own name."""
    return {name: stored_in(files, name) for name in files.shapes}


def stored_in(files: TensorFiles, name: str) -> Stored:
    """Returns where one tensor of a folder lies."""
    return Stored(files.folder, files.files[name], name, files.shapes[name])


def read_result(final: Path, where: str) -> dict[str, Stored]:
    """Returns every weight of a finished stage, by its name in the model.

    Raises:
        ValueError: a file is missing or damaged, or the base is not the one that was trained on.
    """
    if not (final / BASE).is_file():
        return all_of(read_tensor_files(final, where))
    kept = json.loads((final / BASE).read_text())
    _check_base(kept["files"], where)
    found = {name: _from_json(entry) for name, entry in kept["weights"].items()}
    if kept["has_own"]:
        found |= all_of(read_tensor_files(final, where))
    adapters = read_header(final / ADAPTER_FILE, where)
    for down in (name for name in adapters if name.endswith(DOWN)):
        layer = down.removesuffix(DOWN)
        name = layer.removeprefix("base_model.model.") + ".weight"
        product = LowRank(str(final / ADAPTER_FILE), down, layer + UP, kept["scale"])
        found[name] = replace(found[name], added=(*found[name].added, product))
    return found


def write_base(weights: Mapping[str, Stored], scale: float, has_own: bool, final: Path) -> None:
    """Writes `base.json`: where the weights lie that a stage with adapters left as they were.

    Args:
        scale: what the products of its adapters are multiplied by.
        has_own: whether the result holds whole weights too.
    """
    files = sorted({path for stored in weights.values() for path in stored.paths})
    content = {
        "scale": scale,
        "has_own": has_own,
        "files": {path: fingerprint([Path(path)]) for path in files},
        "weights": {
            name: asdict(stored) | {"folder": str(stored.folder)} for name, stored in weights.items()
        },
    }
    (final / BASE).write_text(json.dumps(content))


def _from_json(entry: dict[str, Any]) -> Stored:
    added = tuple(LowRank(**product) for product in entry["added"])
    return Stored(Path(entry["folder"]), entry["file"], entry["name"], tuple(entry["shape"]), added)


def _check_base(files: dict[str, str], where: str) -> None:
    for path, then in files.items():
        if not Path(path).is_file():
            raise ValueError(f"{where}: its adapters were trained on {path}, and it is gone. Put it back.")
        if fingerprint([Path(path)]) != then:
            raise ValueError(
                f"{where}: its adapters were trained on {path}, which has changed since. "
                "Put it back as it was."
            )


def fingerprint(paths: Iterable[Path]) -> str:
    """Returns what tells files of weights from others: sizes and evenly spread blocks of every file.

    Reading all bytes of a large model would cost ten seconds at every start.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(FINGERPRINT_BLOCKS):
                file.seek(block * max(0, size - BLOCK_BYTES) // (FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
