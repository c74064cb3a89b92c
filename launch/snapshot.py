"""A copy of the code that a job runs, so that what is edited later does not change it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from train.compose import ROOT

COPIED = ("train.py", "train", "data", "launch", "configs", "recipes", "pyproject.toml")
"""All that a run needs. It is copied as it lies there, committed or not."""

BUILT_IN_TOKENIZER = ROOT / "data" / "assets" / "tokenizer.json"

CODE = (".py", ".yaml", ".toml", ".jinja")
"""Endings of code. Of all else only the built-in tokenizer is copied: shards may lie in these folders too."""


def copy_code(folder: Path) -> None:
    """Copies the code into a new folder."""
    folder.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=_no_code)
        else:
            shutil.copy(ROOT / name, folder / name)


def _no_code(folder: str, names: list[str]) -> list[str]:
    """Returns the names in a folder that are not copied: no code, or links to folders."""
    paths = [Path(folder, name) for name in names]
    return [path.name for path in paths if not _is_code(path)]


def _is_code(path: Path) -> bool:
    if path.is_dir():
        return not path.is_symlink() and path.name != "__pycache__"
    return path.is_file() and (path.suffix in CODE or path == BUILT_IN_TOKENIZER)


def describe_code() -> str:
    """Returns which commit the code is, where git knows; `changed` says that something is not committed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=, changed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else ""
