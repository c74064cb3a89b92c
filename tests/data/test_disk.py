"""A disk that is full or read-only: a clear error, nothing half-written, and the next start works."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from data.index import load_folder
from data.index import main as index
from data.prepare import main as prepare
from tests.data.corpus import data_config, mixed_records, prepare_folder, tables_of

FILLER = "filler"


@pytest.fixture
def disk(tmp_path):
    """A disk of 400 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k,nr_inodes=1000", "tmpfs", place], capture_output=True
    )
    if done.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """An indexed folder of 40 samples, 300 KiB, beside its records."""
    root = tmp_path_factory.mktemp("prepared")
    path = prepare_folder(root / "media", mixed_records(root / "media", 16), root / "mixed")
    assert 200_000 < os.path.getsize(f"{path}/shard-000000.tar") < 380_000
    return Path(path)


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def fill(disk):
    """Leaves not a byte."""
    with suppress(OSError), (disk / FILLER).open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def command(prepared, out):
    return [
        str(prepared.parent / "media/mixed.jsonl"),
        "--format",
        "llava",
        "--out",
        str(out),
        "--workers",
        "1",
    ]


@pytest.mark.parametrize(
    ("how", "back", "message"), [("size=100k", "size=9m", "full"), ("ro", "rw", "Read-only")]
)
def test_prepare_leaves_nothing_and_works_the_next_time(disk, prepared, capsys, how, back, message):
    remount(disk, how)
    assert prepare(command(prepared, disk / "out")) == 1
    error = capsys.readouterr().err
    assert message in error and f"error: out={disk}/out: " in error
    assert os.listdir(disk) == []
    remount(disk, back)
    assert prepare(command(prepared, disk / "out")) == 0
    assert load_folder(str(disk / "out")).digest == load_folder(str(prepared)).digest


@pytest.mark.parametrize("full", [True, False])
def test_index_leaves_nothing_and_works_the_next_time(disk, prepared, capsys, full):
    shutil.copy(prepared / "shard-000000.tar", disk)
    if full:
        fill(disk)
    else:
        remount(disk, "ro")
    assert index([str(disk), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert "shard-000000.index.parquet: cannot be written (" in error
    assert ("disk is full" if full else "Read-only") in error
    assert set(os.listdir(disk)) - {FILLER} == {"shard-000000.tar"}
    remount(disk, "rw,size=9m")
    assert index([str(disk), "--workers", "1"]) == 0
    assert load_folder(str(disk)).digest == load_folder(str(prepared)).digest


@pytest.mark.parametrize("full", [True, False])
def test_token_counts_that_cannot_be_written_ask_for_another_place(disk, prepared, tmp_path, full):
    folder = disk / "mixed"
    shutil.copytree(prepared, folder)
    if full:
        fill(disk)
    else:
        remount(disk, "ro")
    with pytest.raises(ValueError, match=r"data\.cache=DIR"):
        tables_of(data_config(str(folder)))
    assert not [
        path for path in folder.rglob("*") if path.suffix in (".counts", ".partial") and path.is_file()
    ]
    counted = tables_of(data_config(str(folder), cache=str(tmp_path / "cache")))
    remount(disk, "rw,size=9m")
    assert tables_of(data_config(str(folder))).fingerprint == counted.fingerprint
