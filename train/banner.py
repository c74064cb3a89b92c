"""What a person should see before the first step: what trains, on what, from where, and one sample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from data.encode import Encoder
from data.shards import ShardReader
from data.show import format_text, show
from train.config import RunConfig
from train.data import Tables
from train.engine import Engine
from train.model.omni import MegrezOmni, module_of
from train.model.shapes import ADAPTER


class ModuleSize(NamedTuple):
    """Parameters of a module: its own, and those of its adapters."""

    own: int
    adapters: int


def module_sizes(model: MegrezOmni) -> dict[str, ModuleSize]:
    """Returns the parameters of each of the five modules. Call before ZeRO-3 partitions them."""
    sizes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        sizes.setdefault(module_of(name), [0, 0])[ADAPTER in name] += parameter.numel()
    return {name: ModuleSize(*size) for name, size in sizes.items()}


def describe_run(
    config: RunConfig, engine: Engine, total_steps: int, sizes: dict[str, ModuleSize]
) -> list[str]:
    """Returns the stage, its length and place, and what happens to each module."""
    spread = "DDP" if config.zero.stage == 0 else f"DeepSpeed {config.zero.value}"
    where = f"{engine.world_size} x {engine.device.type}, {spread}, {config.precision.value}"
    lines = [
        f"Stage {config.stage} of {config.model.name} in {Path(config.run)}: {total_steps} steps, {where}"
    ]
    for name, size in sizes.items():
        lines.append(f"  {name:<15} {size.own / 1e6:10.2f}M  {_fate(config, name, size)}")
    return lines


def _fate(config: RunConfig, module: str, size: ModuleSize) -> str:
    if not config.tuned[module]:
        return "frozen"
    trains = f"trains at lr {config.learning_rate(module):g}"
    if not size.adapters:
        return trains
    return f"frozen; {size.adapters / 1e6:.2f}M in adapters of rank {config.lora.rank}: {trains}"


def describe_data(title: str, tables: Tables) -> list[str]:
    """Returns a line per source: what is taken of it and what is left out, by reason."""
    lines = []
    for name, facts in tables.report.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in facts["modality"].items())
        counts = f"{facts['samples']} samples ({kinds or 'none'}), {facts['tokens']} tokens"
        line = f"  {title:<9} {name}: {counts}"
        left_out = ", ".join(f"{count} {reason}" for reason, count in facts["excluded"].items())
        lines.append(f"{line}; left out: {left_out}" if left_out else line)
    return lines or [f"  {title:<9} nothing"]


def describe_sample(tables: Tables, encoder: Encoder) -> list[str]:
    """Returns the first sample as text, so that a wrong loss mask is seen before it costs anything."""
    table = tables.tables[0]
    shard, row = int(table.shard[0]), int(table.row[0])
    folder = tables.folders[table.name]
    sample = ShardReader(folder, table.name).read(shard, row, media=False)
    shown = show(table.name, sample, folder.shards[shard].sizes(row), encoder)
    marked = "green" if sys.stdout.isatty() else "in [[ ]]"
    text = format_text(shown, sys.stdout.isatty())
    return [f"  sample    {table.name}/{sample.key} (supervised text {marked}):", *text.splitlines()]
