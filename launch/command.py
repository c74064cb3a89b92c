"""The command line that runs one stage."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.request import Request
from launch.stages import Stage
from train.compose import ROOT


def stage_command(request: Request, stage: Stage) -> list[str]:
    """Returns what starts a stage: `train.py` itself for one process, else through accelerate.

    Port 0 is a free one: a fixed port would clash with whatever else runs on the machine.
    """
    script = [_near(ROOT / "train.py"), *stage.words]
    if request.accelerate is None:
        return [sys.executable, *script]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", _near(request.accelerate), "--main_process_port", "0"]
    if request.num_processes is not None:
        launcher += ["--num_processes", str(request.num_processes)]
    return [*launcher, *script]


def _near(path: Path) -> str:
    """Returns a path as short as can be from here."""
    return min(str(path), os.path.relpath(path), key=len)
