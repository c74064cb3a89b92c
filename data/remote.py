"""Remote sources: which shards a URL stands for, and their indexes, brought to this machine at the start."""

from __future__ import annotations

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.config import DataConfig
from data.download import Patience, ask, fetch_bytes
from data.index import UNFINISHED, FolderIndex, check_formats, load_folder
from data.scan import index_path
from data.shard_cache import ShardCache
from data.shard_index import ShardIndex, version_note
from data.transport import Absent, describe_version, list_store
from data.urls import PIPE, expand, index_url, is_remote, names_shards, problem_of, shard_name, shown

CONNECTIONS = 16
"""Indexes that are asked for at the same time."""


class _Place(NamedTuple):
    """A shard, its name here, and the version of its index where a listing told it."""

    url: str
    name: str
    version: str | None = None


def load_source(path: str, config: DataConfig) -> FolderIndex:
    """Returns the index of a folder of shards, or of a remote source whose shards go to `data.cache`.

    Raises:
        ValueError: it is missing, empty or unfinished, or a shard has no valid index.
        RuntimeError: a store does not answer.
    """
    if not is_remote(path):
        return load_folder(path)
    assert config.cache, "a config without a cache for its remote sources"
    cache = ShardCache(os.path.abspath(config.cache), int(config.cache_gib * 2**30))
    folder = load_remote(path, cache)
    check_room([folder], config.shuffle_shards, config.cache_gib)  # before its tokens are counted
    return folder


def load_remote(path: str, cache: ShardCache) -> FolderIndex:
    """Returns the index of a remote source; raises like `load_source`."""
    places = _find_shards(path, cache.patience)
    try:
        folder = cache.make_place(path)
        cache.check_disk()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            shards = list(pool.map(partial(_load_shard, folder, cache.patience), places))
    except OSError as error:
        raise ValueError(
            f"data.cache={cache.folder}: cannot be used ({error.strerror or error}). "
            "Free some space, or name a folder that you may write to."
        ) from error
    check_formats(shards)
    return FolderIndex(path, shards, cache)


def room_needed(folders: list[FolderIndex], shuffle_shards: int) -> int:
    """Returns the bytes of the largest two windows of every remote source: what a run keeps in the cache."""
    needed: dict[str, int] = {}
    for folder in folders:
        if (
            folder.cache
        ):  # one that is trained on and evaluated on is read in two places, but it is there once
            sizes = sorted((shard.num_bytes for shard in folder.shards), reverse=True)
            window = sum(sizes[: 2 * shuffle_shards])
            needed[folder.path] = min(needed.get(folder.path, 0) + window, sum(sizes))
    return sum(needed.values())


def check_room(folders: list[FolderIndex], shuffle_shards: int, cache_gib: float) -> None:
    """Raises ValueError where the cache is too small for what is read at a time."""
    needed = room_needed(folders, shuffle_shards) / 2**30
    if needed > cache_gib:
        raise ValueError(
            f"data.cache_gib={cache_gib:g}: the remote shards of two windows have {needed:.3g} GiB, and are "
            f"needed at a time. Use at least {_rounded_up(needed)}, or lower data.shuffle_shards."
        )


def _rounded_up(gib: float) -> str:
    return f"{gib * 1.01:.3g}" if gib < 10 else f"{int(gib) + 1}"


def fetch_counts(folder: FolderIndex, fingerprint: str, files: dict[int, Path]) -> None:
    """Brings token counts, one file per shard, from beside the shards, if somebody has put them there.

    That spares the first run reading all shards once. What cannot be had is left out.
    """
    assert folder.cache, "a folder that is not remote"
    patience = replace(folder.cache.patience, attempts=2)

    def fetch(shard: int) -> bool:
        index = folder.shards[shard]
        if index.url.startswith(PIPE):
            return False
        name = files[shard].name.replace(index.name, shard_name(index.url))
        beside = f"{index.url.rpartition('/')[0]}/.counts/{fingerprint}/{name}"
        try:
            content = fetch_bytes(beside, patience)
        except (Absent, RuntimeError):
            return False
        _write(files[shard], content)
        return True

    first, *others = files
    if fetch(first):
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(fetch, others))


def _find_shards(path: str, patience: Patience) -> list[_Place]:
    if problem := problem_of(path):
        raise ValueError(f"{shown(path)}: {problem}")
    if names_shards(path):
        return _name(expand(path))
    found = _ask(path, partial(list_store, path, patience.stall_seconds), patience)
    if UNFINISHED in found:
        raise ValueError(
            f"{shown(path)}: was not finished. Run `python -m data.prepare` again, and upload it."
        )
    tars = sorted(name for name in found if name.endswith(".tar"))
    if not tars:
        raise ValueError(f"{shown(path)}: holds no .tar shards. Check the URL.")
    base = path.rstrip("/")
    places = [_Place(f"{base}/{name}", name, found.get(index_path(name))) for name in tars]
    for place in places:
        if place.version is None:
            raise ValueError(_no_index(place.url))
    return places


def _name(urls: list[str]) -> list[_Place]:
    """Gives shards the names that they have, numbered where those of several folders repeat."""
    names = [shard_name(url) for url in urls]
    if len(set(names)) < len(names):
        names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
    return [_Place(url, name) for url, name in zip(urls, names)]


def _load_shard(folder: Path, patience: Patience, place: _Place) -> ShardIndex:
    """Returns the index of a shard, fetched if it is not here in its present version."""
    shard = folder / place.name
    index, url = Path(index_path(str(shard))), index_url(place.url)
    note = version_note(index)
    try:
        version = place.version
        if version is None:
            version = _ask(url, partial(describe_version, url, patience.stall_seconds), patience)
        if not (version and index.is_file() and note.is_file() and note.read_text() == version):
            _write(index, fetch_bytes(url, patience))
            _write(note, version.encode())
    except Absent as error:
        raise ValueError(f"{_no_index(place.url)} ({error})") from error
    try:
        return ShardIndex(str(shard), place.url)
    except ValueError as error:
        note.unlink(missing_ok=True)
        raise ValueError(f"{shown(url)}: {error}") from error


def _ask(url, question, patience: Patience):
    return ask(url, question, patience, moved=lambda: False)


def _no_index(url: str) -> str:
    return (
        f"{shown(url)}: has no index beside it, {index_path(shard_name(url))}. "
        "Run `python -m data.index` where the shards were made, and upload the indexes too."
    )


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
