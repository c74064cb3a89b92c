"""What a person can get wrong, and what the machine can refuse: a clear word, and nothing lost."""

import contextlib
import os
import shutil
import subprocess

import pytest

from tests.records import prepare, write_records
from tests.train.launching import SMALL, launch

FEW = ("train.steps=2", "train.packs_per_step=2")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("data.path=nowhere",), "data.sources.folder.path=nowhere:"),
        (("init_from=nowhere",), "init_from=nowhere: there is no such folder."),
        (("recipe=vision_align",), "data.tags=[caption]: no sample of source 'folder' has this tag."),
        (("data.tokenizer=nowhere",), "data.tokenizer=nowhere"),
        (("model.llm.vocab=1000",), "model.llm.vocab=1000: the tokenizer has 2048 words."),
        (("data.pack.length=64",), "data.pack.oversize=error: sample folder/"),
        (("zero=zero2", "train.micro_batch_packs=2", "train.packs_per_step=3"), "must divide"),
    ],
)
def test_a_mistake_in_what_a_run_is_given_is_named(tmp_path, text_shards, words, text):
    run = launch(tmp_path / "run", *SMALL, *FEW, f"data.path={text_shards}", *words, code=2, timeout=120)
    assert text in run.output and "Traceback" not in run.output
    assert not (tmp_path / "run" / "final").exists()


def test_packs_that_cannot_be_dealt_to_the_ranks_are_refused(tmp_path, text_shards):
    words = (*SMALL, f"data.path={text_shards}", "train.steps=2", "train.packs_per_step=3")
    run = launch(tmp_path / "run", *words, processes=2, code=None)
    assert run.code != 0
    assert (
        "train.packs_per_step=3: not divisible among 2 ranks of train.micro_batch_packs=1. Use 4."
        in run.output
    )


def test_text_alone_is_left_out_where_the_language_model_is_frozen_and_said(
    tmp_path, mixed_shards, text_shards
):
    words = (*SMALL, *FEW, "recipe=vision_tune", "data.tags=[]")
    run = launch(tmp_path / "run", *words, f"data.path={mixed_shards}")
    assert "left out: 12 text (trains nothing), 12 audio (trains nothing)" in run.output
    none = launch(tmp_path / "none", *words, f"data.path={text_shards}", code=2)
    assert "none of its 24 samples is left (text (trains nothing) 24)" in none.output


def test_bad_samples_are_in_the_runs_ledger_and_too_many_stop_it(tmp_path):
    records = write_records(tmp_path / "records", ["image"] * 12)
    shards = prepare(records, tmp_path / "shards")
    tar = next(shards.glob("*.tar"))
    whole, times = tar.read_bytes(), tar.stat()
    # Wound the pictures after they were indexed, as a rotting disk does: only a worker can see it.
    wounded = whole.replace(b"\xff\xdb", b"\x00\x00")
    assert wounded != whole and len(wounded) == len(whole)
    tar.write_bytes(wounded)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    words = (*SMALL, f"data.path={shards}", "train.packs_per_step=2")
    run = launch(tmp_path / "run", *words, "data.max_bad_share=1.0", "train.steps=2")
    ledger = (run.folder / "ledger.jsonl").read_text().splitlines()
    assert ledger and all('"cause": "image_corrupt"' in line or '"cause": "image_' in line for line in ledger)
    assert run.records[-1]["bad_samples"] == len(ledger) and run.stage["samples"]["good"] == 0
    strict = launch(tmp_path / "strict", *words, "data.max_bad_share=0.0", "train.steps=2", code=2)
    assert "data.max_bad_share=0.0:" in strict.output and "Mend the data" in strict.output
    assert "image_corrupt" in (strict.folder / "ledger.jsonl").read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("needs root to mount a small file system")
    if subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    with contextlib.suppress(OSError):
        subprocess.run(["umount", str(place)], check=False)


def test_a_full_disk_is_named_and_nothing_half_written_is_left(small_disk, text_shards):
    run = launch(
        small_disk / "run", *SMALL, *FEW, f"data.path={text_shards}", "checkpoint.every=1", code=None
    )
    assert run.code != 0 and "No space left on device" in run.output
    assert "the checkpoint could not be written" in run.output
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []
    assert not (small_disk / "run" / "final").exists()
