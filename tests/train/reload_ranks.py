"""Run on every rank by test_topology.py: loads a checkpoint into an engine and saves it again, untrained."""

import sys
from pathlib import Path

from tests.train.switching import SWITCH_STEP
from tests.train.test_compose import composed
from train.backends import build_engine
from train.checkpoint import open_newest, restore_checkpoint
from train.compose import to_run_config
from train.engine import start_engine
from train.model.omni import meta_model
from train.saver import Saver


def main(folder: str, out: str, *words: str) -> None:
    config = to_run_config(composed("data.path=somewhere", *words))
    accelerator = start_engine(config)
    model = meta_model(config.model, config.media)
    model.set_tuned(config.tuned)
    engine = build_engine(config, accelerator, model)
    reader = open_newest(engine, Path(folder))
    assert reader is not None
    restore_checkpoint(engine, reader)
    saver = Saver(engine, Path(out), config.checkpoint)
    saver.save(SWITCH_STEP, reader.state)
    saver.finish()
    saver.close()
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
