"""Wires one stage together: folder, data, model, engine, checkpoint, loop, result."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data.ledger import Ledger
from data.plan import Planner
from train import stage
from train.adapters import add_adapters
from train.backends import build_engine
from train.banner import describe_data, describe_run, describe_sample, module_sizes
from train.checkpoint import copy_weights, open_newest, restore_checkpoint
from train.compose import readable_errors
from train.config import Precision, RunConfig
from train.data import (
    Tables,
    build_encoder,
    build_loader,
    build_planner,
    check_cache,
    load_held_out,
    load_tables,
)
from train.engine import Engine, start_engine
from train.first_weights import FirstWeights, open_first_weights
from train.flops import peak_flops
from train.folder import RunFolder
from train.held_out import EVALUATION, HeldOut
from train.loop import Preempted, Training, train, write_ledger
from train.manifest import remove_partial
from train.meters import Meters
from train.model.initial import RandomWeights
from train.model.omni import meta_model
from train.model.stand_in import MODEL_OF
from train.saver import Saver
from train.sinks import Sink, SinkRun, build_sinks, keep_until
from train.spikes import GradientNorms
from train.stopping import EXIT_STOPPED, StopRequests
from train.watchdog import Watchdog
from train.weights import FirstWeightsReader


def run(config: RunConfig) -> None:
    """Trains a stage from wherever its folder says it stands."""
    folder = RunFolder(config)
    folder.check(config)
    if folder.is_complete:
        print(f"run={folder.path}: already complete. Its result is in {folder.final}.")
        return
    stopping = StopRequests(config.train.max_minutes)
    stopping.listen()
    first = open_first_weights(config)
    accelerator = start_engine(config)
    with readable_errors(every_rank=True):
        _run(config, folder, first, accelerator, stopping)


def _run(
    config: RunConfig, folder: RunFolder, first: FirstWeights, accelerator, stopping: StopRequests
) -> None:
    started = time.time()
    torch.manual_seed(config.seed)
    model = meta_model(config.model, config.media, MODEL_OF[config.objective.value])
    add_adapters(model, config.lora)
    model.set_tuned(config.tuned, config.lora.adapted)
    sizes = module_sizes(model)
    beginnings = FirstWeightsReader(first, RandomWeights(model, config.seed))
    engine = build_engine(config, accelerator, model)
    if engine.is_main:
        folder.lock()
        folder.create(config)
        remove_partial(folder.checkpoints)
    encoder = build_encoder(config)
    tables = load_tables(config, engine, encoder, "train")
    held_out, answered = load_held_out(config, engine, encoder)
    _check_held_out(config, held_out)
    check_cache(config, tables, held_out)
    planner = build_planner(config, tables, epochs=config.num_epochs)
    total_steps = config.num_steps or planner.num_steps()
    assert total_steps is not None
    check = partial(stopping.check, engine.sum_over_ranks)
    training = Training(
        config=config,
        engine=engine,
        loader=build_loader(config, engine, tables, encoder, planner),
        saver=Saver(engine, folder.checkpoints, config.checkpoint),
        meters=Meters([table.name for table in tables.tables], engine.device, peak=_peak(config, engine)),
        ledger=Ledger(),
        folder=folder,
        evaluate=HeldOut(config, engine, held_out, answered, encoder, folder.path / "eval", check=check),
        total_steps=total_steps,
        stopping=stopping,
        norms=GradientNorms(config.optim.spike_factor),
        watchdog=Watchdog(config.train.hang_seconds, engine.rank, folder.hangs),
        quarantined=tables.quarantined + held_out.quarantined,
    )
    engine.sign = training.watchdog.sign
    beginning = _begin(training, planner, first, beginnings)
    write_ledger(training)
    if engine.is_main:
        lines = describe_run(config, engine, total_steps, sizes)
        lines += describe_data("train", tables) + describe_data("held out", held_out)
        lines += describe_sample(tables, encoder) if training.step == 0 else []
        print("\n".join([*lines, *beginning]), flush=True)
        training.sinks = _open_sinks(training)
    checkpoint = _train_or_exit(training)
    if engine.is_main:
        facts = _facts(training, tables, held_out, first, time.time() - started)
        stage.write_final(config, folder.final, checkpoint, beginnings, facts)
    _close(training)
    if engine.is_main:
        print(f"Complete: {total_steps} steps. Weights and stage.json are in {folder.final}.")


def _check_held_out(config: RunConfig, held_out: Tables) -> None:
    for name in ("every", "samples"):
        value = getattr(config.eval, name)
        if value and not held_out.tables:
            raise ValueError(
                f"eval.{name}={value}: no sample is held out. Set data.holdout, or eval.{name}=0."
            )


def _open_sinks(training: Training) -> list[Sink]:
    config = training.config
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    run = SinkRun(training.folder.path, training.step, training.total_steps, config.log, plain)
    return build_sinks(run)


def _train_or_exit(training: Training) -> Path:
    try:
        return train(training)
    except Preempted as error:
        _close(training)
        print(error)
        sys.exit(EXIT_STOPPED)
    finally:
        training.watchdog.stop()


def _close(training: Training) -> None:
    training.loader.close()
    for sink in training.sinks:
        sink.close()
    training.saver.close()
    training.engine.close()


def _peak(config: RunConfig, engine: Engine) -> float | None:
    if config.log.peak_tflops:
        return config.log.peak_tflops * 1e12
    if engine.device.type != "cuda" or config.precision is Precision.fp32:
        return None  # the known peaks are those of bf16 on GPUs
    return peak_flops(torch.cuda.get_device_name(engine.device))


def _begin(
    training: Training, planner: Planner, first: FirstWeights, beginnings: FirstWeightsReader
) -> list[str]:
    """Restores the newest whole checkpoint, or copies the first weights; returns in words which.

    Raises:
        ValueError: no checkpoint is whole, or its first weights are not those of now.
    """
    training.parent_weights_digest = first.digest
    reader = open_newest(training.engine, training.folder.checkpoints)
    if reader is None:
        copy_weights(training.engine, beginnings)
        _cut_back(training)
        return first.report()
    _check_parent(training, reader.state)
    restore_checkpoint(training.engine, reader)
    state = reader.state
    planner.restore(state["planner"])
    training.step = state["step"]
    training.good, training.bad = state["good"], state["bad"]
    training.meters.skipped_steps = state["skipped_steps"]
    training.skipped_in_a_row, training.rollbacks = state["skipped_in_a_row"], state["rollbacks"]
    training.last_applied = state["last_applied"]
    training.norms.restore(state["gradient_norms"])
    _restore_record(training, state["record"])
    if training.engine.is_main:
        training.ledger.restore(state["ledger"])
    _cut_back(training)
    return [f"Goes on after step {training.step} from {reader.folder}."]


def _cut_back(training: Training) -> None:
    """Drops what later steps have left: they are done again."""
    if training.engine.is_main and training.folder.samples.exists():
        keep_until(training.folder.samples, training.step)


def _check_parent(training: Training, state: dict[str, Any]) -> None:
    """Raises ValueError where frozen modules would come from other weights than the trained ones did."""
    now = training.parent_weights_digest
    then = state["parent_weights_digest"]
    if then != now:
        raise ValueError(
            f"{_first_word(training.config)}: holds other weights than {training.folder.path} was "
            f"started from: {str(then)[:12]} then, {str(now)[:12]} now. Put them back, or name another run."
        )


def _first_word(config: RunConfig) -> str:
    if config.init_from:
        return f"init_from={config.init_from}"
    return f"model.weights={config.model.weights}" if config.model.weights else "model.parts"


def _restore_record(training: Training, saved: dict[str, Any]) -> None:
    """Takes the last record as it was written, with its evaluation, or as it was saved just before that."""
    written = training.engine.gather_objects(training.folder.record_at(training.step))[0]
    training.last_record = written or saved
    training.record_due = written is None and saved.get("step") == training.step


def _index_digests(config: RunConfig, tables: Tables, held_out: Tables) -> dict[str, str]:
    """Returns the digest of every first's index by the first's config path."""
    sources = {f"data.sources.{name}": folder for name, folder in tables.folders.items()}
    for name, folder in held_out.folders.items():
        if name in config.data.held_out:  # the others are shares of training sources
            sources[f"data.held_out.{name}"] = folder
    return {where: folder.digest for where, folder in sources.items()}


def _facts(
    training: Training, tables: Tables, held_out: Tables, first: FirstWeights, seconds: float
) -> dict[str, Any]:
    record = training.last_record
    kept = ("loss", "loss_by_source", "loss_by_modality", "held_out")
    evaluation = record.get("held_out", {})
    return {
        "steps": training.total_steps,
        "data_digest": tables.digest,
        "data_index_digests": _index_digests(training.config, tables, held_out),
        "parent": first.parent,
        "metrics": {name: record[name] for name in kept if name in record},
        "evaluation": {name: evaluation[name] for name in EVALUATION if name in evaluation},
        "samples": {"good": training.good, "bad": training.bad},
        "seconds": round(seconds, 1),
    }
