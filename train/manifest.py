"""What makes a checkpoint whole: a manifest with the size and digest of every file, written last.

A checkpoint is written beside its final name and renamed when it is complete; what later proves to be
damaged is set aside under a name that nobody takes for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.weights import sync

VERSION = 3
MANIFEST = "manifest.json"
DAMAGED = "damaged-"
PARTIAL = ".partial-"
"""Begins the names of folders that nobody takes for a checkpoint, and that the next start removes."""

FileFacts = dict[str, dict[str, Any]]
"""Size and digest of files, by name."""


def file_facts(path: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, facts: dict[str, Any], files: FileFacts) -> None:
    """Writes the manifest of a folder whose other files are on the disk already."""
    content = {"version": VERSION, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": _digest(content)}))
    sync(folder / MANIFEST)
    sync(folder)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class DamagedError(ValueError):
    """A file of a checkpoint is not as it was written. The message names it and says how.

    A file that cannot be read says nothing of what it holds: that stays an OSError.
    """


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
        DamagedError: it is not as it was written.
        ValueError: another version of this program wrote it.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("sha256", None)
        version = content["version"]
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: cannot be read ({error})") from error
    if digest != _digest(content) and (digest or version == VERSION):  # version 1 had none
        raise DamagedError(f"{path}: other bytes than were written")
    if version != VERSION:
        raise ValueError(
            f"{folder}: checkpoint version {version}, this program reads {VERSION}. "
            "Resume it with the program that wrote it."
        )
    return content


def check_files(folder: Path, names: Iterable[str], files: FileFacts) -> None:
    """Raises DamagedError at the first of `names` that is not as the manifest has it."""
    for name in names:
        path, then = folder / name, files[name]
        try:
            now = file_facts(path)
        except FileNotFoundError:
            raise DamagedError(f"{path}: missing") from None
        if now["size"] != then["size"]:
            raise DamagedError(f"{path}: {now['size']} bytes long, but {then['size']} bytes were written")
        if now != then:
            raise DamagedError(f"{path}: other bytes than were written")


def check_checkpoint(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Raises DamagedError where a file of share number `share` of a checkpoint is not as it was written."""
    files = read_manifest(folder)["files"]
    check_files(folder, sorted(files)[share::shares], files)


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns every checkpoint in `folder`, newest first. Each was complete when it got its name."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name)), reverse=True)


def newest_checkpoint(folder: Path, before: int | None = None) -> Path | None:
    """Returns the newest checkpoint in `folder`, of those from before a step if one is given, or None."""
    found = (path for path in checkpoints_in(folder) if before is None or step_of(path) < before)
    return next(found, None)


def step_of(checkpoint: Path) -> int:
    """Returns the step after which a checkpoint was made."""
    return int(checkpoint.name.rpartition("-")[2])


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that nobody takes it for a whole one; returns its new path."""
    aside = checkpoint.with_name(DAMAGED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def damaged_folders(folder: Path) -> list[Path]:
    """Returns the checkpoints that were set aside."""
    return sorted(folder.glob(f"{DAMAGED}step-*"))


def remove_partial(folder: Path) -> None:
    """Removes what a save, or the removal of an old checkpoint, left behind when it was killed."""
    for stale in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(stale, ignore_errors=True)
