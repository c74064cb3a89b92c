"""Held-out loss: of samples that never train, the same for any number of ranks."""

import pytest

from tests.train.launching import SMALL, launch

WORDS = (*SMALL, "train.steps=4", "train.packs_per_step=2", "optim.lr=1e-3", "eval.every=2", "log.every=4")


def test_held_out_loss_is_logged_when_due_and_does_not_depend_on_ranks(tmp_path, mixed_shards):
    words = (*WORDS, f"data.path={mixed_shards}", "data.holdout=0.3")
    alone = launch(tmp_path / "alone", *words)
    assert [record["step"] for record in alone.records] == [1, 2, 4]
    assert "held_out" not in alone.records[0]
    first, last = (record["held_out"] for record in alone.records[1:])
    assert set(first) == {"loss", "loss_by_source", "loss_by_modality", "samples", "bad_samples"}
    assert first["samples"] > 5 and first["bad_samples"] == 0
    assert last["loss"] < first["loss"]
    assert alone.stage["metrics"]["held_out"] == last
    spread = launch(tmp_path / "spread", *words, "zero=zero3", processes=2)
    for ours, theirs in zip(spread.records[1:], alone.records[1:]):
        assert ours["held_out"]["loss"] == pytest.approx(theirs["held_out"]["loss"], rel=1e-5)
        for kind in ("loss_by_source", "loss_by_modality"):
            assert ours["held_out"][kind] == pytest.approx(theirs["held_out"][kind], rel=1e-5)


def test_evaluating_changes_nothing_of_the_training(tmp_path, text_shards):
    words = (
        *SMALL,
        f"data.path={text_shards}",
        "data.holdout=0.3",
        "train.steps=4",
        "train.packs_per_step=2",
    )
    often = launch(tmp_path / "often", *words, "eval.every=1")
    never = launch(tmp_path / "never", *words, "eval.every=0")
    assert often.losses == never.losses and often.grad_norms == never.grad_norms
    assert "held_out" in never.records[-1] and "held_out" not in never.records[0]


def test_sources_for_evaluation_only_and_weighted_sources_are_reported_by_name(
    tmp_path, mixed_shards, text_shards, picture_shards
):
    mine = tmp_path / "configs" / "data" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(
        "# @package data\n"
        "sources:\n"
        f"  texts: {{path: {text_shards}, weight: 1}}\n"
        f"  mixed: {{path: {mixed_shards}, weight: 3}}\n"
        f"held_out: {{pictures: {{path: {picture_shards}}}}}\n"
    )
    words = (*WORDS, "data=mine", "train.steps=8", f"--config-dir={tmp_path}/configs")
    run = launch(tmp_path / "run", *words)
    last = run.records[-1]
    assert set(last["loss_by_source"]) == {"texts", "mixed"} and set(last["held_out"]["loss_by_source"]) == {
        "pictures"
    }
    assert last["drawn"]["mixed"] > last["drawn"]["texts"] > 0
