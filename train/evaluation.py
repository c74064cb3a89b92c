"""Evaluates a model that a run left behind, or a released one, in an engine of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from train.backends import build_engine
from train.checkpoint import copy_weights
from train.compose import readable_errors
from train.config import RunConfig
from train.data import build_encoder, load_tables
from train.engine import Engine, start_engine
from train.held_out import HeldOut
from train.model.omni import meta_model
from train.request import ModelRequest
from train.source import open_weights


def evaluate(request: ModelRequest, out: Path, *, as_json: bool = False) -> dict[str, Any]:
    """Returns the evaluation of a model, printed and written to `out` by the main rank.

    Raises:
        ValueError: the model has no weights yet, or nothing is held out.
    """
    config = request.config
    reader, step = open_weights(request)
    accelerator = start_engine(config)
    with readable_errors(every_rank=True):
        model = meta_model(config.model, config.media)
        model.set_tuned(config.tuned)
        engine = build_engine(config, accelerator, model)
        copy_weights(engine, reader)
        found = {**_named(request), "step": step, **_measure(config, engine, out, step, as_json)}
        if engine.is_main:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"step-{step:08d}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
            print(json.dumps(found, ensure_ascii=False) if as_json else f"Answers and result are in {out}.")
        engine.close()
    return found


def _named(request: ModelRequest) -> dict[str, str]:
    word, _, folder = request.name.partition("=")
    return {word: folder}


def _measure(config: RunConfig, engine: Engine, out: Path, step: int, as_json: bool) -> dict[str, Any]:
    encoder = build_encoder(config)
    tables = load_tables(config, engine, encoder, "held_out")
    stream = sys.stderr if as_json else sys.stdout
    found = HeldOut(config, engine, tables, tables, encoder, out, stream)(step)
    if found is None:
        raise ValueError(f"data.holdout={config.data.holdout}: no sample is held out. Raise it.")
    return found
