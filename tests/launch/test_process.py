"""A stage as a process: its log, its lock, its end."""

import subprocess
import sys
import time

import pytest

from launch import process
from launch.process import StageProcess, locked, opened_log
from tests.launch.piping import is_alive


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def wait(running: StageProcess) -> int:
    while (code := running.poll()) is None:
        time.sleep(0.01)
    return code


def test_the_tail_is_of_this_start_alone_and_of_a_bar_only_what_stayed(tmp_path):
    path = tmp_path / "stage.log"
    path.write_text("of an earlier start\n")
    with opened_log(path, print) as log:
        running = StageProcess(python("print('a'); print('1%\\r99%'); print('c'); exit(3)"), log)
        assert wait(running) == 3
    assert running.tail() == ["a", "99%", "c"] and running.tail(1) == ["c"]
    assert path.read_text().startswith("of an earlier start\n")


def test_a_killed_stage_has_the_status_that_a_shell_gives_it(tmp_path):
    with opened_log(tmp_path / "stage.log", print) as log:
        running = StageProcess(python("import time; time.sleep(60)"), log)
        running.kill()
        assert wait(running) == 128 + 9


def test_a_kill_reaches_ranks_in_sessions_of_their_own(tmp_path):
    child = "import time; time.sleep(60)"
    launcher = (
        "import subprocess, sys, time\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "print(rank.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "stage.log"
    with opened_log(path, print) as log:
        running = StageProcess(python(launcher), log)
        while not path.read_text().endswith("\n"):
            time.sleep(0.01)
        running.kill()
    rank = int(path.read_text())
    with opened_log(path, print):  # cannot be had while the rank lives
        assert not is_alive(rank)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose output a file is")
def test_ranks_that_outlive_their_pipeline_are_waited_for_and_then_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.3)
    path, said = tmp_path / "stage.log", []
    with opened_log(path, print) as log:
        orphan = subprocess.Popen(python("import time; time.sleep(60)"), stdout=log)
    assert not said and is_alive(orphan.pid)
    with opened_log(path, said.append):
        assert said == [f"{path}: processes of an earlier start still end. Waiting for them."]
        assert orphan.wait(timeout=5) == -9


def test_the_folders_lock_goes_with_the_pipeline_and_not_with_its_stages(tmp_path):
    with locked(tmp_path):
        stage = subprocess.Popen(python("import time; time.sleep(60)"))
        with pytest.raises(ValueError, match="another command works there"), locked(tmp_path):
            pass
    with locked(tmp_path):
        assert is_alive(stage.pid)
    stage.kill()
    stage.wait()
