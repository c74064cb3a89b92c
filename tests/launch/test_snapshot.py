"""The copy of the code that a job runs."""

import shutil
import subprocess
import sys
from pathlib import Path

from launch import snapshot
from launch.snapshot import COPIED, copy_code
from tests.train.launching import ROOT, environment


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_that_git_knows_of_the_code_is_copied_and_works_alone(tmp_path):
    copy_code(tmp_path / "code")
    known = subprocess.run(["git", "ls-files", *COPIED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(known.stdout.split()) <= files_of(tmp_path / "code")
    command = [sys.executable, str(tmp_path / "code" / "train.py"), "recipe=omni_sft", "--cfg", "job"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_shards_and_links_that_lie_among_the_code_stay_where_they_are(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    copy_code(checkout)
    before = files_of(checkout)
    (checkout / "data" / "large").mkdir()
    (checkout / "data" / "large" / "shard-000000.tar").write_bytes(b"large")
    (checkout / "data" / "loop").symlink_to(checkout)
    (checkout / "data" / "gone.py").symlink_to("nowhere.py")
    shutil.move(checkout / "data" / "plan.py", tmp_path / "plan.py")
    (checkout / "data" / "plan.py").symlink_to("../../plan.py")
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    monkeypatch.setattr(snapshot, "BUILT_IN_TOKENIZER", checkout / "data" / "assets" / "tokenizer.json")
    copy_code(tmp_path / "deep" / "er" / "code")
    assert files_of(tmp_path / "deep" / "er" / "code") == before
