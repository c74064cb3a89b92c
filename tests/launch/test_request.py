"""The words of a pipeline's command line, and which stages they make."""

import itertools
from pathlib import Path

import pytest

from launch.command import stage_command
from launch.request import read_request
from launch.stages import compose_stages
from tests.launch.piping import write_pipeline

REPORT = ["vision_align", "vision_tune", "audio_align", "audio_tune", "omni_sft"]
STAND_INS = ["demo_text", "demo_vision", "demo_audio"]


def stages_of(*words, pipeline="megrez_omni"):
    return compose_stages(read_request(str(pipeline), ["model=tiny", *words]))


def mistakes(*words, pipeline="megrez_omni") -> list[str]:
    with pytest.raises(ValueError) as error:
        stages_of(*words, pipeline=pipeline)
    return str(error.value).splitlines()


def test_the_reports_stages_start_each_from_the_one_before():
    stages = stages_of("data.path=x")
    assert [stage.name for stage in stages] == REPORT
    assert [stage.config.init_from for stage in stages] == [
        None,
        *(f"runs/megrez_omni/{name}" for name in REPORT[:-1]),
    ]
    for before, stage in itertools.pairwise(stages):
        assert before.config.stage in stage.config.parents


def test_the_demo_makes_its_stand_ins_first():
    stages = stages_of("data=demo", "runs=runs/demo")
    assert [stage.name for stage in stages] == STAND_INS + REPORT
    assert stages[3].config.init_from == "runs/demo/demo_audio"
    assert all(stage.config.num_steps for stage in stages)


def test_the_command_line_wins_over_the_entry_and_a_stages_own_word_over_both(tmp_path):
    text = "stages: [{recipe: vision_align, overrides: [seed=3, optim.lr=0.5]}, {recipe: vision_tune}]"
    words = ("data.path=x", "seed=4", "vision_tune:seed=5", "init_from=runs/first")
    align, tune = stages_of(*words, pipeline=write_pipeline(tmp_path, text))
    assert (align.config.seed, align.config.optim.lr, tune.config.seed) == (4, 0.5, 5)
    assert align.config.init_from == "runs/first" and tune.config.init_from == "runs/small/vision_align"


def test_a_folder_with_any_name_comes_through(tmp_path):
    folder = str(tmp_path / "it's a (strange), folder=1")
    stages = stages_of("data.path=x", f"runs={folder}")
    assert stages[0].config.run == f"{folder}/vision_align" == stages[1].config.init_from


def test_mistakes_of_all_words_are_named_together():
    words = ["run=x", "++recipe=x", "omni_sft:init_from=x", "foo", "processes=0", "accelerate=gpu"]
    assert mistakes(*words, pipeline="megrez_omin") == [
        "run=x: every stage has a folder of its own. Use runs=FOLDER for all of them.",
        "++recipe=x: the pipeline names the recipes. Use another pipeline.",
        "omni_sft:init_from=x: stages start from the one before. Use init_from=RUN for the first.",
        "foo: is no key=value. Write it as train.steps=100, for example.",
        "pipeline='megrez_omin': there is none of that name. Did you mean 'megrez_omni'? "
        "Known: megrez_omni; or name a .yaml file.",
        "processes=0: must be a whole number above 0. Use 1.",
        "accelerate='gpu': there is none of that name. Did you mean 'gpus'? "
        "Known: cpu2, gpus, nodes, one; or name a .yaml file.",
    ]


def test_mistakes_of_all_stages_are_named_together_with_their_stages():
    lines = mistakes("data.path=x", "optim.lr=-1", "vision_tune:eval.every=-1", "optim.module_lr.llm=1e-3")
    frozen = ", ".join(REPORT[:-1])
    assert sorted(lines) == [
        "every stage: optim.lr=-1.0: must be above 0. Use 1e-5 for omni_sft, 1e-3 for a connector.",
        f"{frozen}: optim.module_lr.llm=0.001: llm is frozen. Set tune_llm=true or remove the learning rate.",
        "vision_tune: eval.every=-1: must not be negative. Use 0 for the end of the run only.",
    ]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("stages: [{recipe: omni_stf}]", "Did you mean 'omni_sft'?"),
        ("stages: [{recipe: omni_sft, overides: []}]", "stages.overides: not a known key. Did you mean 'ov"),
        ("stages: [{recipe: omni_sft}, {recipe: omni_sft}]", "two stages are called omni_sft"),
        ("stages: [omni_sft]", "names no recipe"),
        ("stages: []", "has no stages"),
        ("stages: [", "is no sound YAML"),
        ("stages: [{recipe: omni_sft, overrides: seed=1}]", "is no list of words"),
        ("stages: [{recipe: omni_sft, overrides: [recipe=vision_tune]}]", "the pipeline names the recipes"),
        ("stages: [{recipe: omni_sft, overrides: [run=x]}]", "every stage has a folder of its own"),
        ("stages: [{recipe: omni_sft, overrides: [init_from=x]}]", "stages start from the one before"),
        ("stages: [{recipe: omni_sft, name: 3}]", "stages.name=3: is no name"),
        ("stages: [{recipe: omni_sft, name: ../x}]", "stages.name=../x: is no name"),
        ("stages: [{recipe: omni_sft, only_with: 3}]", "stages.only_with=3: is no word"),
    ],
)
def test_a_malformed_pipeline_is_refused_with_what_is_wrong(tmp_path, text, hint):
    (line,) = mistakes("data.path=x", pipeline=write_pipeline(tmp_path, text))
    assert hint in line


def test_a_word_for_no_stage_is_refused():
    (line,) = mistakes("data.path=x", "visoin_tune:seed=1")
    assert line.startswith("visoin_tune:seed=1: no stage of that name. Did you mean 'vision_tune'?")


def test_one_process_needs_no_launcher_and_several_or_a_file_of_ones_own_do(tmp_path):
    def command(*words):
        request = read_request("megrez_omni", ["model=tiny", "data.path=x", *words])
        return stage_command(request, compose_stages(request)[0])

    assert Path(command()[1]).name == "train.py" and command() == command("accelerate=one", "processes=1")
    two = command("accelerate=cpu2")
    assert two[1:3] == ["-m", "accelerate.commands.launch"] and "--num_processes" not in two
    four = command("accelerate=gpus", "processes=4")
    assert four[four.index("--num_processes") + 1] == "4"
    own = tmp_path / "own.yaml"
    own.write_text("{num_processes: 1, gpu_ids: '3'}")
    assert str(own) in command(f"accelerate={own}")
    for words in (("processes=2",), ("accelerate=nodes",)):
        with pytest.raises(ValueError, match=words[0]):
            command(*words)
