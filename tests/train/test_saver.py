"""A checkpoint holds what was there when it was asked for, whatever happens while it is written."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.train.launching import SMALL
from tests.train.test_compose import config_of
from train.backends import DDPEngine
from train.checkpoint import PieceReader, copy_weights, open_newest, restore_checkpoint
from train.manifest import checkpoints_in, step_of
from train.model.initial import RandomWeights
from train.model.omni import meta_model
from train.saver import Saver


@pytest.fixture
def engine():
    config = config_of(*SMALL, "train.packs_per_step=1", "zero=none", "optim.lr=1e-3")
    model = meta_model(config.model, config.media)
    model.set_tuned(config.tuned)
    # All that a lone process asks accelerate for.
    alone = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    engine = DDPEngine(config, alone, model)
    copy_weights(engine, RandomWeights(model, 0))
    engine.start_moments(3)
    return engine


def held(engine) -> dict[str, torch.Tensor]:
    return {
        f"{kind}/{fragment.name}": tensor.clone()
        for fragment in engine.trained_fragments()
        for kind, tensor in fragment.tensors.items()
    }


def shake(engine) -> None:
    """Changes all weights and moments in place, as an update does."""
    for fragment in engine.trained_fragments():
        for tensor in fragment.tensors.values():
            tensor.add_(1.0)


@pytest.mark.parametrize("background", [True, False])
def test_training_on_while_it_is_written_changes_nothing_in_it(tmp_path, engine, background):
    engine.config.checkpoint.background = background
    saver = Saver(engine, tmp_path, engine.config.checkpoint)
    shake(engine)
    before = held(engine)
    path = saver.save(7, {"step": 7})
    assert path.exists() or background
    shake(engine)
    saver.finish()
    saver.close()
    reader = open_newest(engine, tmp_path)
    assert reader is not None and reader.folder == path and reader.state == {"step": 7}
    assert reader.manifest["optimizer_steps"] == 3
    restore_checkpoint(engine, reader)
    after = held(engine)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_last_ones_stay_and_some_for_good(tmp_path, engine):
    engine.config.checkpoint.keep = 2
    engine.config.checkpoint.keep_every = 20
    saver = Saver(engine, tmp_path, engine.config.checkpoint)
    for step in (10, 20, 30, 40, 50, 60, 70):
        saver.save(step, {})
    saver.finish()
    saver.close()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [70, 60, 40, 20]
    assert not list(tmp_path.glob(".*"))


def test_an_old_one_that_cannot_be_removed_is_told_and_the_new_one_is_complete(tmp_path, engine, capsys):
    engine.config.checkpoint.keep = 1
    saver = Saver(engine, tmp_path, engine.config.checkpoint)
    (tmp_path / ".partial-old-step-00000001" / "something").mkdir(parents=True)  # in the way of its removal
    saver.save(1, {})
    saver.save(2, {})
    saver.finish()
    saver.close()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [2, 1]
    assert "step-00000001: could not be removed: Directory not empty" in capsys.readouterr().out


def test_going_back_forgets_what_came_after(tmp_path, engine):
    saver = Saver(engine, tmp_path, engine.config.checkpoint)
    for step in (1, 2):
        saver.save(step, {})
    saver.finish()
    saver.forget_after(1)
    saver.close()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [1]
    assert not list(tmp_path.glob(".*"))


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path, engine):
    saver = Saver(engine, tmp_path, engine.config.checkpoint)
    saver.save(5, {"try": 1})
    shake(engine)
    path = saver.save(5, {"try": 2})
    saver.finish()
    saver.close()
    assert PieceReader(path).state == {"try": 2}
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_write_that_failed_is_told_at_the_next_chance_and_leaves_the_older_ones(tmp_path, engine):
    saver = Saver(engine, tmp_path, engine.config.checkpoint)
    first = saver.save(1, {})
    saver.finish()
    (tmp_path / ".partial-step-00000002").write_text("in the way")
    saver.save(2, {})
    with pytest.raises(RuntimeError, match=r"step-00000002: the checkpoint could not be written: .*exists"):
        saver.save(3, {})
    saver.close()
    assert checkpoints_in(tmp_path) == [first]
    assert json.loads((first / "manifest.json").read_text())["step"] == 1
