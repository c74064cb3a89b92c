import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.config import DataConfig, PackConfig, SourceConfig, TemplateConfig
from data.demo.__main__ import main
from data.demo.build import BEGUN, FACTS, SOURCES, Options, count_samples, make_sample
from data.demo.sentences import is_held_out
from data.encode import Encoder
from data.geometry import AudioGeometry, ImageGeometry, MediaConfig
from data.index import load_folder
from data.shards import ShardReader
from data.tokenizer import load_tokenizer

SCALE = "0.004"
TINY = MediaConfig(
    image=ImageGeometry(patch_pixels=14, slice_pixels=112, max_slices=4, queries=16, table_side=16),
    audio=AudioGeometry(mel_bins=80, window_seconds=30, pool=True),
)


def command(out, *words):
    return [sys.executable, "-m", "data.demo", str(out), "--scale", SCALE, *words]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a folder of demo data made by one process, this one."""
    out = tmp_path_factory.mktemp("demo") / "data"
    assert main([str(out), "--scale", SCALE, "--workers", "1"]) == 0
    return out


def digests(out):
    """Returns a hash of every file that is the same wherever and whenever it is made."""
    files = sorted([*Path(out).rglob("*.tar"), *Path(out).rglob("*.json")])
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def samples(folder):
    index = load_folder(str(folder))
    reader = ShardReader(index)
    for number, shard in enumerate(index.shards):
        for row in range(shard.num_rows):
            yield reader.read(number, row), shard.sizes(row)


def test_any_number_of_processes_makes_the_same_bytes(made, tmp_path):
    done = subprocess.run(command(tmp_path / "two", "--workers", "2"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "two") == digests(made)
    for split in ("train", "held_out"):
        for source in SOURCES:
            folders = [load_folder(str(out / split / source)) for out in (made, tmp_path / "two")]
            assert folders[0].digest == folders[1].digest


def test_every_source_holds_what_the_table_says(made):
    counts = count_samples(float(SCALE))
    assert json.loads((made / FACTS).read_text())["samples"] == counts
    for split, sources in counts.items():
        for source, count in sources.items():
            folder = load_folder(str(made / split / source))
            assert folder.num_rows == count >= 4
            for sample, _ in samples(folder.path):
                assert sample.tags == (SOURCES[source].tag,) and sample.key.startswith(f"{source}-")


def test_every_sample_is_encoded_without_an_error(made):
    config = DataConfig(
        sources={"demo": SourceConfig(path=str(made))},
        tokenizer=str(made / "tokenizer"),
        template=TemplateConfig(system=""),
        pack=PackConfig(length=1024),
    )
    encoder = Encoder(config, TINY, load_tokenizer(config.tokenizer))
    for split in ("train", "held_out"):
        for source in SOURCES:
            for sample, sizes in samples(made / split / source):
                encoded = encoder.encode(sample, source, sizes)
                if source == "patches":
                    # The labels, and the end of the turn.
                    assert (encoded.labels >= 0).sum() == encoded.slices[0].shape[0] + 1
                assert len(encoded.input_ids) < 200


def test_answers_of_the_splits_differ_where_they_are_all_of_the_question():
    for source in ("ocr", "asr_en", "asr_zh"):
        trained, held_out = (
            {make_sample(source, split, number).messages[-1].parts[0].text for number in range(40)}
            for split in (False, True)
        )
        assert all(map(is_held_out, held_out)) and not any(map(is_held_out, trained))


def test_what_is_complete_is_left_alone(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert main([str(made), "--scale", SCALE]) == 0
    assert "is complete already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


def test_what_was_made_otherwise_is_refused(made, capsys):
    assert main([str(made), "--scale", "0.01"]) == 1
    assert "was begun with scale=0.004, not 0.01" in capsys.readouterr().err


def test_a_shard_that_has_gone_is_noticed(made, tmp_path, capsys):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(made), str(copy)], check=True)
    (copy / "train" / "ocr" / "shard-000000.tar").unlink()
    assert main([str(copy), "--scale", SCALE]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_folder_of_others_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main([str(tmp_path), "--scale", SCALE]) == 1
    assert "already holds something" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--scale", "0"], "--scale=0.0: must be above 0"),
        (["--scale", "nan"], "--scale=nan: must be above 0"),
        (["--font", "nowhere.ttf"], "--font=nowhere.ttf: there is no such file"),
        (["--tts-command", "say"], "does not say where to write"),
    ],
)
def test_an_impossible_option_is_refused(words, problem, tmp_path, capsys):
    assert main([str(tmp_path / "out"), *words]) == 1
    assert problem in capsys.readouterr().err


def test_a_build_that_was_killed_goes_on_to_the_same_data(made, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out, "--workers", "2"), stderr=subprocess.DEVNULL)
    first = out / "train" / next(iter(SOURCES))
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # No worker lives on to write into the folder, or to hold the machine.
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert (out / BEGUN).exists() and not (out / FACTS).exists()
    kept = {path: path.stat().st_mtime_ns for path in first.glob("*.tar")}
    assert main([str(out), "--scale", SCALE, "--workers", "1"]) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in first.glob("*.tar")}
    assert digests(out) == digests(made)


def test_help_shows_an_example():
    done = subprocess.run(
        [sys.executable, "-m", "data.demo", "--help"], capture_output=True, text=True, check=True
    )
    assert "example: python -m data.demo runs/demo/data" in done.stdout


def test_a_sample_depends_on_its_number_alone():
    for source in SOURCES:
        first, again, other = (make_sample(source, False, number) for number in (3, 3, 4))
        assert first == again and first != other
        np.random.seed(1)
        assert make_sample(source, False, 3) == first


def test_options_name_the_font_by_its_content(tmp_path):
    for name, content in (("a.ttf", b"1"), ("b.ttf", b"1"), ("c.ttf", b"2")):
        (tmp_path / name).write_bytes(content)
    first, same, other = (
        Options(font=str(tmp_path / name)).facts["font"] for name in ("a.ttf", "b.ttf", "c.ttf")
    )
    assert first == same != other
