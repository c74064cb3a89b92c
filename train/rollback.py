"""Takes a run whose steps fail one after the other back to earlier weights, and on with other data.

As PaLM's training did (arXiv 2204.02311, section 5.1): the batches at which it failed are not fed again.
"""

from __future__ import annotations

from pathlib import Path

from train.checkpoint import PieceReader, open_newest, restore_checkpoint
from train.engine import Engine
from train.spikes import GradientNorms

MAX_ROLLBACKS = 3
"""How often a run goes back before it ends."""


def roll_back(engine: Engine, checkpoints: Path, before: int, norms: GradientNorms) -> PieceReader | None:
    """Gives weights, moments and norms of the newest whole checkpoint from before a step to all ranks.

    Returns its reader; None where there is none.
    """
    reader = open_newest(engine, checkpoints, before)
    if reader is not None:
        restore_checkpoint(engine, reader)
        norms.restore(reader.state["gradient_norms"])
    return reader
