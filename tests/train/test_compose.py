"""Recipes compose, and bad ones are refused with every mistake named."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from train.compose import readable_errors, register, reword, to_run_config, to_yaml
from train.config import RunConfig, all_problems
from train.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "configs/model").glob("*.yaml"))
TUNED = {
    "demo_text": {"llm"},
    "demo_vision": {"vision_encoder"},
    "demo_audio": {"audio_encoder"},
    "vision_align": {"vision_proj"},
    "vision_tune": {"vision_encoder", "vision_proj"},
    "audio_align": {"audio_proj"},
    "audio_tune": {"audio_encoder", "audio_proj"},
    "omni_sft": {"vision_encoder", "vision_proj", "llm", "audio_encoder", "audio_proj"},
}


def composed(*words: str):
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("run", [*words])


def config_of(*words: str) -> RunConfig:
    return to_run_config(composed("data.path=somewhere", *words))


def mistakes(*words: str) -> list[str]:
    with pytest.raises(ValueError) as error:
        config_of(*words)
    return str(error.value).splitlines()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_with_every_model(recipe, model):
    data = "data=demo" if recipe.startswith("demo_") else "data=folder"
    config = config_of(f"recipe={recipe}", f"model={model}", data)
    assert config.stage == recipe and config.model.name == model
    assert {name for name, on in config.tuned.items() if on} == TUNED[recipe]
    assert config.run == f"runs/{recipe}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_opens_with_an_experiment_card(recipe):
    card = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    for word in ("Trains", "Data", "Command", "Hardware", "Expect"):
        assert f"# {word}" in card


def test_the_command_line_wins_over_model_and_recipe():
    config = config_of(
        "recipe=omni_sft", "model=tiny", "optim.lr=1e-4", "tune_llm=false", "data.pack.length=512"
    )
    assert config.optim.lr == 1e-4 and not config.tune_llm and config.data.pack.length == 512


def test_a_recipe_can_start_from_another():
    register()
    mine = {"defaults": ["omni_sft", "_self_"], "stage": "mine", "optim": {"lr": 5e-6}, "tune_llm": False}
    ConfigStore.instance().store(name="mine", group="recipe", node=OmegaConf.create(mine), package="_global_")
    config = config_of("recipe=mine")
    assert (config.stage, config.run, config.optim.lr) == ("mine", "runs/mine", 5e-6)
    assert not config.tune_llm and config.tune_audio_proj


def test_a_model_size_sets_what_suits_it():
    tiny, full = config_of("model=tiny"), config_of("model=megrez_3b_omni")
    assert tiny.data.pack.length < full.data.pack.length == 4096
    assert tiny.optim.lr > full.optim.lr == 1e-5
    assert full.media.image.slice_pixels == 448 and tiny.media.image.slice_pixels == 112


def test_three_mistakes_are_named_together_each_on_its_own_line():
    lines = mistakes("optim.lr=-1", "data.pack.length=100", "tune_llm=false", "optim.module_lr.llm=1e-5")
    assert sorted(line.split("=")[0] for line in lines) == [
        "data.pack.length",
        "optim.lr",
        "optim.module_lr.llm",
    ]


def test_a_bad_recipe_is_refused_without_importing_torch():
    code = (
        "import sys; sys.argv = ['train.py', 'data.path=x', 'optim.lr=-1']\n"
        "import runpy\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "optim.lr=-1.0: must be above 0. Use 1e-5 for omni_sft, 1e-3 for a connector."
    ]


@pytest.mark.parametrize(
    ("words", "start", "hint"),
    [
        (["optm.lr=1"], "optm", "Did you mean 'optim'?"),
        (["optim.lrr=1"], "optim.lrr", "Did you mean 'optim.lr'?"),
        (["optim.lr=abc"], "optim.lr", "Float"),
        (["zero=zero5"], "zero", "zero3_offload"),
        (["recipe=omni_stf"], "recipe='omni_stf'", "Did you mean 'omni_sft'?"),
        (["model=tinny"], "model='tinny'", "Did you mean 'tiny'?"),
        (["data=foldr"], "data='foldr'", "Did you mean 'folder'?"),
        (["optim.module_lr.lm=1"], "optim.module_lr.lm", "optim.module_lr.llm"),
    ],
)
def test_hydras_errors_are_reworded_with_the_nearest_name(words, start, hint):
    with pytest.raises(Exception) as error:
        composed("data.path=x", *words)
    text = reword(error.value)
    assert text.startswith(start) and hint in text and len(text.splitlines()) == 1


def test_a_missing_path_is_named():
    with pytest.raises(Exception) as error:
        to_run_config(composed())
    assert "data.path: it is not set" in (str(error.value) + reword(error.value))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["recipe=vision_align", "tune_vision_proj=false"], "every module is frozen"),
        (["train.steps=1", "train.epochs=1"], "train.steps=1: train.epochs=1.0 is set too"),
        (["train.packs_per_step=6", "train.micro_batch_packs=4"], "train.micro_batch_packs=4: must divide"),
        (["recipe=vision_align", "optim.module_lr.llm=1e-5"], "optim.module_lr.llm=1e-05: llm is frozen"),
        (["data.pack.length=8192"], "data.pack.length=8192: longer than"),
        (["data.holdout=1.5"], "data.holdout=1.5: must be"),
        (["checkpoint.keep=0"], "checkpoint.keep=0: must be at least 1"),
        (
            ["checkpoint.every=50", "checkpoint.keep_every=120"],
            "checkpoint.keep_every=120: must be a multiple of checkpoint.every=50. Use 150.",
        ),
        (["media.image.patch_pixels=0"], "media.image.patch_pixels=0: must be"),
        (["model.llm.kv_heads=7"], "model.llm.kv_heads=7: must divide"),
        (["recipe=vision_align", "model.recompute.vision_encoder=true"], "keeps no activations"),
        (["eval.every=-1"], "eval.every=-1: must not be negative"),
        (["optim.lr=nan"], "optim.lr=nan: must be above 0"),
        (["optim.clip=inf"], "optim.clip=inf: must be above 0"),
        (["optim.decay=0.2"], "optim.decay=0.2: is for optim.schedule=wsd only"),
        (["optim.schedule=constant", "optim.min_factor=0.1"], "optim.min_factor=0.1: a constant schedule"),
    ],
)
def test_a_mistake_is_named_with_its_path(words, line):
    assert any(line in found for found in mistakes(*words))


def test_every_config_in_the_tree_reports_problems_and_a_sound_one_has_none():
    config = config_of("model=tiny")
    assert all_problems(config) == []
    count = 0

    def walk(node):
        nonlocal count
        count += 1
        assert isinstance(node.problems(), list)
        for entry in dataclasses.fields(node):
            if dataclasses.is_dataclass(getattr(node, entry.name)):
                walk(getattr(node, entry.name))

    walk(config)
    assert count > 15


def test_config_keys_are_a_known_list():
    # A new key is a promise to users: add it to the golden file on purpose.
    golden = ROOT / "tests/train/config_keys.txt"
    keys = sorted(_keys(OmegaConf.to_container(OmegaConf.structured(config_of("model=tiny")))))
    assert "\n".join(keys) + "\n" == golden.read_text()


def _keys(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict) and value and name not in ("sources", "held_out"):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_a_folder_with_another_config_is_refused_with_every_difference(tmp_path):
    first = config_of("model=tiny", f"run={tmp_path}/r", "optim.lr=1e-3", "seed=1")
    folder = RunFolder(first)
    folder.check(first)
    folder.create(first)
    folder.check(first)
    moved = config_of(
        "model=tiny", f"run={tmp_path}/r", "optim.lr=1e-3", "seed=1", "zero=zero3", "log.every=1"
    )
    RunFolder(moved).check(moved)
    other = config_of("model=tiny", f"run={tmp_path}/r", "optim.lr=2e-3", "seed=2")
    with pytest.raises(ValueError) as error:
        RunFolder(other).check(other)
    assert "optim.lr: 0.001 there, 0.002 now" in str(error.value) and "seed: 1 there, 2 now" in str(
        error.value
    )
    never = config_of("model=tiny", f"run={tmp_path}/r", "optim.lr=1e-3", "seed=1", "resume=never")
    with pytest.raises(ValueError, match="resume=never"):
        RunFolder(never).check(never)


def test_yaml_of_a_config_composes_to_itself(tmp_path):
    config = config_of("recipe=vision_tune", "model=tiny")
    again = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(to_yaml(config)))
    )
    assert again == config


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(28, "No space left on device", "x"), 2), (OSError(5, "Input/output error", "x"), 1)],
)
def test_a_disk_that_failed_in_passing_is_no_mistake_of_a_person(error, status, capsys):
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err == f"x: {error.strerror}. Mend it and start again.\n"
