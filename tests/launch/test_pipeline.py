"""Pipelines as a person runs them: in order, once, stopped in every way, refused where they must be."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from launch.pipeline import ended_as_asked, main
from launch.process import StageProcess, locked, opened_log
from tests.launch.piping import (
    finish,
    is_alive,
    kill_tree,
    launcher_in,
    records_of,
    running_in,
    stage_of,
    start,
    wait_for_step,
    wait_until,
    words,
    write_pipeline,
)
from tests.records import prepare, write_records
from tests.train.launching import ROOT, environment


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A pipeline of two stages that has run to its end, and all that was said."""
    folder = tmp_path_factory.mktemp("pipeline")
    data = prepare(write_records(folder / "records", ["image"] * 24, seed=2), folder / "shards")
    pipeline, runs = write_pipeline(folder), folder / "runs"
    output = finish(start(pipeline, words(runs, data)))
    return SimpleNamespace(folder=folder, data=data, pipeline=pipeline, runs=runs, output=output)


def again(done, *more, capsys) -> str:
    """Returns what the same command, with some more words, prints in this process when it refuses."""
    return refused(done.pipeline, [*words(done.runs, done.data), *more], capsys)


@contextmanager
def changed(path, change):
    """Changes a file's text for a while."""
    before = path.read_text()
    path.write_text(change(before))
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def away(path):
    """Moves a folder away for a while."""
    path.rename(path.with_name("elsewhere"))
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        path.with_name("elsewhere").rename(path)


@pytest.fixture
def started():
    """Starts pipelines, and leaves none behind whatever happens."""
    processes = []

    def keep(pipeline, given, **options):
        processes.append(start(pipeline, given, **options))
        return processes[-1]

    yield keep
    for process in processes:
        if process.poll() is None:
            kill_tree(process)


def refused(pipeline, given, capsys) -> str:
    """Returns what a pipeline says that refuses to start."""
    with pytest.raises(SystemExit) as end:
        main([str(pipeline), *given])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_stages_run_in_order_each_from_the_one_before(done):
    align, tune = stage_of(done.runs / "vision_align"), stage_of(done.runs / "vision_tune")
    assert (align["steps"], tune["steps"]) == (40, 40)  # the command line's word, not the entry's
    assert align["parent"] is None and tune["parent"]["weights_digest"] == align["weights_digest"]
    lines = [line for line in done.output.splitlines() if line.startswith("[")]
    assert [line.split(":")[0] for line in lines if "complete after" in line] == [
        "[1/2] vision_align",
        "[2/2] vision_tune",
    ]
    assert "Complete: 40 steps" in (done.runs / "vision_tune.log").read_text()
    assert "[1/2] vision_align: starts from RANDOM WEIGHTS." in done.output
    assert "[2/2] vision_tune: starts." in done.output


def test_the_summary_has_its_form(done):
    found = json.loads((done.runs / "summary.json").read_text())
    assert set(found) == {"stages", "seconds"}
    assert [stage["name"] for stage in found["stages"]] == ["vision_align", "vision_tune"]
    for stage in found["stages"]:
        assert set(stage) == {"name", "seconds", "metrics", "blank_metrics"} and stage["seconds"] > 0
        for kind in ("metrics", "blank_metrics"):
            assert set(stage[kind]) == {"picture_cer", "picture_loss"}
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]), abs=0.2)
    assert done.output.rstrip().endswith("summary.json holds these numbers.")


def test_what_is_complete_is_not_run_again(done, capsys):
    before = (done.runs / "vision_tune.log").read_bytes(), (done.runs / "summary.json").read_bytes()
    assert main([str(done.pipeline), *words(done.runs, done.data)]) == 0
    assert capsys.readouterr().out.count("already complete") == 2
    assert ((done.runs / "vision_tune.log").read_bytes(), (done.runs / "summary.json").read_bytes()) == before


def test_settings_that_alter_no_result_may_change(done):
    assert main([str(done.pipeline), *words(done.runs, done.data), "log.every=3", "zero=zero2"]) == 0


def test_the_table_can_be_shown_alone(done, capsys):
    only = [str(done.pipeline), f"runs={done.runs}"]
    for form, head in (("--table", "vision"), ("--markdown", "| metric | vision_align |"), ("--json", "{")):
        assert main([*only, form]) == 0
        assert head in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(done.pipeline), f"runs={done.folder}/nowhere", "--table"])
    assert "no stage is complete there" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands_and_runs_nothing(done, tmp_path, capsys):
    given = words(tmp_path / "runs", done.data, "accelerate=cpu2")
    assert main([str(done.pipeline), *given, "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "accelerate.commands.launch --config_file configs/accelerate/cpu2.yaml" in first
    assert f"init_from={tmp_path}/runs/vision_align" in second and "recipe=vision_tune" in second
    assert not (tmp_path / "runs").exists()


def test_checking_a_pipeline_leaves_torch_alone(done, tmp_path):
    given = [str(done.pipeline), *words(tmp_path / "runs", done.data), "--dry-run"]
    code = (
        "import sys; from launch.pipeline import main; "
        "assert main(sys.argv[1:]) == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, timeout=60).returncode == 0


def test_a_changed_setting_is_refused_by_name(done, capsys):
    said = again(done, "vision_tune:optim.lr=0.5", capsys=capsys)
    assert said.startswith(f"vision_tune: run={done.runs}/vision_tune: holds another config.")
    assert "  optim.lr: 0.0007 there, 0.5 now" in said


def test_changed_data_are_refused_by_name(done, capsys):
    with away(done.data):
        assert "every stage: data.sources.folder.path=" in again(done, capsys=capsys)
        prepare(write_records(done.folder / "others", ["image"] * 24, seed=3), done.data)
        capsys.readouterr()
        lines = again(done, capsys=capsys).splitlines()
    assert [line.split(": is")[0] for line in lines] == [
        "vision_align: data.sources.folder",
        "vision_tune: data.sources.folder",
    ]
    assert f"other data than {done.runs}/vision_align was made with: index " in lines[0]


def test_other_weights_of_the_stage_before_are_refused(done, capsys):
    digest = stage_of(done.runs / "vision_align")["weights_digest"]
    with changed(
        done.runs / "vision_align" / "final" / "stage.json", lambda text: text.replace(digest, "0" * 32)
    ):
        said = again(done, capsys=capsys)
    assert f"vision_tune: {done.runs}/vision_tune: started from other weights of {done.runs}" in said
    assert f"{digest[:12]} then, 000000000000 now." in said


def test_a_stage_whose_parent_is_gone_is_refused(done, capsys):
    with away(done.runs / "vision_align"):
        said = again(done, capsys=capsys)
    assert f"has begun, but {done.runs}/vision_align, which it starts from, is not complete" in said


@pytest.mark.parametrize(
    ("left", "first", "wrong"),
    [
        (("vision_align", "audio_align"), "vision_align", "audio_align starts from vision_tune."),
        (("vision_align", "audio_tune"), "vision_align", "audio_tune starts from audio_align, audio_tune."),
    ],
)
def test_a_left_out_stage_is_refused(done, tmp_path, capsys, left, first, wrong):
    text = f"stages: [{', '.join(f'{{recipe: {name}}}' for name in left)}]"
    said = refused(write_pipeline(tmp_path, text), words(tmp_path / "runs", done.data), capsys)
    assert said.startswith(
        f"{left[1]}: init_from={tmp_path}/runs/{first}: is the result of {first}, but {wrong}"
    )


def test_a_pipeline_without_its_first_stage_is_refused(done, tmp_path, capsys):
    pipeline = write_pipeline(tmp_path, "stages: [{recipe: vision_tune}, {recipe: audio_align}]")
    assert refused(pipeline, words(tmp_path / "runs", done.data), capsys).startswith(
        "vision_tune: init_from=null: nothing comes before vision_tune, which starts from vision_align, "
        "vision_tune and not from random weights."
    )
    given = words(tmp_path / "runs", done.data, f"init_from={done.runs}/vision_align")
    assert main([str(pipeline), *given, "--dry-run"]) == 0


def test_what_would_stop_a_late_stage_is_said_before_the_first(done, tmp_path, capsys):
    more = ("accelerate=cpu2", "vision_tune:train.packs_per_step=3", "eval.metrics.picture_cer=foldr.cer")
    lines = refused(done.pipeline, words(tmp_path / "runs", done.data, *more), capsys).splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "every stage: eval.metrics.picture_cer",
        "vision_tune: train.packs_per_step",
    ]


def test_a_parent_of_another_size_is_refused_whether_it_has_run_or_not(done, tmp_path, capsys):
    line = "  model.llm.width: 64 there, 96 now"
    wider = ("vision_tune:model.llm.width=96",)
    before = refused(done.pipeline, [*words(tmp_path / "runs", done.data), *wider], capsys)
    assert f"init_from={tmp_path}/runs/vision_align: holds another model" in before and line in before
    given = words(tmp_path / "runs", done.data, "model.llm.width=96", f"init_from={done.runs}/vision_align")
    text = 'stages: [{recipe: vision_tune, overrides: ["data.tags=[]"]}]'
    assert line in refused(write_pipeline(tmp_path, text), given, capsys)


def test_two_pipelines_never_work_in_one_folder(done, capsys):
    with locked(done.runs):
        said = again(done, capsys=capsys)
    assert re.fullmatch(r"\S+: another command works there \(process \d+\)\. Wait .*\n", said)


def test_a_stage_that_fails_stops_the_pipeline_with_the_end_of_its_log(done, tmp_path):
    given = words(tmp_path / "runs", done.data, "data.pack.length=64")
    output = finish(start(done.pipeline, given), code=2)
    assert "[1/2] vision_align: failed with exit status 2. The end of its log:" in output
    assert re.search(r"^  data\.pack\.oversize=error: sample", output, re.M)
    assert f"Mend what {tmp_path}/runs/vision_align.log says" in output and "[2/2]" not in output


def test_a_pipeline_stopped_in_every_way_ends_with_the_same_weights_and_summary(done, tmp_path, started):
    runs = tmp_path / "runs"
    given = words(runs, done.data)
    align, tune = runs / "vision_align", runs / "vision_tune"

    process = started(done.pipeline, given)  # asked to end, in the first stage
    wait_for_step(process, align, 4)
    process.send_signal(signal.SIGTERM)
    said = finish(process, code=75)
    assert "Asked to end: the stage saves first" in said and not running_in(align)
    assert "asked to stop; saved" in (runs / "vision_align.log").read_text()

    process = started(done.pipeline, given)  # all killed, between the last save and the result
    wait_until(process, (align / "checkpoints" / "step-00000040" / "manifest.json").is_file)
    kill_tree(process)
    assert not (align / "final").exists()

    process = started(done.pipeline, given)  # the pipeline alone killed, in the second stage
    wait_for_step(process, tune, 4)
    process.kill()
    process.communicate()

    said = finish(started(done.pipeline, given))
    assert "[1/2] vision_align: already complete." in said and "[2/2] vision_tune: goes on." in said
    for name in ("vision_align", "vision_tune"):
        assert [record["step"] for record in records_of(runs / name)] == [*range(1, 41)]
        mine, other = stage_of(runs / name), stage_of(done.runs / name)
        assert mine["weights_digest"] == other["weights_digest"]
    assert results(runs) == results(done.runs)


def results(runs) -> list[dict]:
    """Returns what summary.json says of every stage but its seconds."""
    stages = json.loads((runs / "summary.json").read_text())["stages"]
    return [{**stage, "seconds": 0} for stage in stages]


ONE_STAGE = 'stages: [{recipe: vision_align, overrides: ["data.tags=[]"]}]'
TWO_RANKS = ("accelerate=cpu2", "zero=none", "train.steps=5000")


def test_ranks_never_outlive_their_pipeline_or_their_launcher_for_long(done, tmp_path, started):
    runs = tmp_path / "runs"
    given = words(runs, done.data, *TWO_RANKS, "retries=0")
    pipeline = write_pipeline(tmp_path, ONE_STAGE)
    process = started(pipeline, given)
    wait_for_step(process, runs / "vision_align", 3)
    ranks = running_in(runs / "vision_align")
    assert len(ranks) >= 3  # the launcher and two ranks
    process.kill()
    process.communicate()
    next_one = started(pipeline, given, impatient=True)
    while "goes on" not in (line := next_one.stdout.readline()):
        assert line
    assert not any(is_alive(rank) for rank in ranks)
    wait_for_step(next_one, runs / "vision_align", records_of(runs / "vision_align")[-1]["step"] + 2)
    launcher = launcher_in(runs / "vision_align")
    ranks = running_in(runs / "vision_align")
    os.kill(launcher, signal.SIGKILL)
    output = finish(next_one, code=128 + signal.SIGKILL)
    assert "vision_align: failed with exit status 137" in output
    assert not any(is_alive(rank) for rank in ranks)
    steps = [record["step"] for record in records_of(runs / "vision_align")]
    assert steps == sorted(set(steps))


def test_a_pipeline_that_waits_for_an_earlier_start_can_be_ended(done, tmp_path, started):
    runs = tmp_path / "runs"
    runs.mkdir()
    with opened_log(runs / "vision_align.log", print):
        process = started(write_pipeline(tmp_path, ONE_STAGE), words(runs, done.data))
        while "Waiting for them" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        assert "stopped. The same command goes on." in finish(process, code=75)


@pytest.mark.parametrize(
    ("does", "as_asked"),
    [
        ("exit(75)", True),
        ("import os; os.kill(os.getpid(), 15)", True),
        ("print('step 4: asked to stop; saved. ...'); exit(1)", True),  # as a launcher ends
        ("raise RuntimeError('no space left')", False),
    ],
)
def test_a_stage_that_fails_on_its_way_out_is_not_taken_for_stopped(tmp_path, does, as_asked):
    with opened_log(tmp_path / "stage.log", print) as log:
        process = StageProcess([sys.executable, "-c", does], log)
        while (code := process.poll()) is None:
            time.sleep(0.01)
    assert ended_as_asked(process, code) == as_asked


def test_a_ctrl_c_during_the_checks_shows_no_traceback(done, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.pipeline.check_stages", interrupt)
    assert main([str(done.pipeline), *words(done.runs, done.data)]) == 75
    assert capsys.readouterr().err == "Stopped. The same command goes on.\n"


def test_help_shows_examples():
    command = [sys.executable, "-m", "launch.pipeline", "--help"]
    shown = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "example: python -m launch.pipeline megrez_omni model=tiny data=demo" in shown.stdout
