"""Config node `data`: sources, packing, template, limits. Never imports torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from enum import Enum

from data.urls import is_remote, problem_of, shown


class Oversize(Enum):
    """What happens to a sample longer than a row."""

    error = "error"
    drop = "drop"
    truncate = "truncate"


class AudioText(Enum):
    """What happens to text beside a clip in one message (some corpora keep the transcript there)."""

    append = "append"
    drop = "drop"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One folder of shards, or their URL (see data/urls.py).

    `weight` is its share of drawn samples; without weights, `epochs` counts.
    """

    path: str = "???"
    weight: float | None = None
    epochs: float = 1.0
    tags: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = []
        for name, value in (("weight", self.weight), ("epochs", self.epochs)):
            if value is not None and value <= 0:
                found.append(f"{name}={value}: must be above 0. Remove the source instead.")
            elif value is not None and not math.isfinite(value):
                found.append(f"{name}={value}: must be a finite number. Use 1.")
        if self.weight is not None and self.epochs != 1.0:
            found.append(f"epochs={self.epochs}: weight={self.weight} decides already. Set one of them.")
        if is_remote(self.path) and (problem := problem_of(self.path)):
            found.append(f"path={shown(self.path)}: {problem}")
        return found


@dataclass(kw_only=True, slots=True)
class PackConfig:
    """How samples are laid into rows. `max_slices` and `max_audio_seconds` bound a pack's media."""

    length: int = 4096
    buffer: int = 128
    oversize: Oversize = Oversize.error
    max_slices: int | None = None
    max_audio_seconds: float | None = None

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = []
        if self.length < 64 or self.length % 64:
            nearest = max(64, -(-self.length // 64) * 64)
            found.append(f"length={self.length}: must be a multiple of 64. Use {nearest}.")
        if not 1 <= self.buffer <= 4096:
            found.append(f"buffer={self.buffer}: must be between 1 and 4096. Use 128.")
        if self.max_slices is not None and self.max_slices < 1:
            found.append(f"max_slices={self.max_slices}: must be at least 1. Use null for no bound.")
        if self.max_audio_seconds is not None and self.max_audio_seconds <= 0:
            found.append(
                f"max_audio_seconds={self.max_audio_seconds}: must be above 0. Use null for no bound."
            )
        return found


RELEASED_SYSTEM = "你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。"
"""System turn of the released model where a conversation has none."""


@dataclass(kw_only=True, slots=True)
class TemplateConfig:
    """Chat template options. `slice_start` and `slice_end` are token strings around a tile block.

    `system` is the turn put before a conversation that has none ("": nothing is); null takes that of the
    tokenizer folder's own template, else the released one. `check` reads that template and compares it
    with ours.
    """

    system: str | None = None
    check: bool = True
    audio_text: AudioText = AudioText.append
    slice_start: str = ""
    slice_end: str = ""

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        if bool(self.slice_start) != bool(self.slice_end):
            return ["slice_start: set without its partner. Set both slice_start and slice_end, or neither."]
        return []


@dataclass(kw_only=True, slots=True)
class LimitsConfig:
    """What one sample may ask of a worker; beyond it, it is dropped with a cause."""

    image_pixels: int = 100_000_000
    image_bytes: int = 64 * 2**20
    audio_seconds: float = 1800.0
    audio_bytes: int = 256 * 2**20
    parts: int = 256
    text_bytes: int = 2_000_000

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        return [
            f"{name}={getattr(self, name)}: must be above 0. Use a positive number."
            for name in ("image_pixels", "image_bytes", "audio_seconds", "audio_bytes", "parts", "text_bytes")
            if getattr(self, name) <= 0
        ]


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Everything about data. `path` is for one folder (see configs/data/folder.yaml).

    `holdout` keeps that share of every training source for evaluation, chosen by key hash; `held_out`
    names sources that are for evaluation only. `cache` is a folder of this machine for the shards of
    remote sources, at most `cache_gib` of them, and for token counts.
    """

    path: str | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    held_out: dict[str, SourceConfig] = field(default_factory=dict)
    holdout: float = 0.0
    tags: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    cache: str | None = None
    cache_gib: float = 64.0
    shuffle_shards: int = 16
    workers: int = 2
    prefetch: int = 4
    timeout_seconds: float = 300.0
    max_bad_share: float = 0.05
    pack: PackConfig = field(default_factory=PackConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = []
        if not self.sources:
            found.append("sources: there is none. Use data=folder data.path=DIR, or name some.")
        if not 0.0 <= self.holdout < 1.0:
            found.append(f"holdout={self.holdout}: must be at least 0 and below 1. Use 0.02.")
        if not 0.0 <= self.max_bad_share <= 1.0:
            found.append(f"max_bad_share={self.max_bad_share}: must be between 0 and 1. Use 0.05.")
        if self.shuffle_shards < 1:
            found.append(f"shuffle_shards={self.shuffle_shards}: must be at least 1. Use 16.")
        if self.workers < 0:
            found.append(f"workers={self.workers}: must not be negative. Use 0 to load in the rank itself.")
        if self.prefetch < 1:
            found.append(f"prefetch={self.prefetch}: must be at least 1. Use 4.")
        if self.timeout_seconds <= 0:
            found.append(f"timeout_seconds={self.timeout_seconds}: must be above 0. Use 300.")
        if not (self.cache_gib > 0 and math.isfinite(self.cache_gib)):
            found.append(f"cache_gib={self.cache_gib}: must be a finite number above 0. Use 64.")
        remote = [source.path for source in (self.sources | self.held_out).values() if is_remote(source.path)]
        if remote and not self.cache:
            found.append(
                f"cache=null: {shown(remote[0])} is remote, so its shards need a folder on this machine. "
                "Set it to one with data.cache=DIR."
            )
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            missing = sorted(set(self.sources) - set(weighted))
            found.append(
                f"sources.{missing[0]}.weight=null: others have a weight. Give every source one, or none."
            )
        return found + trained_on(self.held_out, self.sources)


def trained_on(held_out: dict[str, SourceConfig], sources: dict[str, SourceConfig]) -> list[str]:
    """Returns which held-out sources take samples of training sources, one line each.

    Two sources of the same folder are apart only by tags that they do not share.
    """
    return [
        f"held_out.{name}.path={shown(held.path)}: source {other!r} trains on this folder, so this would "
        "evaluate on training samples. Give both of them tags and no tag to both, or use data.holdout."
        for name, held in held_out.items()
        for other, source in sources.items()
        if os.path.realpath(held.path) == os.path.realpath(source.path)
        and not (held.tags and source.tags and set(held.tags).isdisjoint(source.tags))
    ]
