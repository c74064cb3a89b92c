"""docs/checkpoints.md: every line of its table runs, at toy size, in the order in which it stands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.tokenizer import copy_tokenizer
from tests.records import KINDS, prepare, write_records
from tests.test_readme import COPIED, ROOT, table
from tests.train.launching import environment
from tests.train.native_parts import write_parts
from tests.train.released import write_release
from tests.train.tiny_model import AUDIO, LLM, MEDIA, VISION

PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
COMMANDS = [row[2].strip("`") for row in table(PAGE, "from")]


def words_of(path: str, config, names: str) -> list[str]:
    return [f"{path}.{name}={getattr(config, name)}" for name in names.split()]


SIZES = [
    "model=tiny",
    *words_of("model.llm", LLM, "width intermediate layers heads kv_heads head_dim rope_theta vocab"),
    *words_of("model.vision", VISION, "width intermediate layers heads resampler_heads"),
    *words_of("model.audio", AUDIO, "width layers heads"),
    *words_of("media.image", MEDIA.image, "slice_pixels queries table_side max_slices"),
    *words_of("media.audio", MEDIA.audio, "mel_bins"),
]
LENGTH = ["train.steps=1", "data.tags=[]", "eval.samples=0"]
"""What makes a stage short; the page shows the real thing."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of what runs, with data of its own and folders as a hub has them."""
    folder = tmp_path_factory.mktemp("page")
    for name in COPIED:
        whole = ROOT / name
        copy = shutil.copytree if whole.is_dir() else shutil.copy
        copy(whole, folder / name)
    shards = prepare(write_records(folder / "records", [*KINDS] * 4), folder / "shards")
    sources = {"all": {"path": str(shards)}}
    (folder / "configs" / "data" / "mine.yaml").write_text(
        "# @package data\n" + json.dumps({"holdout": 0.3, "sources": sources})
    )
    write_release(folder / "hub" / "megrez")
    write_parts(folder / "parts")
    for part, name in (("llm", "llm"), ("vision_encoder", "siglip"), ("audio_encoder", "whisper")):
        (folder / "parts" / part).rename(folder / "hub" / name)
    copy_tokenizer(None, folder / "hub" / "llm")
    return folder


def shortened(command: str) -> list[str]:
    words = shlex.split(command)
    if "train.py" in words or "launch.pipeline" in words:
        words += SIZES + (LENGTH if "train.py" in words else [])
    return [sys.executable, *words[1:]]


def test_the_page_names_every_way_in_and_out():
    ways = (
        "model.weights=",
        "model.parts.",
        "init_from=",
        "lora.rank=",
        "format=megrez",
        "format=transformers",
    )
    assert all(any(way in command for command in COMMANDS) for way in ways)


@pytest.mark.slow
def test_every_line_of_the_table_runs(place):
    for command in COMMANDS:
        done = subprocess.run(
            shortened(command),
            cwd=place,
            env=environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
        for out in re.findall(r"out=(\S+)", command):
            assert (place / out / "config.json").is_file(), command
        for run in re.findall(r"train\.py .* run=(\S+)", command):
            assert (place / run / "final" / "stage.json").is_file(), command
