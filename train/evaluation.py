"""Evaluates the weights that a run left behind, in an engine of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from train.checkpoint import PieceReader, copy_weights, newest_checkpoint
from train.compose import readable_errors
from train.config import RunConfig
from train.data import build_encoder, load_tables
from train.engine import Engine, build_engine, start_engine
from train.folder import RunFolder
from train.held_out import HeldOut
from train.model.omni import meta_model
from train.weights import WeightReader


def evaluate(config: RunConfig, out: Path, *, as_json: bool = False) -> dict[str, Any]:
    """Returns the evaluation of the run in `config.run`, printed and written to `out` by the main rank.

    Raises:
        ValueError: the run has no weights yet, or nothing is held out.
    """
    reader, step = open_weights(RunFolder(config))
    accelerator = start_engine(config)
    with readable_errors(every_rank=True):
        model = meta_model(config.model, config.media)
        model.set_tuned(config.tuned)
        engine = build_engine(config, accelerator, model)
        copy_weights(engine, reader)
        found = {"run": config.run, "step": step, **_measure(config, engine, out, step, as_json)}
        if engine.is_main:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"step-{step:08d}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
            print(json.dumps(found, ensure_ascii=False) if as_json else f"Answers and result are in {out}.")
        engine.close()
    return found


def open_weights(folder: RunFolder) -> tuple[WeightReader | PieceReader, int]:
    """Returns the weights of a finished stage, else of the newest checkpoint, and their step.

    Raises:
        ValueError: there are none.
    """
    if folder.is_complete:
        return WeightReader(folder.final), json.loads(folder.stage_file.read_text())["steps"]
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        raise ValueError(f"run={folder.path}: has no weights yet. Wait for its first checkpoint.")
    reader = PieceReader(newest)
    return reader, reader.manifest["step"]


def _measure(config: RunConfig, engine: Engine, out: Path, step: int, as_json: bool) -> dict[str, Any]:
    encoder = build_encoder(config)
    tables = load_tables(config, engine, encoder, "held_out")
    stream = sys.stderr if as_json else sys.stdout
    found = HeldOut(config, engine, tables, tables, encoder, out, stream)(step)
    if found is None:
        raise ValueError(f"data.holdout={config.data.holdout}: no sample is held out. Raise it.")
    return found
