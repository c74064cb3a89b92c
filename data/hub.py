"""Records of a data set of the Hugging Face hub, or of a folder laid out like one, through `datasets`.

Rows are streamed, and pictures and recordings stay the bytes that the data set holds: they are decoded
when the shards are checked, like all others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from data.download import Patience, ask
from data.formats import extension_of
from data.records import Held, Record
from data.transport import Absent

HUB = "hf:"

PATIENCE = Patience()
"""With the hub, beyond what its own library tries."""

_ABSENT = (404, 410)
_REFUSED = (400, 401, 403)
"""Answers of the hub that are the same however often it is asked."""


def read_hub(source: str, config: str | None, split: str, columns: dict[str, str]) -> Iterator[Record]:
    """Yields the rows of a data set as records. Their media are in `Record.held`.

    Args:
        source: `hf:` and the name of a data set, or a folder.
        config: which of its configurations.
        split: which of its splits.
        columns: for a field of the format, the column to take it from.

    Raises:
        ValueError: there is no such data set, configuration, split or column.
        RuntimeError: it cannot be read any further.
    """
    rows = _open(source, config, split)
    features = rows.features
    if features is None:
        raise ValueError(f"{source}: does not say what its columns hold. Convert it to .jsonl or parquet.")
    if missing := sorted(set(columns.values()) - set(features)):
        raise ValueError(f"--map {missing[0]}: is no column of {source}. Known: {', '.join(features)}.")
    name = os.path.basename(source[len(HUB) :].rstrip("/"))
    number = 0
    try:
        for number, row in enumerate(rows.cast(_undecoded(features))):
            yield _record(row, features, columns, f"{name}/{split}[{number}]")
    except Exception as error:  # `datasets`, the hub and its web client have errors of their own
        advice = "Look at the data set and the network, and start the same command again."
        raise RuntimeError(
            f"{source}: cannot be read after row {number} ({_words(error)}). {advice}"
        ) from error


def _open(source: str, config: str | None, split: str) -> Any:
    import datasets  # it takes a second, and other sources do without

    name = source[len(HUB) :]
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # as above
        where = f"{source}, --config {config}, --split {split}" if config else f"{source}, --split {split}"
        advice = "Check the names and the network."
        raise ValueError(f"{where}: cannot be opened ({_words(error)}). {advice}") from error


def _undecoded(features: Any) -> Any:
    """Returns the features with pictures and recordings as the bytes or paths that they are."""
    import datasets

    if isinstance(features, (datasets.Image, datasets.Audio)):
        # The feature for recordings asks for a decoder even where nothing is decoded; both are stored alike.
        return datasets.Image(decode=False)
    if isinstance(features, dict):
        plain = {name: _undecoded(feature) for name, feature in features.items()}
        return datasets.Features(plain) if isinstance(features, datasets.Features) else plain
    if isinstance(features, list):
        return [_undecoded(feature) for feature in features]
    if isinstance(features, (datasets.List, datasets.LargeList)):
        return type(features)(_undecoded(features.feature))
    return features


def _record(row: dict[str, Any], features: Any, columns: dict[str, str], origin: str) -> Record:
    held: dict[str, Held] = {}
    value = {name: _plain(row[name], feature, held) for name, feature in features.items()}
    value |= {field: value[column] for field, column in columns.items()}
    return Record(value, origin, held=held)


def _plain(value: Any, feature: Any, held: dict[str, Held]) -> Any:
    """Returns a value of a row as JSON has it: media become references to what is put into `held`."""
    import datasets

    if value is None or isinstance(value, (bool, int, float, str)):
        if isinstance(feature, datasets.ClassLabel) and isinstance(value, int) and value >= 0:
            return feature.int2str(value)
        return value
    if isinstance(feature, (datasets.Image, datasets.Audio)):
        return _hold(value, held)
    if isinstance(value, dict):
        known = feature if isinstance(feature, dict) else {}
        return {name: _plain(entry, known.get(name), held) for name, entry in value.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_plain(entry, inner, held) for entry in value]
    return str(value)  # dates and the like: no field of a format, but part of what makes a record


def _hold(value: dict[str, Any], held: dict[str, Held]) -> str | None:
    data, path = value.get("bytes"), value.get("path")
    if data is None:
        if path and "hf://" in path:  # a file of the same data set on the hub
            held[path] = partial(_read_hub_file, path)
        return path
    ending = extension_of(os.path.splitext(path or "")[1] or "bin")
    reference = f"{hashlib.blake2b(data, digest_size=8).hexdigest()}.{ending}"
    held[reference] = lambda: data
    return reference


def _read_hub_file(path: str) -> bytes:
    """Returns a file of the hub.

    Raises:
        Absent: there is no such file.
        RuntimeError: it may not be read, or did not come in spite of all attempts.
    """
    return ask(path, partial(_try_hub_file, path), PATIENCE, moved=lambda: False)


def _try_hub_file(path: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()  # type: ignore[union-attr]
    except Exception as error:  # fsspec, the hub and its web client have errors of their own
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in _REFUSED:
            advice = "Give this machine access to it (HF_TOKEN)."
            raise RuntimeError(f"{path}: the hub refuses it ({_words(error)}). {advice}") from error
        # No other ValueError: the hub's library raises one where it cannot read what an answer of 503 says.
        if status in _ABSENT or isinstance(error, FileNotFoundError):
            raise Absent(_words(error)) from error
        raise OSError(_words(error)) from error


def _words(error: Exception) -> str:
    """Returns an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
