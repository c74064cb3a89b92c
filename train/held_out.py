"""Evaluation on held-out samples: loss, answers and named metrics, and all of it with the media blanked.

The losses are of the same packs whatever the number of ranks, a sum over all of them; the answers are
to the same samples (train/answers.py).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from data.blank import blank
from data.encode import Encoder
from data.loader import Loader, StepBatches
from data.plan import Planner
from train.answers import Answer, Answered, Answering, summarise
from train.compose import refuse_metrics
from train.config import MEASURES, Objective, RunConfig
from train.data import Tables, build_loader, build_planner
from train.engine import Engine
from train.folder import naming
from train.meters import LossMeter

Found = dict[str, Any]

EVALUATION = (
    "metrics",
    "blank_metrics",
    "answers",
    "blank_answers",
    "not_answered",
    "loss_by_source",
    "blank_loss_by_source",
)
"""What stage.json keeps under `evaluation`."""

ANSWER_MEASURES = [measure for measure in MEASURES if measure != "loss"]


class HeldOut:
    """Evaluates an engine on the held-out samples; answers go to `folder/step-00000123.jsonl`.

    The loss is over at most `eval.max_packs` packs. With `eval.samples` there are answers too, to
    samples of `answered`. A stand-in task has a loss of its own; its answers show where the next
    stage begins. Every rank calls `check` before each batch, and it may raise.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        tables: Tables,
        answered: Tables,
        encoder: Encoder,
        folder: Path,
        stream: TextIO | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        check_metrics(config, answered)
        # One worker is enough here. Budgets are for the training mixture; any packing gives the same loss.
        pack = dataclasses.replace(config.data.pack, max_slices=None, max_audio_seconds=None)
        loading = dataclasses.replace(config.data, workers=min(config.data.workers, 1), pack=pack)
        self.config = dataclasses.replace(config, data=loading)
        self.engine = engine
        self.tables = tables
        self.answered = answered
        self.encoder = encoder
        self.folder = folder
        self.stream = stream or sys.stdout
        self.check = check
        self.sources = [table.name for table in tables.tables]
        self.answers = config.eval.samples > 0
        self.is_next_token = config.objective is Objective.next_token
        self.blanked = self.answers and config.eval.blank and self.is_next_token

    def __call__(self, step: int) -> Found | None:
        """Returns losses, answers and metrics after `step`; None without held-out samples.

        Every rank must call it, and gets the same. The main rank writes the answers and prints a table.
        """
        if not self.tables.tables:
            return None
        self.engine.model.eval()
        with torch.no_grad():
            found = self._losses()
            answers, not_answered = self._answers() if self.answers else Answered([], {})
        self.engine.model.train()
        parts = {**summarise(answers), "not_answered": not_answered}
        found |= {name: part for name, part in parts.items() if part}
        losses = ("loss_by_source", "blank_loss_by_source") if not self.is_next_token else ()
        named = {name: part for name, part in found.items() if name not in losses}
        found |= named_metrics(self.config.eval.metrics, named)
        if self.engine.is_main:
            self._show(step, found, answers)
        return found

    def _answers(self) -> Answered:
        return Answering(self.config.eval, self.engine, self.answered, self.encoder, self.check)()

    def _show(self, step: int, found: Found, answers: list[Answer]) -> None:
        """Writes the answers, and for people a table and what was wanted but not measured."""
        if answers:
            write_answers(self.folder / f"step-{step:08d}.jsonl", answers)
        if self.answers:
            tqdm.write(f"step {step}, held out:\n{format_table(found)}", file=self.stream)
        measured = (["loss"] if self.is_next_token else []) + (ANSWER_MEASURES if self.answers else [])
        for line in unmeasured(self.config.eval.metrics, found, measured):
            tqdm.write(f"step {step}: {line}", file=self.stream)

    def _losses(self) -> Found:
        planner: Planner = build_planner(self.config, self.tables, epochs=1.0)
        loader: Loader = build_loader(self.config, self.engine, self.tables, self.encoder, planner)
        steps = max(1, self.config.eval.max_packs // self.config.train.packs_per_step)
        seen, blind = (LossMeter(self.sources, self.engine.device) for _ in range(2))
        good = bad = 0
        with closing(loader):
            for work in loader:
                self.check()
                good += sum(len(batch.samples) for batch in work.batches)
                bad += sum(len(batch.dropped) for batch in work.batches)
                self._add(work, seen, blind)
                if work.step == steps:
                    break
        found = seen.read(self.engine.all_reduce(seen.sums).tolist())
        good, bad = map(int, self.engine.sum_over_ranks([good, bad]))
        found |= {"samples": good, "bad_samples": bad}
        if self.blanked:
            losses = blind.read(self.engine.all_reduce(blind.sums).tolist())["loss_by_source"]
            found["blank_loss_by_source"] = {name: losses[name] for name in self._with_media(losses)}
        return found

    def _add(self, work: StepBatches, seen: LossMeter, blind: LossMeter) -> None:
        for on_host in work.batches:
            batch = on_host.to(self.engine.device)
            seen.add(batch, self.engine.forward(batch)[1])
            if self.blanked:
                blind.add(batch, self.engine.forward(blank(batch))[1])

    def _with_media(self, names: Found) -> list[str]:
        return [
            table.name
            for table in self.tables.tables
            if table.name in names and (table.slices.any() or table.audio_seconds.any())
        ]


def check_metrics(config: RunConfig, tables: Tables) -> None:
    """Raises ValueError where `eval.metrics` names a source that is not held out, if any is."""
    if found := refuse_metrics(config, [table.name for table in tables.tables]):
        raise ValueError("\n".join(found))


def named_metrics(wanted: dict[str, str], found: Found) -> Found:
    """Returns `metrics` and `blank_metrics` by the names of `eval.metrics`, of what was measured."""
    named: Found = {}
    for prefix in ("", "blank_"):
        losses, answers = found.get(f"{prefix}loss_by_source", {}), found.get(f"{prefix}answers", {})
        values: Found = {}
        for name, place in wanted.items():
            source, _, measure = place.rpartition(".")
            value = losses.get(source) if measure == "loss" else answers.get(source, {}).get(measure)
            if value is not None:
                values[name] = value
        if values:
            named[f"{prefix}metrics"] = values
    return named


def unmeasured(wanted: dict[str, str], found: Found, measured: list[str]) -> list[str]:
    """Returns a line for each of `eval.metrics` that has no value, though its kind was `measured`."""
    values, lines = found.get("metrics", {}), []
    for name, place in wanted.items():
        source, _, measure = place.rpartition(".")
        if name in values or measure not in measured:
            continue
        if measure == "loss":
            reason = f"no sample of {source!r} is among its packs. Raise eval.max_packs, or mend the source"
        else:
            reason = f"no sample of {source!r} was answered. Mend what `not_answered` names"
        lines.append(f"eval.metrics.{name}={place!r}: has no value, since {reason}.")
    return lines


def write_answers(path: Path, answers: list[Answer]) -> None:
    """Writes a line of JSON per answer; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with naming(partial), partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer.line(), ensure_ascii=False) + "\n" for answer in answers)
    partial.replace(path)


def format_table(found: Found) -> str:
    """Returns losses and answers by source for people, the values with blanked media behind the real ones."""
    columns = ("loss", "exact", "cer", "wer")
    lines = [_row("source", ["samples", *(name for column in columns for name in (column, "(blank)"))])]
    losses, blind = found["loss_by_source"], found.get("blank_loss_by_source", {})
    for source in sorted({**losses, **found.get("answers", {})}):
        real = {**found.get("answers", {}).get(source, {}), "loss": losses.get(source)}
        other = {**found.get("blank_answers", {}).get(source, {}), "loss": blind.get(source)}
        cells = [_cell(values.get(column)) for column in columns for values in (real, other)]
        lines.append(_row(source, [str(real.get("samples", "")), *cells]))
    for source, causes in found.get("not_answered", {}).items():
        reasons = ", ".join(f"{cause} {count}" for cause, count in causes.items())
        lines.append(f"  {source:24}not answered: {reasons}")
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:24}" + "".join(f"{cell:>9}" for cell in cells)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
