"""Steps whose gradient is too large change nothing, are kept, and lead back to earlier weights."""

import json
import math
import re

import pytest

from data.index import load_folder
from data.scan import build_index
from tests.records import KINDS, prepare, write_records
from tests.train.launching import SMALL, launch
from tests.train.test_compose import config_of
from tests.train.test_replay import replay
from tests.train.test_resume import kill_at
from train.spikes import GradientNorms

FACTOR = 1.05
"""So low that ordinary noise is above it every other time."""


def test_a_limit_needs_twenty_norms_and_forgets_old_ones():
    norms = GradientNorms(3.0)
    norms.applied.extend([1.0] * 19)
    assert norms.limit() == math.inf
    norms.applied.append(1.0)
    assert norms.limit() == 3.0
    norms.applied.extend([2.0] * 100)
    assert norms.limit() == 6.0 and len(norms.applied) == 100
    assert GradientNorms(None).limit() == math.inf
    again = GradientNorms(3.0)
    again.restore(json.loads(json.dumps(list(norms.applied))))
    assert again.limit() == norms.limit()


def test_a_factor_that_skips_every_other_step_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"optim\.spike_factor=1\.0: must be above 1\. Use 10, or null"):
        config_of("optim.spike_factor=1.0")


@pytest.mark.slow
def test_a_run_goes_back_and_on_and_comes_to_the_same_when_killed_afterwards(tmp_path):
    data = prepare(write_records(tmp_path / "records", [*KINDS] * 12), tmp_path / "shards")
    words = (*SMALL, f"data.path={data}", "train.packs_per_step=2", "train.steps=60")
    words = (*words, "optim.lr=1e-2", "optim.schedule=constant")  # restless: some norms are above the limit
    words = (*words, "checkpoint.every=1", "checkpoint.keep=100", f"optim.spike_factor={FACTOR}")
    words = (*words, "train.max_skipped_steps=2", "train.on_spikes=rollback")
    whole = launch(tmp_path / "whole", *words, code=None)
    skipped = [int(step) for step in re.findall(r"step (\d+): gradient norm .* is above", whole.output)]
    back = re.findall(
        r"step (\d+): 2 steps in a row changed nothing; goes on with (\S+)\.$", whole.output, re.M
    )
    assert whole.code in (0, 2) and skipped and back
    for step, folder in back:
        assert int(step) in skipped and int(step) - 1 in skipped
        assert int(folder[-8:]) < int(step) - 2
    # Nor is any weight tried again that failed: those from where it went back to where it did that.
    gone = [range(int(folder[-8:]), int(step)) for step, folder in back]
    assert not [
        folder
        for number, (_, folder) in enumerate(back)
        for steps in gone[:number]
        if int(folder[-8:]) in steps
    ]
    assert whole.code == 0 or "It went back 3 times." in whole.output

    kept = sorted(path.name for path in (whole.folder / "spikes").iterdir())
    assert kept == [f"step-{step:08d}" for step in skipped][-20:]
    spike = json.loads((whole.folder / "spikes" / kept[-1] / "spike.json").read_text())
    assert spike["grad_norm"] > spike["limit"] > 0 and all(line["finite"] for line in spike["samples"])
    tar = whole.folder / "spikes" / kept[-1] / "shard-000000.tar"
    build_index(str(tar), "native", config_of().data.limits)
    keys = load_folder(str(tar.parent)).shards[0].keys
    assert [keys[line["row"]] for line in spike["samples"]] == [
        f"{line['row']:06d}-{line['key']}" for line in spike["samples"]
    ]

    kill_at(tmp_path / "killed", int(back[0][0]) + 1, words, 1)
    again = launch(tmp_path / "killed", *words, code=None)
    assert "Goes on after step" in again.output and again.code == whole.code
    assert again.losses == whole.losses and again.grad_norms == whole.grad_norms
    assert sorted(path.name for path in (tmp_path / "killed" / "spikes").iterdir()) == kept

    (tmp_path / "shards").rename(tmp_path / "gone")  # a kept step needs no data but its own
    found = json.loads(replay(whole.folder, f"step={int(kept[-1][5:])}", "--json"))
    assert found["samples_from"].endswith(kept[-1])
    assert found["loss"] == pytest.approx(spike["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(spike["grad_norm"], rel=1e-6)
    names = ("source", "shard", "key", "loss")
    assert [[line[name] for name in names] for line in found["samples"]] == [
        [pytest.approx(line[name]) if name == "loss" else line[name] for name in names]
        for line in spike["samples"]
    ]
