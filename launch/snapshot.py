"""A copy of the code that a job runs, so that what is edited later does not change it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from train.compose import ROOT

COPIED = ("train.py", "train", "data", "launch", "configs", "recipes", "pyproject.toml")
"""All that a run needs. It is copied as it lies there, committed or not."""


def copy_code(folder: Path) -> None:
    """Copies the code into a new folder."""
    folder.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def describe_code() -> str:
    """Returns which commit the code is, where git knows; `changed` says that something is not committed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=, changed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else ""
