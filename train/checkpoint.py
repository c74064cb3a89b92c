"""Checkpoints that any number of ranks and any ZeRO stage can load.

A checkpoint is a folder `step-00000100` with one safetensors file per rank. Every tensor in it is a
flat fp32 (or frozen bf16) piece of one parameter, named `<kind>/<parameter>/<start>`, with kind
`weight`, `exp_avg` or `exp_avg_sq`: each rank writes what it holds, and a reader puts any range of
any parameter together again. `state.json` holds the planner, ledger and counters as plain JSON, and
train/manifest.py says what makes the folder whole. train/saver.py writes it; this reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from train.engine import Engine
from train.fragments import MOMENTS
from train.manifest import (
    DamagedError,
    check_checkpoint,
    damaged_folders,
    newest_checkpoint,
    read_manifest,
    set_aside,
)


def open_newest(engine: Engine, folder: Path, before: int | None = None) -> PieceReader | None:
    """Returns a reader of the newest whole checkpoint, or of the newest from before a step; None without any.

    The ranks share the files among them for checking. A damaged checkpoint is set aside with its
    reason, and the one before it is tried.

    Raises:
        ValueError: there are checkpoints, but none is whole; or another version wrote them.
        OSError: a file could not be read, which need not be damage. On all ranks alike.
    """
    while newest := engine.gather_objects(newest_checkpoint(folder, before))[0]:
        faults = [fault for fault in engine.gather_objects(_fault(engine, newest)) if fault]
        if unread := [fault for fault in faults if isinstance(fault, OSError)]:
            raise unread[0]
        if not faults:
            return PieceReader(newest)
        if engine.is_main:
            aside = set_aside(newest)
            print(f"{faults[0]}. The checkpoint is damaged: it is set aside as {aside}.", flush=True)
        engine.barrier()
    if before is None and (damaged := damaged_folders(folder)):
        raise ValueError(
            f"{folder}: no whole checkpoint is left; {', '.join(path.name for path in damaged)} cannot be "
            "used. Put a whole one back, or remove the damaged ones to start from the first step."
        )
    return None


def _fault(engine: Engine, checkpoint: Path) -> DamagedError | OSError | None:
    try:
        check_checkpoint(checkpoint, engine.rank, engine.world_size)
    except (DamagedError, OSError) as error:
        return error
    return None


class PieceReader:
    """Reads any range of any parameter from the rank files of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        self.shapes = {name: tuple(shape) for name, shape in self.manifest["shapes"].items()}
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for file in sorted(name for name in self.manifest["files"] if name.startswith("rank-")):
            handle = safe_open(str(folder / file), framework="pt")
            for key in handle.keys():  # noqa: SIM118 - a handle is no dict
                kind, name, start = key.split("/")
                self._pieces.setdefault((kind, name), []).append((int(start), handle, key))

    def names(self) -> list[str]:
        """Returns every parameter's name."""
        return sorted(self.shapes)

    def place(self, name: str) -> str:
        """Returns nothing: a range may lie in the files of several ranks, which all stay open."""
        return ""

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns elements [start, stop) of a flattened tensor, whichever ranks wrote them.

        Raises:
            ValueError: a part of the range is in no file.
        """
        parts = []
        place = start
        for begin, handle, key in sorted(self._pieces.get((kind, name), []), key=lambda piece: piece[0]):
            view = handle.get_slice(key)
            end = begin + view.get_shape()[0]
            if begin <= place < end and place < stop:
                parts.append(view[place - begin : min(stop, end) - begin])
                place = min(stop, end)
        if place < stop:
            raise ValueError(f"{self.folder}: {kind} of {name} ends before {stop}. Use another one.")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def has_moments(self) -> bool:
        """Returns whether the optimizer had made a step."""
        return any(kind == "exp_avg" for kind, _ in self._pieces)

    def rng_state(self, kind: str, rank: int) -> torch.Tensor | None:
        """Returns the random state that a rank wrote, if it did."""
        file = f"rank-{rank:05d}.safetensors"
        if file not in self.manifest["files"]:
            return None
        with safe_open(str(self.folder / file), framework="pt") as handle:
            key = f"rng/{kind}/0"
            return handle.get_tensor(key) if key in handle.keys() else None  # noqa: SIM118


def restore_checkpoint(engine: Engine, reader: PieceReader) -> None:
    """Loads weights, moments and random state into an engine of any world size and ZeRO stage."""
    engine.start_moments(reader.manifest["optimizer_steps"])
    copy_weights(engine, reader)
    if reader.has_moments():
        for fragment in engine.trained_fragments():
            for kind in MOMENTS:
                piece = reader.read(kind, fragment.name, fragment.start, fragment.stop)
                fragment.tensors[kind].copy_(piece)
    state = reader.rng_state("cpu", engine.rank)
    if state is not None:
        torch.set_rng_state(state)
    state = reader.rng_state("cuda", engine.rank) if engine.device.type == "cuda" else None
    if state is not None:
        torch.cuda.set_rng_state(state, engine.device)


@torch.no_grad()
def copy_weights(engine: Engine, reader) -> None:
    """Copies weights from a reader, file by file, into an engine whose weights have no values yet.

    Raises:
        ValueError: names or shapes differ.
    """
    fragments = [*engine.trained_fragments(), *engine.frozen_fragments()]
    for fragment in fragments:
        if fragment.name not in reader.shapes:
            raise ValueError(f"{reader.folder}: has no weight {fragment.name}. Use a run of the same model.")
        if tuple(reader.shapes[fragment.name]) != fragment.shape:
            raise ValueError(
                f"{reader.folder}: {fragment.name} has shape {list(reader.shapes[fragment.name])}, the model "
                f"has {list(fragment.shape)}. Use a run of the same model."
            )
    for fragment in sorted(fragments, key=lambda fragment: reader.place(fragment.name)):
        piece = reader.read("weight", fragment.name, fragment.start, fragment.stop)
        fragment.tensors["weight"].copy_(piece.reshape(fragment.tensors["weight"].shape))
    engine.publish_weights()
