"""Takes a run whose steps fail one after the other back to earlier weights, and on with other data.

As PaLM's training did (arXiv 2204.02311, section 5.1): the batches at which it failed are not fed again.
"""

from __future__ import annotations

from pathlib import Path

from train.checkpoint import PieceReader, restore_checkpoint
from train.engine import Engine
from train.manifest import complete_folders, step_of
from train.spikes import GradientNorms

MAX_ROLLBACKS = 3
"""How often a run goes back before it ends."""


def roll_back(engine: Engine, checkpoints: Path, before: int, norms: GradientNorms) -> Path | None:
    """Gives weights, moments and norms of the newest checkpoint from before a step to all ranks.

    Returns it; None where there is none.
    """
    found = [folder for folder in complete_folders(checkpoints) if step_of(folder) < before]
    chosen: Path | None = engine.gather_objects(found[0] if found else None)[0]
    if chosen is not None:
        reader = PieceReader(chosen)
        restore_checkpoint(engine, reader)
        norms.restore(reader.state.get("gradient_norms", []))
    return chosen
