"""A stage that starts from a released folder, on every engine; what it leaves, and its way out again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data.tokenizer import copy_tokenizer, load_tokenizer
from tests.train.launching import SMALL, launch
from train.compose import compose_words
from train.export.folder import export
from train.export.origin import read_source
from train.export.request import read_request
from train.model.initial import RandomWeights
from train.model.omni import meta_model
from train.parent import released_folder
from train.release import release_config
from train.weights import WeightReader, write_weights

STEPS = ("train.steps=3", "train.packs_per_step=4", "optim.lr=1e-3", "recipe=vision_align", "data.tags=[]")


class Bf16:
    """Random weights as a release stores them."""

    def __init__(self, config):
        self.random = RandomWeights(meta_model(config.model, config.media), 7)
        self.shapes = self.random.shapes

    def names(self):
        return sorted(self.shapes)

    def read(self, *place):
        return self.random.read(*place).bfloat16()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A released folder of the small size in several shards, with a file of its own."""
    folder = tmp_path_factory.mktemp("hub") / "release"
    folder.mkdir()
    config = compose_words([*SMALL, "data.path=x"])
    write_weights(Bf16(config), folder, shard_bytes=200_000)
    special = load_tokenizer(None).special
    ids = {"eos_token_id": special("<|turn_end|>"), "pad_token_id": special("<|pad|>")}
    (folder / "config.json").write_text(
        json.dumps(release_config(config.model, config.media, **ids, dtype="bfloat16"))
    )
    (folder / "notes.txt").write_text("Goes along.\n")
    copy_tokenizer(None, folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, release, mixed_shards):
    """The same stage in one plain process and on two ranks of ZeRO-3."""
    folder = tmp_path_factory.mktemp("runs")
    words = (*SMALL, *STEPS, f"data.path={mixed_shards}", f"model.weights={release}")
    return {
        zero: launch(folder / zero, *words, f"zero={zero}", processes=processes)
        for zero, processes in (("none", 1), ("zero3", 2))
    }


def test_every_engine_starts_from_the_same_weights(runs, release):
    for run in runs.values():
        assert f"Weights of {release}." in run.output and "RANDOM WEIGHTS" not in run.output
    assert runs["zero3"].losses == pytest.approx(runs["none"].losses, rel=1e-5)
    assert runs["zero3"].grad_norms == pytest.approx(runs["none"].grad_norms, rel=1e-5)


def test_what_is_frozen_stays_as_it_was_released(runs, release):
    stored = WeightReader(release)
    for run in runs.values():
        for name, weight in run.weights().items():
            same = torch.equal(weight, stored.read("weight", name, 0, weight.numel()))
            assert same != name.startswith("vision.resampler."), name


def test_the_stage_says_where_it_began_and_carries_its_tokenizer(runs, release):
    stage = runs["zero3"].stage
    assert stage["release"] == str(release)
    assert stage["parent"]["weights"] == str(release) and stage["parent"]["weights_digest"]
    assert (runs["zero3"].folder / "final" / "tokenizer.json").is_file()
    words = [*SMALL, "data.path=x", "recipe=vision_tune", f"init_from={runs['zero3'].folder}"]
    assert released_folder(compose_words(words)) == str(release)


def test_an_export_takes_the_files_of_the_release_along(runs, release, tmp_path):
    words = [f"run={runs['zero3'].folder}", f"out={tmp_path}/out", "format=megrez"]
    export(read_request(words))
    assert (tmp_path / "out" / "notes.txt").read_text() == "Goes along.\n"
    assert (tmp_path / "out" / "config.json").read_bytes() == (release / "config.json").read_bytes()
    stored, written = WeightReader(release), WeightReader(tmp_path / "out")
    assert written.shapes == stored.shapes
    name = "llm.model.layers.0.mlp.up_proj.weight"
    size = torch.Size(stored.shapes[name]).numel()
    assert torch.equal(written.read("weight", name, 0, size), stored.read("weight", name, 0, size))


def test_a_release_that_is_gone_is_named(runs, tmp_path):
    run = Path(shutil.copytree(runs["none"].folder, tmp_path / "run"))
    stage = json.loads((run / "final" / "stage.json").read_text())
    (run / "final" / "stage.json").write_text(json.dumps(stage | {"release": "nowhere"}))
    with pytest.raises(ValueError, match="descends from nowhere, which is gone"):
        read_source([f"run={run}"])
