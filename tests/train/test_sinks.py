import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import LogConfig, WandbMode
from train.sinks import ConsoleSink, JsonlSink, SinkRun, build_sinks, format_line, format_seconds
from train.wandb_sink import flatten

RECORD = {
    "step": 120,
    "loss": 2.31,
    "loss_by_source": {"coco": 2.0, "asr": 3.5},
    "lr": 1e-4,
    "grad_norm": 0.9,
    "tokens_per_second": 12345.0,
    "fill": 0.998,
    "mfu": None,
    "data_wait_share": 0.004,
    "seconds_per_step": 0.25,
    "bad_samples": 0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_jsonl_line_is_on_disk_before_the_sink_is_closed(tmp_path):
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
    sink.write(RECORD)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == RECORD
    sink.close()


def test_jsonl_holds_every_step_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for start, stop in ((0, 7), (4, 9)):
        sink = JsonlSink(path, start)
        for step in range(start + 1, stop + 1):
            sink.write({"step": step, "session": start})
        sink.close()
    assert steps_in(path) == list(range(1, 10))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_drops_a_line_that_a_crash_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "lo')
    sink = JsonlSink(path, 2)
    sink.write({"step": 3})
    sink.close()
    assert steps_in(path) == [1, 2, 3]


def test_jsonl_refuses_values_that_are_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        JsonlSink(tmp_path / "metrics.jsonl").write({"step": 1, "loss": float("nan")})


def test_console_without_a_terminal_prints_one_plain_line_per_record():
    stream = io.StringIO()
    sink = ConsoleSink(0, 1000, stream)
    sink.write(RECORD)
    sink.close()
    assert stream.getvalue() == (
        "step 120/1000  loss 2.3100  lr 0.0001  grad 0.9  12.3k tok/s  fill 99.8%  wait 0.4%  eta 3m40s\n"
    )


def test_console_on_a_terminal_moves_a_bar_and_leaves_a_line_per_evaluation():
    stream = Terminal()
    sink = ConsoleSink(100, 1000, stream)
    sink.write(RECORD)
    assert "120/1000" in stream.getvalue()
    assert "step 120/1000" not in stream.getvalue()
    sink.write({**RECORD, "step": 130, "held_out": {"loss": 2.5}})
    sink.close()
    assert "step 130/1000  loss 2.3100" in stream.getvalue()
    assert "held-out loss 2.5000" in stream.getvalue()


def test_line_shows_the_highest_learning_rate_of_several_modules():
    line = format_line({**RECORD, "lr": {"llm": 1e-5, "vision_proj": 1e-3}}, 1000)
    assert "lr 0.001" in line


def test_line_names_what_was_not_finite_and_what_went_wrong():
    line = format_line({**RECORD, "loss": None, "nonfinite": ["loss"], "bad_samples": 3}, 1000)
    assert "loss not finite" in line
    assert "bad samples 3" in line


@pytest.mark.parametrize(
    "seconds, text", [(7.4, "7s"), (200, "3m20s"), (7500, "2h05m"), (97200, "1d03h"), (59.7, "1m00s")]
)
def test_durations_show_their_two_largest_units(seconds, text):
    assert format_seconds(seconds) == text


def test_flatten_joins_nested_names_with_a_slash():
    assert dict(flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}})) == {"a": 1, "b/c": 2, "b/d/e": 3}


def test_wandb_is_imported_only_on_request(tmp_path):
    code = """
import sys, pathlib
from train.config import LogConfig
from train.sinks import SinkRun, build_sinks
sinks = build_sinks(SinkRun(pathlib.Path(sys.argv[1]), 0, 10, LogConfig()))
print(len(sinks), "wandb" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False"]


def inspect_wandb(path: Path) -> list[dict]:
    """Reads a run file back with the wandb program itself."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def clean_wandb(tmp_path, monkeypatch):
    """No settings, key or login of whoever runs the tests, and no server to reach."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("clean_wandb")
def test_online_wandb_without_a_login_says_so_and_logs_offline(tmp_path, capsys):
    log = LogConfig(wandb=WandbMode.online)
    sinks = build_sinks(SinkRun(tmp_path / "run", 0, 3, log))
    sinks[-1].write(RECORD)
    for sink in sinks:
        sink.close()
    assert "log.wandb=online: " in capsys.readouterr().err
    (path,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    items = [entry["history"]["item"] for entry in inspect_wandb(path) if entry["type"] == "history"]
    assert [item["loss"] for item in items] == [2.31]


@pytest.mark.usefixtures("clean_wandb")
def test_offline_wandb_keeps_one_run_over_two_sessions(tmp_path):
    folder = tmp_path / "omni_sft"
    for session, steps in enumerate(((1, 2), (2, 3))):
        log = LogConfig(wandb=WandbMode.offline, wandb_project="law")
        sinks = build_sinks(SinkRun(folder, session, 3, log, {"optim": {"lr": 1e-5}}))
        for step in steps:
            sinks[-1].write({**RECORD, "step": step, "session": session})
        for sink in sinks:
            sink.close()
    found = [inspect_wandb(path) for path in folder.glob("wandb/offline-run-*/run-*.wandb")]
    runs = [entry["run"] for records in found for entry in records if entry["type"] == "run"]
    items = [entry["history"]["item"] for records in found for entry in records if entry["type"] == "history"]
    assert len(found) == 2
    assert {run["run_id"] for run in runs} == {(folder / "wandb_id.txt").read_text().strip()}
    assert {run["project"] for run in runs} == {"law"}
    assert runs[0]["config"]["update"]["optim"] == {"lr": 1e-5}
    assert sorted((item["session"], item["step"]) for item in items) == [(0, 1), (0, 2), (1, 2), (1, 3)]
    assert all(item["loss_by_source/asr"] == 3.5 and "mfu" not in item for item in items)
