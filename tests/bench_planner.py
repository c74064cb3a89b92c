"""Prints how full the planner's rows are, how long samples wait, and what planning costs.

Example: python -m tests.bench_planner --samples 30000 --buffer 128
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np

from data.config import PackConfig
from data.deal import deal
from data.plan import Planner, SourceTable

# Work of everything trained, forward and backward; only the ratios matter here.
TOKEN_TFLOP = 0.0154
SLICE_TFLOP = 2.9
SECOND_TFLOP = 0.25


def tables(num_samples: int, seed: int) -> list[SourceTable]:
    """Returns pictures, speech and text, about 45%, 25% and 30% of the tokens."""
    random = np.random.default_rng(seed)
    count = num_samples // 20
    num_images, num_clips, num_texts = 6 * count, 8 * count, num_samples - 14 * count
    slices = random.choice([1, 1, 3, 4, 5, 7, 10], num_images)
    seconds = np.minimum(random.lognormal(2.0, 0.7, num_clips), 30.0)
    text = random.lognormal(6.0, 0.9, num_texts)
    none = np.zeros
    return [
        _table("image", 66 * slices + random.integers(30, 300, num_images), slices, none(num_images)),
        _table("audio", seconds * 12.5 + random.integers(40, 250, num_clips), none(num_clips), seconds),
        _table("text", np.minimum(text + 20, 4096), none(num_texts), none(num_texts)),
    ]


def _table(name: str, length: np.ndarray, slices: np.ndarray, seconds: np.ndarray) -> SourceTable:
    row = np.arange(len(length), dtype=np.int32)
    length = length.astype(np.int32)
    return SourceTable(
        name=name,
        shard=row // 1000,
        row=row % 1000,
        length=length,
        cost=TOKEN_TFLOP * length + SLICE_TFLOP * slices + SECOND_TFLOP * seconds,
        slices=slices.astype(np.int32),
        audio_seconds=seconds.astype(np.float32),
    )


def _per_token(sources: list[SourceTable], column: str) -> float:
    return sum(getattr(table, column).sum() for table in sources) / sum(
        table.length.sum() for table in sources
    )


def _measure(args: argparse.Namespace, sources: list[SourceTable], pack: PackConfig) -> None:
    planner = Planner(sources, pack, args.packs_per_step, args.seed, 16, 1.0, "bench")
    start = time.perf_counter()
    steps = []
    while step := planner.next_step():
        steps.append(step.packs)
    seconds = time.perf_counter() - start
    packs = [pack for step in steps for pack in step if pack.refs]
    samples = sum(len(pack.refs) for pack in packs)
    tokens = sum(pack.length for pack in packs)
    print(
        f"max_slices {pack.max_slices!s:>5}  max_audio_seconds {pack.max_audio_seconds!s:>5}  "
        f"{len(packs)} packs, {samples / len(packs):.1f} samples a pack, "
        f"filled {tokens / len(packs) / pack.length:.3%}, "
        f"{seconds / samples * 1e6:.1f} us a sample, {seconds / len(packs) * 1e3:.3f} ms a pack"
    )
    for world_size in (8, 64):
        _measure_deal(packs, world_size)


def _measure_deal(packs: list, world_size: int) -> None:
    whole = [packs[first : first + 4 * world_size] for first in range(0, len(packs), 4 * world_size)]
    ratios, came, seconds = [], [], 0.0
    for step in whole[:-1]:
        start = time.perf_counter()
        hands = deal(step, world_size, 1)
        seconds += time.perf_counter() - start
        loads = [sum(pack.cost for batch in hand for pack in batch) for hand in hands]
        ratios.append(max(loads) / np.mean(loads))
        loads = [sum(pack.cost for pack in step[rank::world_size]) for rank in range(world_size)]
        came.append(max(loads) / np.mean(loads))
    if ratios:
        print(
            f"  {world_size:2} ranks, four packs each: slowest/mean {np.mean(ratios):.3f} dealt by cost "
            f"(worst step {max(ratios):.3f}), {np.mean(came):.3f} as packs come, "
            f"{seconds / len(ratios) * 1e3:.2f} ms a step"
        )


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=30_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--packs-per-step", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sources = tables(args.samples, args.seed)
    _measure(args, sources, PackConfig(length=args.length, buffer=args.buffer))
    for headroom in (1.1, 1.3, 1.6):
        pack = PackConfig(length=args.length, buffer=args.buffer)
        pack.max_slices = math.ceil(headroom * args.length * _per_token(sources, "slices"))
        pack.max_audio_seconds = math.ceil(headroom * args.length * _per_token(sources, "audio_seconds"))
        _measure(args, sources, pack)


if __name__ == "__main__":
    main()
