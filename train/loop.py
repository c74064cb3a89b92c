"""The training loop: one step in one readable function, and what happens between steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.ledger import Ledger
from data.loader import Loader, StepBatches
from data.sample import Batch, Dropped
from train.compose import to_yaml
from train.config import OnSpikes, RunConfig
from train.engine import Engine, StepResult
from train.flops import TOWER_PARTS, training_flops, work_of
from train.folder import RunFolder, naming
from train.meters import Meters
from train.rollback import MAX_ROLLBACKS, roll_back
from train.saver import Saver
from train.schedule import lr_factor
from train.sinks import Sink
from train.spikes import GradientNorms, describe_skip, keep_spike
from train.stage import versions
from train.stopping import StopAsked, StopRequests, reason_of
from train.watchdog import Watchdog

Evaluate = Callable[[int], "dict[str, Any] | None"]
"""Evaluates after a step on held-out samples, where there are any."""


class Preempted(Exception):
    """The run was asked to end (a signal, or its time limit); its state is saved."""


@dataclass(slots=True)
class Totals:
    """Sums over all ranks and micro-batches of one step, known before its first forward pass."""

    weight: float
    good: int
    bad: int


@dataclass(slots=True)
class Training:
    """Everything the loop works with. `step` is the last finished one, `last_applied` the last update.

    `record_due` says that its record is not written yet: the run ended between its save and that.
    """

    config: RunConfig
    engine: Engine
    loader: Loader
    saver: Saver
    meters: Meters
    ledger: Ledger
    folder: RunFolder
    evaluate: Evaluate
    total_steps: int
    stopping: StopRequests
    watchdog: Watchdog
    quarantined: list[Dropped] = field(default_factory=list)
    step: int = 0
    norms: GradientNorms = field(default_factory=lambda: GradientNorms(None))
    skipped_in_a_row: int = 0
    last_applied: int = 0
    rollbacks: int = 0
    good: int = 0
    bad: int = 0
    sinks: list[Sink] = field(default_factory=list)
    last_record: dict[str, Any] = field(default_factory=dict)
    record_due: bool = False
    parent_weights_digest: str | None = None


def train(run: Training) -> Path:
    """Runs from `run.step` to `run.total_steps` and returns the last checkpoint.

    Raises:
        Preempted: after a request to end, with a checkpoint of the last finished step.
        ValueError, RuntimeError: too many bad samples, or too many steps in a row that had to be skipped.
    """
    run.stopping.training = True
    checkpoint = run.folder.checkpoints / f"step-{run.step:08d}"
    run.meters.start()
    if run.record_due:
        _check_stop_rules(run, _write_record(run, evaluate=Due.at(run, stop=False).evaluate), checkpoint)
    for work in _steps(run):
        totals = count(run, work)
        result = train_step(run, work, totals)
        run.step = work.step
        went_back = _roll_back_if_due(run)
        # Asked after the update, so that a signal costs no further step before the save.
        flags = run.engine.sum_over_ranks([*run.stopping.flags(), float(run.saver.is_written)])
        stop = reason_of(flags[:-1])
        if flags[-1] == run.engine.world_size:
            with run.meters.saving():
                run.saver.complete()
        if run.config.log.samples:
            _write_samples(run, work)
        due = Due.at(run, stop=bool(stop) or went_back)
        if due.log:
            run.last_record = _measure(run, work, result)
        if due.save:
            checkpoint = _save(run, work, wait=bool(stop) or due.evaluate)
        if due.log and not (stop and due.evaluate):  # else the next start does it: there is no time now
            stop = _write_record(run, evaluate=due.evaluate) or stop
            if stop and not due.save:
                checkpoint = _save(run, work, wait=True)
        _check_stop_rules(run, stop, checkpoint)
        if run.step == run.total_steps:
            break
    return checkpoint


def _steps(run: Training) -> Iterator[StepBatches]:
    if run.step >= run.total_steps:
        return
    for work in run.loader:
        run.watchdog.begin(work)
        run.meters.waited(work.wait_seconds)
        yield work
        run.watchdog.sign("waiting for data")


def count(run: Training, work: StepBatches) -> Totals:
    """Returns the supervised weight, good and bad samples of a step over all ranks."""
    mine = [
        sum(float(batch.weights.sum()) for batch in work.batches),
        sum(len(batch.samples) for batch in work.batches),
        sum(len(batch.dropped) for batch in work.batches),
    ]
    weight, good, bad = run.engine.sum_over_ranks(mine)
    run.good += int(good)
    run.bad += int(bad)
    for batch in work.batches:
        run.ledger.add_good(len(batch.samples))
        for dropped in batch.dropped:
            run.ledger.add(dropped, work.step)
    return Totals(weight, int(good), int(bad))


def train_step(run: Training, work: StepBatches, totals: Totals) -> StepResult | None:
    """Makes one update from the micro-batches of this rank; None where no token carries loss.

    The loss of a step is a sum over all supervised tokens of all ranks, divided once by their
    global weight, so it does not depend on how samples are packed, dealt or cut into micro-batches.
    """
    engine, config = run.engine, run.config
    if totals.weight == 0:
        run.meters.end_step(fill=work.fill, skipped=True)
        return None
    engine.set_lr(lr_factor(work.step, run.total_steps, config.optim))
    losses: list[torch.Tensor] = []
    for number, on_host in enumerate(work.batches, start=1):
        batch = on_host.to(engine.device)
        with engine.micro_batch(last=number == len(work.batches)):
            loss_sum, row_losses = engine.forward(batch)
            engine.backward(loss_sum / totals.weight)
        run.meters.add(batch, row_losses, _flops(on_host, config))
        losses.append(row_losses)
    limit = run.norms.limit()
    result = engine.step(limit)
    run.meters.end_step(fill=work.fill, skipped=not result.applied)
    run.skipped_in_a_row = 0 if result.applied else run.skipped_in_a_row + 1
    if result.applied:
        run.last_applied = work.step
        run.norms.applied.append(result.grad_norm)
    else:
        _report_skip(run, work, [each.cpu() for each in losses], result, limit, totals)
    return result


def _flops(batch: Batch, config: RunConfig) -> float:
    parts = training_flops(
        work_of(batch, config.media), config.model, config.media, config.tuned, config.lora
    )
    tower = config.objective.tower
    return sum(flops for part, flops in parts.items() if tower is None or part in TOWER_PARTS[tower])


def _report_skip(
    run: Training,
    work: StepBatches,
    losses: list[torch.Tensor],
    result: StepResult,
    limit: float,
    totals: Totals,
) -> None:
    mine = sum(float((batch.weights * each).sum()) for batch, each in zip(work.batches, losses))
    facts = {
        "loss": run.engine.sum_over_ranks([mine])[0] / totals.weight,
        "grad_norm": result.grad_norm,
        "grad_norm_by_module": result.module_norms,
        "limit": limit,
    }
    seen = keep_spike(run.engine, run.folder.spikes, work, losses, run.loader.folders, facts)
    if run.engine.is_main:
        print(describe_skip(work.step, result, limit, seen), flush=True)


@dataclass(slots=True)
class Due:
    """What happens after a step."""

    log: bool
    evaluate: bool
    save: bool

    @classmethod
    def at(cls, run: Training, stop: bool) -> Due:
        """Returns what is due: everything at the end, a save when asked to stop or gone back."""
        config, step = run.config, run.step
        last = step == run.total_steps
        evaluate = last or bool(config.eval.every and step % config.eval.every == 0)
        return cls(
            log=evaluate or stop or step == 1 or step % config.log.every == 0,
            evaluate=evaluate,
            save=last or stop or step % config.checkpoint.every == 0,
        )


def _measure(run: Training, work: StepBatches, result: StepResult | None) -> dict[str, Any]:
    engine = run.engine
    factor = lr_factor(work.step, run.total_steps, run.config.optim)
    rates = {
        group["name"].split("/")[0]: group["peak_lr"] * factor for group in engine.optimizer.param_groups
    }
    norms = {"grad_norm": result.grad_norm, "grad_norm_by_module": result.module_norms} if result else {}
    return run.meters.record(
        work.step,
        engine.all_reduce,
        engine.world_size,
        epoch=work.epoch,
        lr=rates,
        drawn=work.drawn,
        bad_samples=run.bad,
        **norms,
    )


def _write_record(run: Training, *, evaluate: bool) -> str:
    """Adds the evaluation to the record of the step where it is due, and hands the record to the sinks.

    Returns what asked to end the run in the middle of the evaluation, if anything: then there is no record.
    """
    if evaluate:
        with run.meters.saving():
            run.saver.finish()  # so that an end during the evaluation loses none of it
        try:
            with run.meters.paused():
                held_out = run.evaluate(run.step)
        except StopAsked as error:
            return str(error)
        if held_out:
            run.last_record["held_out"] = held_out
    run.last_record["save_seconds"] = run.meters.take_save_seconds()
    for sink in run.sinks:
        sink.write(run.last_record)
    return ""


def _write_samples(run: Training, work: StepBatches) -> None:
    """Adds the keys of a step's samples, over all ranks, to `samples.jsonl`."""
    mine = [f"{info.source}/{info.key}" for batch in work.batches for info in batch.samples]
    named = sorted(key for keys in run.engine.gather_objects(mine) for key in keys)
    if run.engine.is_main:
        with naming(run.folder.samples), run.folder.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": work.step, "samples": named}, ensure_ascii=False) + "\n")


def _save(run: Training, work: StepBatches, *, wait: bool) -> Path:
    """Saves; without `wait` the checkpoint is complete some steps later."""
    ledger = write_ledger(run)
    state = {
        "step": run.step,
        "planner": work.planner_state,
        "ledger": ledger.state(),
        "good": run.good,
        "bad": run.bad,
        "skipped_steps": run.meters.skipped_steps,
        "skipped_in_a_row": run.skipped_in_a_row,
        "last_applied": run.last_applied,
        "rollbacks": run.rollbacks,
        "gradient_norms": list(run.norms.applied),
        "record": run.last_record,
        "parent_weights_digest": run.parent_weights_digest,
        "config": to_yaml(run.config),
        "versions": versions(),
    }
    with run.meters.saving():
        checkpoint = run.saver.save(run.step, state)
        if wait:
            run.saver.finish()
    return checkpoint


def write_ledger(run: Training) -> Ledger:
    """Writes what all ranks dropped so far and what was left out before the run; returns it."""
    merged = Ledger.merge(run.engine.gather_objects(run.ledger.state()))
    for dropped in run.quarantined:
        merged.add(dropped, step=0)
    if run.engine.is_main:
        with naming(run.folder.ledger):
            merged.write(run.folder.ledger)
    return merged


def _check_stop_rules(run: Training, stop: str, checkpoint: Path) -> None:
    if stop:
        raise Preempted(
            f"step {run.step}: asked to stop; saved in {checkpoint} ({stop}). "
            "Start the same command again to go on."
        )
    try:
        run.ledger.check(run.config.data.max_bad_share, good=run.good, bad=run.bad)
    except ValueError:  # on all ranks alike, since the sums are those of all
        write_ledger(run)
        run.saver.finish()
        raise


def _roll_back_if_due(run: Training) -> bool:
    """Goes back to earlier weights after too many skipped steps, where the config asks for that.

    Raises:
        ValueError: it does not, has been back too often, or there is no checkpoint to go back to.
    """
    count, config = run.skipped_in_a_row, run.config.train
    if count < config.max_skipped_steps:
        return False
    can = config.on_spikes is OnSpikes.rollback and run.rollbacks < MAX_ROLLBACKS
    run.saver.finish()  # so that which checkpoints there are does not depend on the speed of the disk
    # The weights of the last step that changed anything failed at every step since.
    found = roll_back(run.engine, run.folder.checkpoints, run.last_applied, run.norms) if can else None
    if found is None:
        raise ValueError(_say_why_it_ends(run))
    run.rollbacks += 1
    run.skipped_in_a_row = 0
    run.last_applied = found.state["last_applied"]
    run.saver.forget_after(found.state["step"])
    if run.engine.is_main:
        print(
            f"step {run.step}: {count} steps in a row changed nothing; goes on with {found.folder}.",
            flush=True,
        )
    return True


def _say_why_it_ends(run: Training) -> str:
    config = run.config.train
    advice = "Lower optim.lr, mend the data, or set train.on_spikes=rollback."
    if config.on_spikes is OnSpikes.rollback:
        advice = f"It went back {run.rollbacks} times. Lower optim.lr or mend the data."
        if run.rollbacks < MAX_ROLLBACKS:
            advice = "No checkpoint is old enough to go back to. Raise checkpoint.keep, or lower optim.lr."
    return (
        f"train.max_skipped_steps={config.max_skipped_steps}: so many steps in a row changed nothing, up to "
        f"step {run.step}. {run.folder.spikes} keeps them. {advice}"
    )
