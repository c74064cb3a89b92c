"""Held-out loss: the same packs whatever the number of ranks, a sum over all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from data.encode import Encoder
from data.loader import Loader
from data.plan import Planner
from train.config import RunConfig
from train.data import Tables, build_loader, build_planner
from train.engine import Engine
from train.meters import LossMeter


class HeldOut:
    """Evaluates an engine on the held-out samples, over at most `eval.max_packs` packs."""

    def __init__(self, config: RunConfig, engine: Engine, tables: Tables, encoder: Encoder) -> None:
        # One worker is enough here. Budgets are for the training mixture; any packing gives the same loss.
        pack = dataclasses.replace(config.data.pack, max_slices=None, max_audio_seconds=None)
        loading = dataclasses.replace(config.data, workers=min(config.data.workers, 1), pack=pack)
        self.config = dataclasses.replace(config, data=loading)
        self.engine = engine
        self.tables = tables
        self.encoder = encoder

    def __call__(self) -> dict[str, Any] | None:
        """Returns losses, by source and modality too, and how many samples; None without held-out ones."""
        if not self.tables.tables:
            return None
        planner: Planner = build_planner(self.config, self.tables, epochs=1.0)
        loader: Loader = build_loader(self.config, self.engine, self.tables, self.encoder, planner)
        steps = max(1, self.config.eval.max_packs // self.config.train.packs_per_step)
        meter = LossMeter([table.name for table in self.tables.tables], self.engine.device)
        good = bad = 0
        self.engine.model.eval()
        with torch.no_grad():
            for work in loader:
                good += sum(len(batch.samples) for batch in work.batches)
                bad += sum(len(batch.dropped) for batch in work.batches)
                for on_host in work.batches:
                    batch = on_host.to(self.engine.device)
                    meter.add(batch, self.engine.forward(batch)[1])
                if work.step == steps:
                    break
        loader.close()
        self.engine.model.train()
        found = meter.read(self.engine.all_reduce(meter.sums).tolist())
        good, bad = map(int, self.engine.sum_over_ranks([good, bad]))
        return {**found, "samples": good, "bad_samples": bad}
