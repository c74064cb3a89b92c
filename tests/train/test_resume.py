"""Killed at any moment and started again, a run ends as if it had never been killed."""

import contextlib
import json
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch

from tests.train.launching import ROOT, SMALL, Finished, command, environment, launch

WORDS = (*SMALL, "train.steps=12", "train.packs_per_step=2", "optim.lr=1e-3", "checkpoint.every=3")


def kill_at(folder, step: int, words, processes: int) -> None:
    """Starts a run and sends SIGKILL to all of its processes once `step` is in its metrics."""
    metrics = folder / "metrics.jsonl"
    kill_when(lambda: metrics.is_file() and metrics.read_text().count("\n") >= step, folder, words, processes)


def kill_when(happened, folder, words, processes: int) -> None:
    """Starts a run and sends SIGKILL to all of its processes once something has happened."""
    process = subprocess.Popen(
        command(folder, words, processes),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not happened():
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    # A launcher's ranks are in process groups of their own.
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def last_checkpoint(run) -> int:
    return max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("zero", "processes"),
    [
        pytest.param("none", 1, marks=pytest.mark.slow),
        ("zero2", 2),
        pytest.param("zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_bit_equal_to_one_never_killed(tmp_path, mixed_shards, zero, processes):
    words = (*WORDS, f"data.path={mixed_shards}", f"zero={zero}")
    whole = launch(tmp_path / "whole", *words, processes=processes)
    kill_at(tmp_path / "killed", 5, words, processes)
    assert not (tmp_path / "killed" / "final").exists()
    assert 3 <= last_checkpoint(tmp_path / "killed") < 12
    again = launch(tmp_path / "killed", *words, processes=processes)
    assert "Goes on after step" in again.output
    assert again.losses == whole.losses and again.grad_norms == whole.grad_norms
    assert [record["step"] for record in again.records] == list(range(1, 13))
    left, right = again.weights(), whole.weights()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_an_end_during_an_evaluation_costs_no_step_and_no_number(tmp_path, mixed_shards):
    words = (*WORDS, f"data.path={mixed_shards}", "data.holdout=0.3", "train.steps=6", "eval.every=3")
    words = (*words, "eval.samples=10", "eval.max_new_tokens=8")
    whole = launch(tmp_path / "whole", *words)
    for step in (3, 6):  # after the save, and long before the answers
        saved = tmp_path / "killed" / "checkpoints" / f"step-{step:08d}" / "manifest.json"
        kill_when(saved.is_file, tmp_path / "killed", words, 1)
        assert Finished(tmp_path / "killed", 0, "").records[-1]["step"] == step - 1
    again = launch(tmp_path / "killed", *words)
    assert "Goes on after step 6" in again.output
    assert [record["step"] for record in again.records] == [*range(1, 7)]
    assert again.losses == whole.losses and again.stage["weights_digest"] == whole.stage["weights_digest"]
    for mine, other in zip(again.records, whole.records):
        assert mine.get("held_out") == other.get("held_out")
    assert again.stage["evaluation"] == whole.stage["evaluation"] != {}
    assert again.stage["metrics"] == whole.stage["metrics"]


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_other_ranks_and_another_zero_stage(tmp_path, mixed_shards):
    words = (*WORDS, f"data.path={mixed_shards}")
    whole = launch(tmp_path / "whole", *words, "zero=none")
    kill_at(tmp_path / "run", 4, (*words, "zero=zero3"), 2)
    between = last_checkpoint(tmp_path / "run")
    again = launch(tmp_path / "run", *words, "zero=zero2", "data.workers=1", "train.micro_batch_packs=2")
    assert f"Goes on after step {between}" in again.output
    assert again.losses == pytest.approx(whole.losses, rel=1e-5)
    assert again.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path, text_shards):
    words = (*WORDS, f"data.path={text_shards}", "train.steps=400", "checkpoint.every=1000")
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder, words, 1), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "asked to stop; saved" in output
    saved = last_checkpoint(folder)
    assert saved == Finished(folder, 0, "").records[-1]["step"] < 400


def test_a_complete_run_says_so_and_another_config_is_refused(tmp_path, text_shards):
    words = (*SMALL, f"data.path={text_shards}", "train.steps=2", "train.packs_per_step=2")
    first = launch(tmp_path / "run", *words)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = launch(tmp_path / "run", *words)
    assert first.code == again.code == 0 and "already complete" in again.output
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    other = launch(tmp_path / "run", *words, "optim.lr=3e-4", code=2)
    assert "optim.lr: 0.0005 there, 0.0003 now" in other.output
    never = launch(tmp_path / "run", *words, "resume=never", code=2)
    assert "resume=never starts afresh in an empty folder only" in never.output


def test_a_stage_starts_from_its_parent_and_refuses_a_wrong_one(tmp_path, picture_shards, text_shards):
    few = ("train.steps=2", "train.packs_per_step=2")
    align = (*SMALL, *few, "recipe=vision_align", "data.tags=[]", f"data.path={picture_shards}")
    parent = launch(tmp_path / "align", *align)
    tune = (*SMALL, *few, "recipe=vision_tune", "data.tags=[]", f"data.path={picture_shards}")
    child = launch(tmp_path / "tune", *tune, f"init_from={tmp_path}/align")
    assert child.stage["parent"]["stage"] == "vision_align"
    assert child.stage["parent"]["weights_digest"] == parent.stage["weights_digest"]
    frozen = [name for name in parent.weights() if name.startswith(("llm.", "audio."))]
    (tmp_path / "tune" / "final").rename(tmp_path / "tune" / "before")
    facts = tmp_path / "align" / "final" / "stage.json"
    digest = parent.stage["weights_digest"]
    facts.write_text(facts.read_text().replace(digest, "0" * 32))
    changed = launch(tmp_path / "tune", *tune, f"init_from={tmp_path}/align", code=2)
    assert f"holds other weights than {tmp_path}/tune was started from: {digest[:12]} then" in changed.output
    facts.write_text(facts.read_text().replace("0" * 32, digest))
    (tmp_path / "tune" / "before").rename(tmp_path / "tune" / "final")
    left, right = parent.weights(), child.weights()
    assert frozen and all(torch.equal(left[name], right[name]) for name in frozen)
    # The first loss is what the parent would have: not what random weights give.
    assert child.losses[0] < launch(tmp_path / "random", *tune).losses[0]
    wrong = launch(
        tmp_path / "wrong", *SMALL, *few, f"data.path={text_shards}", f"init_from={tmp_path}/align", code=2
    )
    assert f"init_from={tmp_path}/align: is the result of vision_align" in wrong.output
    bigger = launch(tmp_path / "bigger", *tune, "model.llm.layers=3", f"init_from={tmp_path}/align", code=2)
    assert "model.llm.layers: 2 there, 3 now" in bigger.output
    assert not (tmp_path / "bigger" / "final").exists()


@pytest.mark.slow
def test_a_frozen_module_comes_through_a_bf16_stage_without_changing_by_one_bit(tmp_path, picture_shards):
    words = (*SMALL, "train.steps=2", "train.packs_per_step=2", "data.tags=[]", f"data.path={picture_shards}")
    bf16 = (*words, "zero=zero2", "precision=bf16")
    parent = launch(tmp_path / "align", *bf16, "recipe=vision_align").weights()
    tune = (*bf16, "recipe=vision_tune", "tune_vision_proj=false", f"init_from={tmp_path}/align")
    child = launch(tmp_path / "tune", *tune).weights()
    resampler = [name for name in parent if name.startswith("vision.resampler.")]
    assert resampler and all(torch.equal(parent[name], child[name]) for name in resampler)
    assert any(not torch.equal(parent[name], parent[name].bfloat16().float()) for name in resampler)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_with_its_reason_and_the_one_before_is_used(tmp_path, mixed_shards):
    words = (*WORDS, f"data.path={mixed_shards}", "train.steps=6")
    run = launch(tmp_path / "run", *words)
    losses, weights = run.losses, run.weights()
    shutil.rmtree(run.folder / "final")
    last = run.folder / "checkpoints" / "step-00000006"
    broken = last / "rank-00000.safetensors"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1  # its size stays
    broken.write_bytes(content)
    again = launch(run.folder, *words, "zero=zero2", processes=2)
    assert f"{broken}: other bytes than were written" in again.output
    assert (run.folder / "checkpoints" / "damaged-step-00000006").is_dir()
    assert "Goes on after step 3" in again.output
    assert [record["step"] for record in again.records] == list(range(1, 7))
    assert again.losses == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(weights[name], mine, atol=1e-6) for name, mine in again.weights().items())
    shutil.rmtree(run.folder / "final")
    for step, name in ((3, "state.json"), (6, "manifest.json")):
        (run.folder / "checkpoints" / f"step-{step:08d}" / name).unlink()
    for _ in range(2):  # nor does the next start begin from the first step in silence
        none = launch(run.folder, *words, code=2)
        assert "no whole checkpoint is left; damaged-step-00000003, damaged-step-00000006" in none.output


def test_old_checkpoints_go_and_a_half_written_one_is_never_taken(tmp_path, text_shards):
    words = (
        *SMALL,
        f"data.path={text_shards}",
        "train.packs_per_step=2",
        "checkpoint.every=1",
        "checkpoint.keep=2",
        "checkpoint.keep_every=2",
    )
    partial = tmp_path / "run" / "checkpoints" / ".partial-step-00000009"  # of a save that was killed
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text("{}")
    run = launch(tmp_path / "run", *words, "train.steps=5", "log.samples=true")
    kept = sorted(path.name for path in (run.folder / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    assert not list((run.folder / "checkpoints").glob(".*"))
    assert all(record["save_seconds"] > 0 for record in run.records)
    lines = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert sum(len(line["samples"]) for line in lines) == run.stage["samples"]["good"]
    assert "RANDOM WEIGHTS" in run.output


def test_the_ledger_and_planner_state_in_a_checkpoint_are_small_json(tmp_path, mixed_shards):
    run = launch(
        tmp_path / "run", *SMALL, f"data.path={mixed_shards}", "train.steps=2", "train.packs_per_step=2"
    )
    state = run.folder / "checkpoints" / "step-00000002" / "state.json"
    assert state.stat().st_size < 64_000
    assert json.loads(state.read_text())["step"] == 2
