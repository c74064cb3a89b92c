"""Run on every rank by test_nonfinite.py, on a real engine: a good step, one poisoned on one rank, one
above its limit, and that once more without a limit; then back to a checkpoint after a further step."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from data.collate import collate
from data.sample import IGNORE, EncodedSample
from tests.train.launching import SMALL
from tests.train.test_compose import config_of
from train.backends import build_engine
from train.checkpoint import copy_weights
from train.engine import start_engine
from train.model.initial import RandomWeights
from train.model.omni import meta_model
from train.rollback import roll_back
from train.saver import Saver
from train.spikes import GradientNorms


def sample(number: int, *, poisoned: bool) -> EncodedSample:
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, 2000, 60).astype(np.int32)
    labels = tokens.copy()
    labels[:20] = IGNORE
    mel = rng.normal(size=(32, 20)).astype(np.float32)
    if poisoned:
        mel[3, 3] = np.nan
    return EncodedSample(
        f"k{number}", "source", "audio", tokens, labels, clips=[mel], clip_tokens=[5], clip_starts=[2]
    )


def held(engine) -> dict[str, torch.Tensor]:
    found = {}
    for fragment in engine.trained_fragments():
        for kind, tensor in fragment.tensors.items():
            found[f"{kind}/{fragment.name}/{fragment.start}"] = tensor.clone()
    return found


def main(zero: str, precision: str, out: str) -> None:
    config = config_of(
        *SMALL, f"zero={zero}", f"precision={precision}", "train.packs_per_step=2", "optim.lr=1e-3"
    )
    accelerator = start_engine(config)
    model = meta_model(config.model, config.media)
    model.set_tuned(config.tuned)
    weights = RandomWeights(model, 0)
    engine = build_engine(config, accelerator, model)
    copy_weights(engine, weights)
    results = []
    for step, number, limit in ((1, 1, math.inf), (2, 2, math.inf), (3, 3, 1e-9), (4, 3, math.inf)):
        before = held(engine)
        steps_before = engine.optimizer_steps()
        poisoned = step == 2 and engine.rank == engine.world_size - 1
        batch = collate(
            [[sample(number * 10 + engine.rank, poisoned=poisoned)]], 256, config.media, 0, "token"
        )
        with engine.micro_batch(last=True):
            loss, _ = engine.forward(batch)
            engine.backward(loss / 80)
        result = engine.step(limit)
        after = held(engine)
        unchanged = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in after)
        same_weights = all(torch.equal(before[k], after[k]) for k in before if k.startswith("weight/"))
        results.append(
            {
                "applied": result.applied,
                "finite_norm": bool(np.isfinite(result.grad_norm)),
                "norms": [result.grad_norm, *result.module_norms.values()],
                "unchanged": unchanged,
                "same_weights": same_weights,
                "counted": engine.optimizer_steps() - steps_before,
            }
        )
    results.append(go_back(engine, Path(out), lambda: update(engine, config, 90)))
    Path(f"{out}.{engine.rank}").write_text(json.dumps(results))
    engine.close()


def update(engine, config, number: int) -> list[float]:
    """Makes an update and returns its loss and norm."""
    batch = collate([[sample(number + engine.rank, poisoned=False)]], 256, config.media, 0, "token")
    with engine.micro_batch(last=True):
        loss, _ = engine.forward(batch)
        engine.backward(loss / 80)
    return [float(loss.detach()), engine.step().grad_norm]


def go_back(engine, folder: Path, make_update) -> dict:
    """Saves, goes on, goes back and on again: the same, on an engine that is at work."""
    saver = Saver(engine, folder, engine.config.checkpoint)
    saver.save(4, {"gradient_norms": [1.0, 2.0]})
    saver.finish()
    saved = held(engine)
    first = make_update()
    norms = GradientNorms(None)
    found = roll_back(engine, folder, 5, norms)
    after = held(engine)
    same = saved.keys() == after.keys() and all(torch.equal(saved[name], after[name]) for name in saved)
    return {
        "found": found is not None and roll_back(engine, folder, 4, norms) is None,
        "same": same and list(norms.applied) == [1.0, 2.0],
        "counted": engine.optimizer_steps(),
        "again": make_update() == first,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
