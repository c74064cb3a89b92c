"""The curves of a pipeline are drawn from what its stages logged."""

import json

from launch.curves import find_stages, main, read_losses


def write_stage(runs, name, records):
    (runs / name).mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss_by_source": losses}) for step, losses in records]
    (runs / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_drawing_names_every_source_and_is_the_same_every_time(tmp_path):
    write_stage(tmp_path / "runs", "first", [(5, {"text": 2.0}), (10, {"text": 0.0, "speech": 1.0})])
    write_stage(tmp_path / "runs", "second", [(5, {"speech": 2.0})])
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "one")]) == 0
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "two")]) == 0
    drawn = (tmp_path / "one" / "first.svg").read_bytes()
    assert drawn == (tmp_path / "two" / "first.svg").read_bytes()
    assert b"speech" in drawn and b"text" in drawn
    assert (tmp_path / "one" / "second.svg").is_file()


def test_a_source_that_was_not_drawn_in_a_step_has_no_point_there(tmp_path):
    write_stage(tmp_path, "first", [(5, {"text": 2.0}), (10, {"text": 0.5, "speech": 1.0})])
    assert read_losses(tmp_path / "first") == ([5, 10], {"text": [2.0, 0.5], "speech": [None, 1.0]})
    assert [path.name for path in find_stages(tmp_path)] == ["first"]


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no stage has logged anything" in capsys.readouterr().err
