"""Run on every rank by test_counting.py: counts the tokens of a source in its turn, as a run does."""

import sys
from pathlib import Path

from accelerate import Accelerator

from data import count_cache
from data.config import SourceConfig
from tests.data.corpus import data_config, tables_of
from tests.train.test_compose import config_of
from train.backends import DDPEngine
from train.engine import Engine


def main(source: str, cache: str, notes: str) -> None:
    """Writes a line into `notes` for every shard that this rank counts, and for the end."""
    engine = DDPEngine.__new__(DDPEngine)  # without a model
    Engine.__init__(engine, config_of("model=tiny"), Accelerator(cpu=True))
    count = count_cache.count_shard

    def note(folder, shard, encoder):
        with Path(notes).open("a") as file:
            file.write(f"rank {engine.rank} shard {shard}\n")
        return count(folder, shard, encoder)

    count_cache.count_shard = note
    config = data_config(cache=cache)
    config.sources["x"] = SourceConfig(path=source)
    with engine.main_first():
        tables = tables_of(config)
    prints = engine.gather_objects(tables.fingerprint)
    assert len(set(prints)) == 1
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
