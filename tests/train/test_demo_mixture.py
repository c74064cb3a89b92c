"""`recipe=omni_sft data=demo` packs full rows of all modalities, in the shares that its weights say."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from data.counts import build_tables
from data.demo.build import Options, build
from train.compose import register, to_run_config
from train.data import build_encoder, build_planner

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """The packs of `STEPS` steps, and the weight of every source."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    build(str(folder), Options(scale=0.02), workers=2)
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = ["recipe=omni_sft", "model=tiny", "data=demo", f"data.path={folder}"]
        config = to_run_config(compose("run", words))
    encoder = build_encoder(config)
    tables = build_tables(
        config.data,
        config.media,
        encoder,
        split="train",
        cost=lambda lengths, patches, frames: np.ones(len(lengths)),
        takes=lambda modality: True,
    )
    planner = build_planner(config, tables, epochs=None)
    planned = [pack for _ in range(STEPS) for pack in planner.next_step().packs]
    return planned, {name: source.weight for name, source in config.data.sources.items()}, config


def test_rows_are_full(packs):
    planned, _, config = packs
    assert sum(pack.length for pack in planned) / (len(planned) * config.data.pack.length) >= 0.995


def test_most_rows_hold_every_modality(packs):
    def modality(source: str) -> str:
        if source in ("text", "spoken_question"):
            return source
        return "audio" if source.startswith(("asr", "spoken")) else "image"

    full = [len({modality(ref.source) for ref in pack.refs}) == 4 for pack in packs[0]]
    assert sum(full) > len(full) / 2


def test_sources_are_drawn_by_their_weights(packs):
    planned, weights, _ = packs
    drawn = Counter(ref.source for pack in planned for ref in pack.refs)
    for name, weight in weights.items():
        share = drawn[name] / drawn.total()
        assert share == pytest.approx(weight / sum(weights.values()), rel=0.01, abs=2 / drawn.total()), name
