"""Checkpoints that any number of ranks and any ZeRO stage can load.

A checkpoint is a folder `step-00000100` with one safetensors file per rank. Every tensor in it is a
flat fp32 (or frozen bf16) piece of one parameter, named `<kind>/<parameter>/<start>`, with kind
`weight`, `exp_avg` or `exp_avg_sq`: each rank writes what it holds, and a reader puts any range of
any parameter together again. `state.json` holds the planner, ledger and counters as plain JSON;
`manifest.json`, written last, lists every file with its size. The folder is written beside its
final name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from train.engine import Engine
from train.fragments import MOMENTS, Fragment
from train.weights import save_tensors, sync

VERSION = 1
MANIFEST = "manifest.json"


def save_checkpoint(engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-...` from all ranks and returns its path; older ones beyond `keep` go.

    Raises:
        RuntimeError: a rank could not write. Nothing half-written stays, older checkpoints do.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-step-{step:08d}"
    failed = ""
    if engine.is_main:
        try:
            for stale in folder.glob(".partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            failed = _explain(error)
    engine.barrier()
    name = f"rank-{engine.rank:05d}.safetensors"
    shapes: dict[str, tuple[int, ...]] = {}
    if not failed:
        try:
            shapes = _write_rank_file(engine, partial / name)
        except OSError as error:
            failed = _explain(error)
    reports = engine.gather_objects((name, failed, shapes))
    if engine.is_main and not any(report[1] for report in reports):
        failed = _complete(engine, partial, final, step, state, reports)
    failures = [text for text in engine.gather_objects(failed) if text]
    if failures:
        if engine.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(
            f"{final}: the checkpoint could not be written: {failures[0]}. "
            "Free some space or mend the folder, then start the run again: it goes on from the last one."
        )
    if engine.is_main:
        _prune(folder, keep)
    return final


def _explain(error: OSError) -> str:
    return f"{error.strerror or error} ({error.filename or 'no file'})"


def _write_rank_file(engine: Engine, path: Path) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    num_replicated = 0
    for fragment in _all_fragments(engine):
        shapes[fragment.name] = fragment.shape
        if fragment.replicated:  # every rank counts the same ones, so each is written once
            num_replicated += 1
            if num_replicated % engine.world_size != engine.rank:
                continue
        for kind, tensor in fragment.tensors.items():
            tensors[f"{kind}/{fragment.name}/{fragment.start}"] = tensor.detach().cpu().contiguous()
    tensors["rng/cpu/0"] = torch.get_rng_state()
    if engine.device.type == "cuda":
        tensors["rng/cuda/0"] = torch.cuda.get_rng_state(engine.device)
    save_tensors(tensors, path)
    return shapes


def _all_fragments(engine: Engine) -> Iterator[Fragment]:
    yield from engine.trained_fragments()
    yield from engine.frozen_fragments()


def _complete(engine: Engine, partial: Path, final: Path, step: int, state: dict, reports: list) -> str:
    shapes: dict[str, tuple[int, ...]] = {}
    for report in reports:
        shapes.update(report[2])
    try:
        (partial / "state.json").write_text(json.dumps(state))
        sync(partial / "state.json")
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        manifest = {
            "version": VERSION,
            "step": step,
            "world_size": engine.world_size,
            "zero": engine.config.zero.value,
            "optimizer_steps": engine.optimizer_steps(),
            "files": files,
            "shapes": shapes,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest))
        sync(partial / MANIFEST)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(final.parent)
    except OSError as error:
        return _explain(error)
    return ""


def _prune(folder: Path, keep: int) -> None:
    for old in _complete_folders(folder)[keep:]:
        doomed = old.with_name(f".partial-{old.name}")  # a name that no one takes for complete
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _complete_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name)]
    return sorted((path for path in found if (path / MANIFEST).is_file()), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in `folder`, or None."""
    complete = _complete_folders(folder)
    return complete[0] if complete else None


class PieceReader:
    """Reads any range of any parameter from the rank files of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / MANIFEST).read_text())
        if self.manifest["version"] != VERSION:
            raise ValueError(
                f"{folder}: checkpoint version {self.manifest['version']}, this program reads {VERSION}. "
                "Resume it with the program that wrote it."
            )
        self._check_sizes()
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        self.shapes = {name: tuple(shape) for name, shape in self.manifest["shapes"].items()}
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            handle = safe_open(str(path), framework="pt")
            for key in handle.keys():  # noqa: SIM118 - a handle is no dict
                kind, name, start = key.split("/")
                self._pieces.setdefault((kind, name), []).append((int(start), handle, key))

    def _check_sizes(self) -> None:
        for name, size in self.manifest["files"].items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                is_now = "missing" if found is None else f"{found} bytes long"
                raise ValueError(
                    f"{path}: {is_now}, but {size} bytes were written. "
                    f"Remove {self.folder} to go on from the checkpoint before it."
                )

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
        path = self.folder / f"rank-{rank:05d}.safetensors"
        if not path.is_file():
            return None
        with safe_open(str(path), framework="pt") as handle:
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
    fragments = list(_all_fragments(engine))
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
