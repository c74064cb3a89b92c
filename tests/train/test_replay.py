"""A step that is run again does what it did in the run."""

import json
import subprocess
import sys

import pytest

from tests.train.launching import ROOT, SMALL, environment, launch
from tests.train.test_compose import config_of
from train.compose import to_yaml
from train.config import Objective
from train.replay import read_request

WORDS = ("train.steps=6", "train.packs_per_step=4", "train.micro_batch_packs=2", "optim.lr=1e-3")


def replay(run, *words, code: int = 0) -> str:
    """Returns what `train.replay` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "train.replay", f"run={run}", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory, mixed_shards):
    folder = tmp_path_factory.mktemp("replay") / "run"
    return launch(
        folder, *SMALL, *WORDS, f"data.path={mixed_shards}", "checkpoint.every=1", "checkpoint.keep=10"
    )


@pytest.mark.parametrize("step", [1, 5])
def test_loss_and_norms_are_those_of_the_run(ran, step):
    found = json.loads(replay(ran.folder, f"step={step}", "--json"))
    record = ran.records[step - 1]
    assert found["weights_step"] == step - 1 and found["samples_from"] == "the plan"
    assert found["loss"] == pytest.approx(record["loss"], rel=1e-9)
    assert found["grad_norm"] == record["grad_norm"]
    assert found["grad_norm_by_module"] == record["grad_norm_by_module"]
    assert found["logged"] == {"loss": record["loss"], "grad_norm": record["grad_norm"]}
    samples = found["samples"]
    assert sum(line["loss"] * line["supervised"] for line in samples) == pytest.approx(
        found["loss"] * sum(line["supervised"] for line in samples), rel=1e-5
    )
    assert {line["modality"] for line in samples} == {"text", "image", "audio", "image+audio"}
    assert all(line["finite"] and line["shard"].startswith("shard-") for line in samples)


def test_a_run_of_adapters_is_replayed_from_what_it_began_with(tmp_path, mixed_shards):
    words = (f"data.path={mixed_shards}", "train.steps=2", "train.packs_per_step=2", "checkpoint.keep=1")
    run = launch(tmp_path / "run", *SMALL, *words, "lora.rank=2", "lora.modules=[llm]")
    found = json.loads(replay(run.folder, "step=1", "--json"))
    assert found["weights_from"] == "what the run began with"
    assert found["loss"] == pytest.approx(run.losses[0], rel=1e-9)
    assert found["grad_norm"] == run.grad_norms[0]


def test_a_stand_in_task_has_steps_too(tmp_path):
    words = ("recipe=demo_audio", "data=demo", "model=tiny", "data.tokenizer=null", f"run={tmp_path}")
    (tmp_path / "config.yaml").write_text(to_yaml(config_of(*words)))
    asked = read_request([f"run={tmp_path}", "step=3"])
    assert asked.step == 3 and asked.model.config.objective is Objective.ctc


def test_a_damaged_checkpoint_is_refused(ran):
    file = ran.folder / "checkpoints" / "step-00000004" / "state.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    told = replay(ran.folder, "step=5", code=2)
    file.write_bytes(whole)
    assert f"{file}: {len(whole) - 1} bytes long" in told and "it sets step-00000004 aside" in told


def test_older_weights_are_said_to_be_older(ran):
    checkpoint = ran.folder / "checkpoints" / "step-00000004"
    checkpoint.rename(ran.folder / "away")
    shown = replay(ran.folder, "step=5")
    (ran.folder / "away").rename(checkpoint)
    assert f"weights of {ran.folder}/checkpoints/step-00000003" in shown
    assert "The run itself had those of step 4" in shown
    assert shown.count("folder/shard-000000.tar/") == int(shown.split(" samples of the plan")[0].split()[-1])


def test_what_cannot_be_replayed_is_refused(ran):
    assert "step=7: run=" in replay(ran.folder, "step=7", code=2)
    assert "step=x: is no step" in replay(ran.folder, "step=x", code=2)
