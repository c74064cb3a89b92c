"""A run goes on with other ranks, ZeRO stage, loader workers or micro-batch as if nothing had changed."""

import math
import subprocess

import pytest
import torch

from tests.train.launching import ROOT, SMALL, command, environment
from tests.train.switching import (
    BOUND,
    PAIR,
    SPREAD,
    SWITCH_STEP,
    SWITCHES,
    Runs,
    Topology,
    difference,
    read_table,
    write_table,
)
from train.checkpoint import PieceReader
from train.fragments import MOMENTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mixed_shards):
    return Runs(tmp_path_factory.mktemp("switches"), mixed_shards)


def test_the_page_tells_every_switch_and_each_is_within_the_bound():
    told = read_table()
    assert list(told) == list(SWITCHES)
    for name, value in told.items():
        assert value == 0 if "bit-equal" in name else value <= BOUND, name


@pytest.mark.slow
def test_twenty_steps_after_every_switch_have_the_losses_of_an_uninterrupted_run(runs, request):
    measured = {}
    for name, (before, after) in SWITCHES.items():
        run, whole = runs.switched(before, after), runs.whole(before)
        measured[name] = difference(run, whole)
        print(f"{name}: {measured[name]:.1e}", flush=True)
        if before == after:
            assert run.losses == whole.losses and run.grad_norms == whole.grad_norms
            left, right = run.weights(), whole.weights()
            assert all(torch.equal(left[key], right[key]) for key in right)
    assert max(measured.values()) <= BOUND, measured
    if request.config.getoption("--write-tables"):
        write_table(measured)


@pytest.mark.slow
@pytest.mark.parametrize("before", [PAIR, SPREAD], ids=lambda before: f"{before.zero}-{before.ranks}")
@pytest.mark.parametrize(
    "after",
    [Topology("none", 1), Topology("none", 2), Topology("zero1", 2), Topology("zero2", 1), PAIR, SPREAD],
    ids=lambda after: f"{after.zero}-{after.ranks}",
)
def test_weights_and_optimizer_state_of_every_parameter_survive_a_switch_bit_for_bit(
    tmp_path, runs, before, after
):
    name = f"step-{SWITCH_STEP:08d}"
    whole = runs.whole(before).folder / "checkpoints"
    source = tmp_path / "source"
    source.mkdir()
    (source / name).symlink_to(whole / name)
    words = command(tmp_path, (*SMALL, *after.words, "train.packs_per_step=4"), after.ranks)
    script = words.index("train.py")
    words[script : script + 2] = ["-m", "tests.train.reload_ranks", str(source), str(tmp_path / "again")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert (tmp_path / "again" / name).is_dir(), done.stderr[-3000:]
    theirs, ours = PieceReader(source / name), PieceReader(tmp_path / "again" / name)
    assert ours.manifest["optimizer_steps"] == theirs.manifest["optimizer_steps"] == SWITCH_STEP
    assert ours.shapes == theirs.shapes
    held = {(kind, name) for kind, name in theirs._pieces if kind in ("weight", *MOMENTS)}
    assert held <= ours._pieces.keys()
    for kind, name in held:
        count = math.prod(theirs.shapes[name])
        left, right = (reader.read(kind, name, 0, count) for reader in (ours, theirs))
        assert torch.equal(left, right), (kind, name)
