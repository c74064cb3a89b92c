"""The process that loader workers are forked from, which must run the same code as its rank."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

CODE = Path(__file__).resolve().parent.parent


def worker_context() -> ForkServerContext:
    """Returns the context that starts workers, with its forkserver running.

    A forkserver looks for what it imports in the folder it is started in, whatever `sys.path` its rank
    has, and workers keep what it imported. A job runs a copy of the code, in the folder it was submitted
    from; so the forkserver starts where this code is. Workers go back to the rank's folder by themselves.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.preload"])
    here = os.getcwd()
    os.chdir(CODE)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
    return context
