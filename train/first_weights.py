"""Where the weights of a stage come from before its first step. Imports no torch, so that a folder that
does not fit is refused at once.

A stage starts from an earlier run (`init_from`), from a release folder (`model.weights`), from parts in
transformers' own layouts (`model.parts`), or from nothing. Whatever it is becomes one `FirstWeights`: which
stored tensor every weight is read from, and which weights are drawn. `train/weights.py` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.folder import differences
from train.model.shapes import Shapes, release_shapes
from train.parent import FITS_ANYWAY, read_parent
from train.parts import LAYOUTS, is_tied, refuse_part
from train.release import read_release
from train.stored import Stored, all_of, fingerprint, read_result, stored_in
from train.tensor_files import TensorFiles, read_tensor_files

WORDS = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")
"""Tables with a row per word: they may grow, the new rows being the mean of the others."""

PATCH_POSITIONS = "vision.vpm.embeddings.position_embedding.weight"
"""A square table of positions: another size is interpolated."""

PREFIXES = {"llm": "llm.", "vision_encoder": "vision.vpm.", "audio_encoder": "audio.audio."}
"""Names in the model of what a part brings."""

CONNECTOR_WITHIN = ("audio.audio.proj.", "audio.audio.audio_bos_eos_token.")
"""The audio connector lies among the names of its encoder, but in no released encoder."""


ANY_VALUE = (
    "model.name",
    "model.llm.max_positions",
    "media.image.slice_pixels",
    "media.image.max_slices",
    "media.image.max_side_patches",
    "media.audio.window_seconds",
    "media.audio.long_audio",
)
"""What may be otherwise than in a release's config.json, since no weight depends on it."""


@dataclass(slots=True)
class FirstWeights:
    """The first weights of a stage.

    `title` says for people where they come from, `parent` is what stage.json keeps of it. `stored` has
    every weight that is read, by its name in the model; the other `shapes` are drawn. `left_out` names
    stored tensors that the model has no use for.
    """

    title: str
    shapes: Shapes
    parent: dict[str, Any] | None = None
    stored: dict[str, Stored] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str | None:
        """What identifies the weights; None where all are drawn."""
        return self.parent["weights_digest"] if self.parent else None

    @property
    def changed(self) -> list[str]:
        """Weights that are stored with another shape than the model's: to be grown or interpolated."""
        return [name for name, stored in self.stored.items() if stored.shape != self.shapes[name]]

    @property
    def drawn(self) -> list[str]:
        """Weights that are not stored."""
        return [name for name in self.shapes if name not in self.stored]

    def report(self) -> list[str]:
        """Returns for people what is loaded, changed, drawn and left out."""
        lines = [self.title]
        if self.stored:
            lines.append(f"  loaded        {len(self.stored)} tensors")
        if merged := [stored for stored in self.stored.values() if stored.added]:
            lines.append(f"  merged        {len(merged)} of them, with adapters")
        for name in self.changed:
            then, now = self.stored[name].shape, self.shapes[name]
            if name == PATCH_POSITIONS:
                lines.append(f"  interpolated  {name}: {_square(then)} to {_square(now)}")
            else:
                lines.append(f"  grown         {name}: {then[0]} to {now[0]} rows, by the mean of the others")
        if self.stored and self.drawn:
            lines.append(f"  drawn         {_listed(self.drawn)}")
        if self.left_out:
            lines.append(f"  left out      {_listed(self.left_out)}")
        return lines


def is_random(config: RunConfig) -> bool:
    """Returns whether a stage starts from nothing."""
    return config.init_from is None and config.model.weights is None and not config.model.parts.named


def open_first_weights(config: RunConfig) -> FirstWeights:
    """Returns where the weights of a stage come from.

    Raises:
        ValueError: a folder is missing, damaged or of another model; every difference on a line of its own.
    """
    if config.init_from is not None:
        return _from_run(config)
    if config.model.weights is not None:
        return _from_release(config)
    if config.model.parts.named:
        return _from_parts(config)
    title = "RANDOM WEIGHTS: no init_from, model.weights, model.parts or checkpoint, so nothing is known yet."
    return FirstWeights(title, _shapes(config))


def _shapes(config: RunConfig) -> Shapes:
    return release_shapes(config.model, config.media)


def _from_run(config: RunConfig) -> FirstWeights:
    stage = read_parent(config)
    assert stage is not None
    where = f"init_from={config.init_from}"
    found = read_result(Path(str(config.init_from)) / "final", where)
    parent = {"run": config.init_from, "stage": stage["stage"], "weights_digest": stage["weights_digest"]}
    first = FirstWeights(f"Weights of {config.init_from} (stage {stage['stage']}).", _shapes(config), parent)
    return _complete(first, found, (), config, where)


def _from_release(config: RunConfig) -> FirstWeights:
    folder = Path(str(config.model.weights))
    where = f"model.weights={folder}"
    files = read_tensor_files(folder, where)
    _refuse_sizes(config, folder, where)
    parent = {"weights": str(folder), "weights_digest": fingerprint(files.paths)}
    return _complete(
        FirstWeights(f"Weights of {folder}.", _shapes(config), parent), all_of(files), (), config, where
    )


def _refuse_sizes(config: RunConfig, folder: Path, where: str) -> None:
    model, media = read_release(folder)
    theirs = {"model": asdict(model), "media": asdict(media)}
    ours = {"model": asdict(config.model), "media": asdict(config.media)}
    grows = model.llm.vocab < config.model.llm.vocab
    free = (*FITS_ANYWAY, *ANY_VALUE, *(["model.llm.vocab"] if grows else []))
    found = differences(theirs, ours, free)
    if found:
        named = [f"  {path}: {there} there, {now} now" for path, there, now in found]
        raise ValueError(
            "\n".join([f"{where}: holds another model than was asked for. Use the same:", *named])
        )


def _from_parts(config: RunConfig) -> FirstWeights:
    named = config.model.parts.named
    opened: list[TensorFiles] = []
    found: dict[str, Stored] = {}
    problems: list[str] = []
    for part, folder in named.items():
        try:
            opened.append(_open_part(part, Path(folder), config))
            found |= _as_ours(part, opened[-1], f"model.parts.{part}={folder}")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    title = f"Weights of parts: {', '.join(f'{part} of {folder}' for part, folder in named.items())}."
    digest = fingerprint(path for files in opened for path in files.paths)
    first = FirstWeights(title, _shapes(config), {"parts": named, "weights_digest": digest})
    used = {(stored.folder, stored.name) for stored in found.values()}
    first.left_out = [n for files in opened for n in files.shapes if (files.folder, n) not in used]
    brought = tuple(PREFIXES[part] for part in named)
    others = [n for n in first.shapes if not n.startswith(brought) or n.startswith(CONNECTOR_WITHIN)]
    return _complete(first, found, others, config, "model.parts")


def _open_part(part: str, folder: Path, config: RunConfig) -> TensorFiles:
    where = f"model.parts.{part}={folder}"
    files = read_tensor_files(folder, where)
    if refused := refuse_part(part, folder, config.model, config.media, where):
        raise ValueError("\n".join(refused))
    return files


def _as_ours(part: str, files: TensorFiles, where: str) -> dict[str, Stored]:
    names = LAYOUTS[part].names(list(files.shapes), where)
    table, head = WORDS
    if part == "llm" and head not in names and is_tied(files.folder, where):
        names[head] = names[table]
    return {ours: stored_in(files, theirs) for ours, theirs in names.items()}


def _complete(
    first: FirstWeights, found: dict[str, Stored], drawn: Iterable[str], config: RunConfig, where: str
) -> FirstWeights:
    """Returns `first` with every weight found in its place.

    Raises:
        ValueError: a weight is missing, not known or of another shape, and nobody said that it may be.
    """
    may_lack = (*config.model.fresh, *drawn)
    problems = [
        f"model.fresh: {start!r} begins no weight's name. Name weights as {WORDS[1]}, or a common beginning."
        for start in config.model.fresh
        if not any(name.startswith(start) for name in first.shapes)
    ]
    first.stored = {
        name: found[name] for name in first.shapes if name in found and not name.startswith(may_lack)
    }
    missing = [name for name in first.drawn if not name.startswith(may_lack)]
    if missing:
        problems.append(
            f"{where}: lacks {_listed(missing)}. Copy it again, or name them in model.fresh to draw them."
        )
    strange = [stored.name for name, stored in found.items() if name not in first.shapes]
    first.left_out += strange
    unwanted = [name for name in strange if not name.startswith(tuple(config.model.ignore))]
    if unwanted:
        problems.append(
            f"{where}: holds {_listed(unwanted)}, which the model has no place for. "
            "Use the model that it was made for, or name them in model.ignore."
        )
    problems += [_refuse_shape(first, name, where) for name in first.changed if not _may_change(first, name)]
    if problems:
        raise ValueError("\n".join(problems))
    return first


def _may_change(first: FirstWeights, name: str) -> bool:
    then, now = first.stored[name].shape, first.shapes[name]
    if len(then) != len(now) or then[1:] != now[1:]:
        return False
    return (name in WORDS and then[0] < now[0]) or (
        name == PATCH_POSITIONS and math.isqrt(then[0]) ** 2 == then[0]
    )


def _refuse_shape(first: FirstWeights, name: str, where: str) -> str:
    stored = first.stored[name]
    return (
        f"{where}: {stored.name} has shape {list(stored.shape)}, the model's is {list(first.shapes[name])}. "
        "Use the model that it was made for."
    )


def _square(shape: tuple[int, ...]) -> str:
    return f"{math.isqrt(shape[0])} x {math.isqrt(shape[0])}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensors ({', '.join(names[:3])}{more})" if len(names) > 1 else names[0]
