"""Saves checkpoints: the step waits for a copy in host memory, and a thread writes that to the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.config import CheckpointConfig
from train.engine import Engine
from train.folder import naming
from train.manifest import PARTIAL, FileFacts, checkpoints_in, file_facts, step_of, write_manifest
from train.weights import save_tensors, sync

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class _Written:
    """What a rank wrote, or why it could not."""

    files: FileFacts
    failed: str = ""


@dataclass(slots=True)
class _Pending:
    """A checkpoint whose files are being written. `facts` are for its manifest; `shapes` this rank's."""

    final: Path
    partial: Path
    facts: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    job: Future[_Written]


class Saver:
    """Saves from all ranks alike. A checkpoint counts when `complete` or `finish` has returned.

    Args:
        folder: holds the checkpoints.
        config: how many to keep, and whether to write in the background.
    """

    def __init__(self, engine: Engine, folder: Path, config: CheckpointConfig) -> None:
        self._engine = engine
        self._folder = folder
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a save lies on the disk, or could not be written."""
        return self._pending is not None and self._pending.job.done()

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Begins to save and returns the path that the checkpoint will have.

        Args:
            step: the last finished one.
            state: what a run needs beside weights and moments, as JSON values.

        Raises:
            RuntimeError: this one or the one before could not be written.
        """
        self.finish()
        engine, background = self._engine, self._config.background
        tensors, shapes = snapshot(engine, copied=background)
        facts = {
            "step": step,
            "world_size": engine.world_size,
            "zero": engine.config.zero.value,
            "optimizer_steps": engine.optimizer_steps(),
        }
        text = json.dumps(state) if engine.is_main else None
        final, partial = (self._folder / f"{begin}step-{step:08d}" for begin in ("", PARTIAL))
        job = self._thread.submit(_write, partial, engine.rank, tensors, text)
        self._pending = _Pending(final, partial, facts, shapes, job)
        if not background:
            self.finish()
        return final

    def finish(self) -> None:
        """Waits for a save that is under way, on all ranks, and completes it.

        Raises:
            RuntimeError: a rank could not write.
        """
        if self._pending is not None:
            self._engine.sign("writing a checkpoint")
            self._pending.job.result()
            self.complete()

    def complete(self) -> None:
        """Completes a save whose files every rank has written; older ones beyond those to keep go.

        Raises:
            RuntimeError: a rank could not write. Nothing half-written stays, older checkpoints do.
        """
        pending, self._pending = self._pending, None
        assert pending is not None
        engine = self._engine
        reports = engine.gather_objects((pending.job.result(), pending.shapes))
        failures = [written.failed for written, _ in reports if written.failed]
        if engine.is_main and not failures:
            failures = self._name_complete(pending, reports)
        failures = engine.gather_objects(failures)[0]
        if failures:
            if engine.is_main:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise RuntimeError(
                f"{pending.final}: the checkpoint could not be written: {failures[0]}. "
                "Free some space or mend the folder, then start the run again: it goes on from the last one."
            )

    def _name_complete(self, pending: _Pending, reports: list) -> list[str]:
        """Writes the manifest and gives a checkpoint its final name; returns what failed."""
        files: FileFacts = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for written, mine in reports:
            files |= written.files
            shapes |= mine
        try:
            write_manifest(pending.partial, pending.facts | {"shapes": shapes}, files)
            if pending.final.exists():  # the run went back behind it
                self._remove(pending.final)
            os.replace(pending.partial, pending.final)
            sync(pending.final.parent)
        except OSError as error:
            return [_explain(error)]
        self._remove_all(self._not_kept())
        return []

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of steps after `step`, from which a run went back: their weights failed."""
        if self._engine.is_main:
            self._remove_all(path for path in checkpoints_in(self._folder) if step_of(path) > step)

    def _remove_all(self, checkpoints: Iterable[Path]) -> None:
        """Removes what it can. The run goes on without the rest of the space."""
        for old in checkpoints:
            try:
                self._remove(old)
            except OSError as error:
                print(f"{old}: could not be removed: {_explain(error)}. Remove it by hand.", flush=True)

    def _not_kept(self) -> list[Path]:
        every = self._config.keep_every
        older = checkpoints_in(self._folder)[self._config.keep :]
        return [path for path in older if every is None or step_of(path) % every]

    def _remove(self, checkpoint: Path) -> None:
        """Takes a checkpoint's name away at once, and its files when the thread comes to it."""
        doomed = checkpoint.with_name(f"{PARTIAL}old-{checkpoint.name}")
        os.replace(checkpoint, doomed)
        self._thread.submit(shutil.rmtree, doomed, ignore_errors=True)

    def close(self) -> None:
        """Waits until the thread has nothing left to do."""
        self._thread.shutdown()


def snapshot(engine: Engine, *, copied: bool) -> tuple[Tensors, dict[str, tuple[int, ...]]]:
    """Returns what this rank has to write, in host memory, and the shapes of the parameters it holds.

    Args:
        copied: whether training may go on while it is written. Else it is only valid until the next
            update, where the weights are in host memory themselves.
    """
    tensors: Tensors = {}
    shapes: dict[str, tuple[int, ...]] = {}
    num_replicated = 0
    for trains, fragments in ((True, engine.trained_fragments()), (False, engine.frozen_fragments())):
        for fragment in fragments:
            shapes[fragment.name] = fragment.shape
            if fragment.replicated:  # every rank counts the same ones, so each is written once
                num_replicated += 1
                if num_replicated % engine.world_size != engine.rank:
                    continue
            for kind, tensor in fragment.tensors.items():
                on_host = tensor.detach().cpu().contiguous()
                is_shared = on_host.data_ptr() == tensor.data_ptr()
                name = f"{kind}/{fragment.name}/{fragment.start}"
                tensors[name] = on_host.clone() if copied and trains and is_shared else on_host
    tensors["rng/cpu/0"] = torch.get_rng_state()
    if engine.device.type == "cuda":
        tensors["rng/cuda/0"] = torch.cuda.get_rng_state(engine.device)
    return tensors, shapes


def _write(partial: Path, rank: int, tensors: Tensors, state: str | None) -> _Written:
    name = f"rank-{rank:05d}.safetensors"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, partial / name)
        files = {name: file_facts(partial / name)}
        if state is not None:
            with naming(partial / "state.json"):
                (partial / "state.json").write_text(state)
                sync(partial / "state.json")
            files["state.json"] = file_facts(partial / "state.json")
    except OSError as error:
        return _Written({}, _explain(error))
    return _Written(files)


def _explain(error: OSError) -> str:
    return f"{error.strerror or error} ({error.filename or 'no file'})"
