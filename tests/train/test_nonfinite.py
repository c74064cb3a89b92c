"""A step with a loss or gradient that is not finite changes nothing, on all ranks together."""

import json
import subprocess

import pytest

from tests.train.launching import ROOT, SMALL, command, environment, launch


@pytest.mark.parametrize(
    ("zero", "precision"), [("none", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")]
)
def test_a_nan_on_one_rank_changes_nothing_on_any(tmp_path, zero, precision):
    words = command(tmp_path, (), 2)
    script = words.index("train.py")
    words[script:] = ["-m", "tests.train.nonfinite_ranks", zero, precision, str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    files = [tmp_path / f"out.{rank}" for rank in (0, 1)]
    assert all(file.is_file() for file in files), done.stderr[-3000:]
    for file in files:
        first, poisoned, last = json.loads(file.read_text())
        for good in (first, last):
            assert (
                good["applied"] and good["finite_norm"] and not good["same_weights"] and good["counted"] == 1
            )
        assert not poisoned["applied"] and not poisoned["finite_norm"]
        assert poisoned["unchanged"] and poisoned["counted"] == 0


def test_a_run_names_the_samples_and_stops_after_too_many_skipped_steps(tmp_path, text_shards):
    # A learning rate this high overflows the weights after the first update.
    words = (
        *SMALL,
        f"data.path={text_shards}",
        "train.packs_per_step=2",
        "optim.lr=1e36",
        "optim.warmup=0.0",
    )
    run = launch(tmp_path / "run", *words, "train.steps=20", "train.max_skipped_steps=3", code=None)
    assert run.code != 0 and "3 steps in a row had a loss or gradient that is not finite" in run.output
    lines = [json.loads(line) for line in (run.folder / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["samples"] for line in lines)
    assert all(name.startswith("folder/") for name in lines[0]["samples"])
    assert not (run.folder / "final").exists()
