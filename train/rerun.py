"""One step of a run once more: its samples, the weights before it, forward and backward, no update."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.deal import deal
from data.encode import Encoder
from data.index import FolderIndex, load_folder
from data.loader import StepBatches
from data.sample import Pack, SampleRef
from data.scan import build_index
from data.worker import MicroBatches, Progress, WorkItem
from train.adapters import add_adapters
from train.backends import build_engine
from train.checkpoint import PieceReader, copy_weights
from train.config import RunConfig
from train.data import build_encoder, build_planner, load_tables
from train.engine import Engine, start_engine
from train.folder import RunFolder
from train.manifest import newest_checkpoint, step_of
from train.model.omni import meta_model
from train.model.stand_in import MODEL_OF
from train.request import ModelRequest
from train.source import check_whole, open_first
from train.spikes import FILE, look_at_samples

Found = dict[str, Any]


@dataclass(slots=True)
class Step:
    """The packs of a step by micro-batch, and where its samples are.

    `lines` says what a spike kept of each, by its row in the tar.
    """

    number: int
    packs: list[list[Pack]]
    folders: dict[str, FolderIndex]
    origin: str
    lines: dict[int, Found] | None = None


def rerun(model: ModelRequest, number: int, *, as_json: bool) -> None:
    """Runs step `number` of a run again and prints what it found.

    Raises:
        ValueError: the run has no such step, or its data or weights are not those of then.
    """
    config = model.config
    folder = RunFolder(config)
    engine = _build(config)
    encoder = build_encoder(config)
    checkpoint = _checkpoint_before(folder, number)
    copy_weights(engine, PieceReader(checkpoint) if checkpoint else open_first(config))
    with tempfile.TemporaryDirectory() as scratch:
        kept = folder.spikes / f"step-{number:08d}"
        if (kept / FILE).is_file():
            step = _kept_step(kept, number, config, Path(scratch))
        else:
            step = _planned_step(config, engine, encoder, number, checkpoint)
        found = _run(config, engine, encoder, step)
    weights_step = step_of(checkpoint) if checkpoint else 0
    found |= {"step": number, "samples_from": step.origin, "weights_step": weights_step}
    found["weights_from"] = str(checkpoint) if checkpoint else "what the run began with"
    found["logged"] = _logged(folder, number)
    print(json.dumps(found, indent=1, ensure_ascii=False) if as_json else format_found(found))
    sys.stdout.flush()
    engine.close()


def _build(config: RunConfig) -> Engine:
    accelerator = start_engine(config)
    model = meta_model(config.model, config.media, MODEL_OF[config.objective.value])
    add_adapters(model, config.lora)
    model.set_tuned(config.tuned, config.lora.adapted)
    return build_engine(config, accelerator, model)


def _checkpoint_before(folder: RunFolder, step: int) -> Path | None:
    found = newest_checkpoint(folder.checkpoints, before=step)
    if found is not None:
        check_whole(found)
    return found


def _planned_step(
    config: RunConfig, engine: Engine, encoder: Encoder, number: int, checkpoint: Path | None
) -> Step:
    """Plans on from a checkpoint, or from the beginning, to the step."""
    tables = load_tables(config, engine, encoder, "train")
    planner = build_planner(config, tables, epochs=config.num_epochs)
    if checkpoint:
        planner.restore(PieceReader(checkpoint).state["planner"])
    plan = planner.next_step()
    while plan is not None and plan.step < number:
        plan = planner.next_step()
    if plan is None:
        raise ValueError(f"step={number}: the run ends before it. Name an earlier one.")
    packs = deal(plan.packs, 1, config.train.micro_batch_packs)[0]
    return Step(number, packs, tables.folders, "the plan")


def _kept_step(folder: Path, number: int, config: RunConfig, scratch: Path) -> Step:
    """Takes a step from what `train.spikes` kept of it; the index of its tar goes to `scratch`."""
    lines: list[Found] = json.loads((folder / FILE).read_text())["samples"]
    lines = [line for line in lines if line["row"] is not None]
    tar = "shard-000000.tar"
    os.symlink((folder / tar).resolve(), scratch / tar)
    build_index(str(scratch / tar), "native", config.data.limits)
    index = load_folder(str(scratch))
    packs: dict[tuple[int, int, int], list[SampleRef]] = {}
    for line in lines:
        place = (line["rank"], line["micro_batch"], line["pack"])
        packs.setdefault(place, []).append(SampleRef(line["source"], 0, line["row"], line["tokens"]))
    rows = [Pack(tuple(refs)) for _, refs in sorted(packs.items())]
    size = config.train.micro_batch_packs
    cut = [rows[first : first + size] for first in range(0, len(rows), size)]
    folders = {line["source"]: index for line in lines}
    return Step(number, cut, folders, str(folder), {line["row"]: line for line in lines})


def _run(config: RunConfig, engine: Engine, encoder: Encoder, step: Step) -> Found:
    work = _load(config, encoder, step)
    weight = sum(float(batch.weights.sum()) for batch in work.batches)
    if not weight:
        raise ValueError(f"step={step.number}: no token of it carries loss, so the run made no update.")
    losses: list[Tensor] = []
    loss = 0.0
    for place, on_host in enumerate(work.batches, start=1):
        batch = on_host.to(engine.device)
        with engine.micro_batch(last=place == len(work.batches)):
            loss_sum, row_losses = engine.forward(batch)
            engine.backward(loss_sum / weight)
        losses.append(row_losses.cpu())
        loss += float((on_host.weights.double() * losses[-1].double()).sum())
    result = engine.step(limit=-1.0)  # which no norm obeys: so it is measured, and nothing is changed
    seen = look_at_samples(work, losses, step.folders, rank=0)
    if step.lines:
        names = ("rank", "micro_batch", "pack", "shard", "key")
        for sample in seen:
            sample.line.update({name: step.lines[sample.ref.row][name] for name in names})
    dropped = [entry for batch in work.batches for entry in batch.dropped]
    return {
        "loss": loss / weight,
        "grad_norm": result.grad_norm,
        "grad_norm_by_module": result.module_norms,
        "samples": [sample.line for sample in seen],
        "dropped": [f"{entry.source}/{entry.shard}/{entry.key}: {entry.cause}" for entry in dropped],
    }


def _load(config: RunConfig, encoder: Encoder, step: Step) -> StepBatches:
    options = {
        "length": config.data.pack.length,
        "media": config.media,
        "pad_id": encoder.tokenizer.special("<|pad|>"),
        "loss": config.train.loss.value,
    }
    loading = MicroBatches(step.folders, encoder, options, Progress(0))
    batches = []
    for number, packs in enumerate(step.packs):
        loaded = loading[WorkItem(number, packs)]
        if loaded.batch is None:
            raise RuntimeError(loaded.failure)
        batches.append(loaded.batch)
    return StepBatches(step.number, batches, {}, 0.0, {}, 0.0, 0.0, step.packs)


def _logged(folder: RunFolder, number: int) -> Found:
    """Returns loss and norm of a step as the run logged them, where a line is about that step alone."""
    record = folder.record_at(number)
    if record is None or (number > 1 and folder.record_at(number - 1) is None):
        return {}
    return {name: record.get(name) for name in ("loss", "grad_norm")}


def format_found(found: Found) -> str:
    """Returns the result for people: worst samples first."""
    logged = found["logged"]
    lines = [
        f"step {found['step']}: {len(found['samples'])} samples of {found['samples_from']}",
        f"weights of {found['weights_from']}",
    ]
    if found["weights_step"] < found["step"] - 1:
        lines.append(f"The run itself had those of step {found['step'] - 1}, so its loss was another.")
    lines.append(f"  {'loss':>10}  {'tokens':>6}  {'modality':12} sample")
    order = sorted(found["samples"], key=lambda line: (line["finite"], -(line["loss"] or 0.0)))
    lines += [_line(line) for line in order]
    lines += [f"  dropped: {text}" for text in found["dropped"]]
    for name, title in (("loss", "loss"), ("grad_norm", "gradient norm")):
        note = f" (the run: {logged[name]:.6g})" if logged.get(name) is not None else ""
        lines.append(f"{title} {found[name]:.6g}{note}")
    lines += [f"  {module:16} {norm:.6g}" for module, norm in found["grad_norm_by_module"].items()]
    return "\n".join(lines)


def _line(line: Found) -> str:
    loss = f"{line['loss']:10.4f}" if line["finite"] else "not finite"
    name = f"{line['source']}/{line['shard']}/{line['key']}"
    return f"  {loss}  {line['tokens']:6}  {line['modality']:12} {name}"
