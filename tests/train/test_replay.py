"""A step that is run again does what it did in the run."""

import json
import subprocess
import sys

import pytest

from tests.train.launching import ROOT, SMALL, environment, launch

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
