"""The line that tells where a pipeline stands."""

import io
import json

import pytest

from launch.history import History, Origin, load_history
from launch.progress import Progress, last_record, stage_seconds_left
from launch.request import read_request
from launch.stages import compose_stages


class Terminal(io.StringIO):
    """Takes what is shown, as a terminal does."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def stages(tmp_path):
    words = ["model=tiny", "data.path=x", "train.steps=100", f"runs={tmp_path}"]
    return compose_stages(read_request("megrez_omni", words))


def write_records(stage, *records, after=""):
    stage.folder.path.mkdir()
    stage.folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + after)


def record(step: int) -> dict:
    return {"step": step, "loss": 1.5, "seconds_per_step": 0.1}


def test_time_left_counts_the_rest_of_this_stage_and_all_coming_ones(stages, tmp_path):
    write_records(stages[0], record(100))
    write_records(stages[1], record(40))
    history = History(tmp_path / "pipeline.json", {"vision_align": 21.0, "vision_tune": 7.0})
    progress = Progress(stages, history, io.StringIO())
    # 60 steps of 0.1 s here; three stages of 100 steps, at (21 + 40 * 0.1) s for 140 steps.
    assert progress.seconds_left(stages[1], record(40)) == pytest.approx(60 * 0.1 + 300 * 25 / 140)
    assert progress.seconds_left(stages[1], None) == pytest.approx(400 * 21 / 100)


def test_the_start_of_the_first_stage_is_not_counted_with_its_few_steps(stages, tmp_path):
    progress = Progress(stages, History(tmp_path / "pipeline.json", {"vision_align": 30.0}), io.StringIO())
    assert progress.seconds_left(stages[0], record(1)) == pytest.approx(499 * 0.1)


def test_without_a_known_length_the_epoch_tells_what_is_left_of_the_stage(stages, tmp_path):
    stages[0].config.train.steps, stages[0].config.train.epochs = None, 2.0
    write_records(stages[0], {**record(40), "epoch": 0.5})
    stream = Terminal()
    Progress(stages, History(tmp_path / "pipeline.json"), stream).show(stages[0])
    assert stream.getvalue().endswith("step 40  loss 1.5000  0s gone  about 12s left in this stage")
    assert stage_seconds_left(stages[0], {**record(1), "epoch": 0.0}) is None


def test_who_waits_for_the_evaluation_is_told(stages, tmp_path):
    for step, said in ((94, "loss 1.5000  0s"), (95, "then evaluates and saves"), (100, "saves")):
        stages[0].folder.path.mkdir(exist_ok=True)
        stages[0].folder.metrics.write_text(json.dumps(record(step)) + "\n")
        stream = Terminal()
        Progress(stages, History(tmp_path / "pipeline.json"), stream).show(stages[0])
        assert said in stream.getvalue()


def test_nothing_is_guessed_before_a_step_or_without_a_length(stages, tmp_path):
    progress = Progress(stages, History(tmp_path / "pipeline.json"), io.StringIO())
    assert progress.seconds_left(stages[0], None) is None
    stages[4].config.train.steps = None
    assert progress.seconds_left(stages[0], record(5)) is None


def test_a_terminal_has_one_line_that_is_rewritten(stages, tmp_path):
    write_records(stages[0], record(40), after='{"step": 41, "los')
    stream = Terminal()
    progress = Progress(stages, History(tmp_path / "pipeline.json", {"vision_align": 4.0}), stream)
    progress.show(stages[0])
    progress.show(stages[0])
    line = "[1/5] vision_align  step 40/100  loss 1.5000  4s gone  about 46s left"
    assert stream.getvalue() == f"\r\x1b[K{line}" * 2


def test_a_log_has_a_line_now_and_then(stages, tmp_path):
    stream = io.StringIO()
    progress = Progress(stages, History(tmp_path / "pipeline.json"), stream)
    for _ in range(5):
        progress.show(stages[0])
    assert stream.getvalue() == "[1/5] vision_align  starts  0s gone\n"


def test_a_line_that_is_being_written_is_no_record(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert last_record(file) is None
    file.write_text('{"step": 1')
    assert last_record(file) is None
    file.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    assert last_record(file) == {"step": 2}


def test_history_is_read_back_as_it_was_written(tmp_path):
    history = load_history(tmp_path)
    assert (history.seconds, history.origins, history.origin("omni_sft")) == ({}, {}, None)
    history.seconds["omni_sft"] = 1.5
    history.save()
    assert load_history(tmp_path).seconds == {"omni_sft": 1.5}


def test_seconds_of_a_start_count_until_what_it_left_is_removed(tmp_path):
    history = History(tmp_path / "pipeline.json", {"omni_sft": 7.0})
    history.start("omni_sft", Origin({}, None), goes_on=False, afresh=False)
    assert history.seconds == {"omni_sft": 7.0}
    history.start("omni_sft", Origin({}, None), goes_on=False, afresh=True)
    assert history.seconds == {"omni_sft": 0.0}
