"""A stage starts only from a run that fits, and a folder goes on only with its own config."""

import json

import pytest
from omegaconf import OmegaConf

from train.compose import compose_words, to_plain, to_yaml
from train.folder import RunFolder
from train.parent import read_parent, refuse_random, tokenizer_digest


def config_of(*words):
    return compose_words(["model=tiny", "data.path=x", *words])


@pytest.fixture
def parent(tmp_path):
    """A finished run of vision_align, as far as it is asked for."""
    config = config_of("recipe=vision_align")
    (final := tmp_path / "align" / "final").mkdir(parents=True)
    facts = {"stage": "vision_align", "tokenizer_digest": tokenizer_digest(config), "weights_digest": "0"}
    (final / "stage.json").write_text(json.dumps(facts))
    (final / "config.yaml").write_text(to_yaml(config))
    return tmp_path / "align"


def mistake(parent, *words) -> str:
    with pytest.raises(ValueError) as error:
        read_parent(config_of("recipe=vision_tune", f"init_from={parent}", *words))
    return str(error.value)


def test_a_parent_that_fits_is_read(parent):
    words = ("recipe=vision_tune", f"init_from={parent}", "model.recompute.llm=true", "model.stage_lr.omni=1")
    found = read_parent(config_of(*words))
    assert found is not None and found["stage"] == "vision_align"
    assert read_parent(config_of()) is None


def test_a_parent_of_another_size_is_refused_with_every_difference(parent):
    text = mistake(parent, "model.llm.width=96", "media.image.queries=4")
    assert text.splitlines() == [
        f"init_from={parent}: holds another model than was asked for. Use the same:",
        "  media.image.queries: 16 there, 4 now",
        "  model.llm.width: 192 there, 96 now",
    ]


def test_a_parent_of_another_stage_is_refused(parent):
    text = mistake(parent, "recipe=audio_tune")
    assert "is the result of vision_align, but audio_tune starts from audio_align, audio_tune." in text


def test_only_where_its_recipe_says_so_a_pipeline_begins_from_random_weights(parent):
    assert not refuse_random(config_of("recipe=vision_align")) + refuse_random(config_of("recipe=demo_text"))
    (line,) = refuse_random(config_of("recipe=audio_align"))
    assert line.startswith(
        "init_from=null: nothing comes before audio_align, which starts from vision_tune and"
    )
    text = mistake(parent, "recipe=vision_align")
    assert "but vision_align starts from random weights, audio_tune, demo_audio." in text


def test_a_parents_folder_may_be_written_in_another_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = config_of(f"run={tmp_path}/run", "init_from=align", "recipe=vision_tune")
    RunFolder(first).create(first)
    RunFolder(first).check(
        config_of(f"run={tmp_path}/run", f"init_from={tmp_path}/align", "recipe=vision_tune")
    )
    other = config_of(f"run={tmp_path}/run", "init_from=other", "recipe=vision_tune")
    with pytest.raises(ValueError, match=r"init_from: \S+/align there, \S+/other now"):
        RunFolder(first).check(other)


def test_a_parent_with_another_tokenizer_is_refused(parent):
    facts = json.loads((parent / "final" / "stage.json").read_text())
    (parent / "final" / "stage.json").write_text(json.dumps({**facts, "tokenizer_digest": "another"}))
    assert "learnt with another tokenizer than data.tokenizer=None" in mistake(parent)


def test_a_missing_or_unfinished_parent_is_refused(parent, tmp_path):
    assert "there is no such folder" in mistake(tmp_path / "nowhere")
    (parent / "final" / "stage.json").unlink()
    assert "its stage is not complete" in mistake(parent)


def test_a_plain_config_is_what_its_yaml_is_read_back_to():
    config = config_of("optim.eps=1e-8", "zero=zero2_offload", "data.tags=[a,b]", "optim.lr=1")
    assert to_plain(config) == OmegaConf.to_container(OmegaConf.create(to_yaml(config)))


def test_lengths_of_other_stages_may_change_and_the_own_one_may_not(tmp_path):
    def of(steps):
        config = config_of(f"run={tmp_path}/run")
        config.train.stage_steps = steps
        return config

    first = of({"omni_sft": 5, "vision_tune": 3})
    RunFolder(first).create(first)
    RunFolder(first).check(of({"omni_sft": 5, "vision_tune": 4}))
    with pytest.raises(ValueError, match=r"train\.stage_steps\.omni_sft: 5 there, 6 now"):
        RunFolder(first).check(of({"omni_sft": 6}))
