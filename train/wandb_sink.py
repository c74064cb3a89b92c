"""Weights & Biases: the only file that imports wandb.

One run keeps one identity over all its resumes: `RUN/wandb_id.txt`. Offline, every session writes
its own `RUN/wandb/offline-run-*-ID` folder; `wandb sync RUN/wandb/offline-run-*` joins them.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import Error as WandbError

INIT_SECONDS = 60


class WandbSink:
    """Logs flattened records (`loss_by_source/coco`) against their own step.

    If the server cannot be reached in online mode, that is said and the session is logged offline.
    """

    def __init__(self, folder: Path, mode: str, project: str, config: dict[str, Any] | None = None):
        self._options = {
            "id": run_id(folder),
            "name": folder.name,
            "project": project,
            "dir": str(folder),
            "config": config or {},
            "resume": "allow",
        }
        self._run = self._online() if mode == "online" else self._offline()
        # wandb's own step never goes back, but a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def _online(self):
        try:
            settings = wandb.Settings(init_timeout=INIT_SECONDS)
            return wandb.init(mode="online", settings=settings, **self._options)
        except WandbError as error:
            wandb.teardown()
            print(
                f"log.wandb=online: {error}. This session is logged offline; later run "
                f"`wandb sync {self._options['dir']}/wandb/offline-run-*`.",
                file=sys.stderr,
            )
            return self._offline()

    def _offline(self):
        return wandb.init(mode="offline", **self._options)

    def write(self, record: dict[str, Any]) -> None:
        """Logs one record; values that are None are left out."""
        self._run.log({name: value for name, value in flatten(record) if value is not None})

    def close(self) -> None:
        """Finishes the session."""
        self._run.finish()


def run_id(folder: Path) -> str:
    """Returns the identity kept in `wandb_id.txt`, made at first use."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (`loss_by_source/coco`, value) for every leaf of a nested record."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
