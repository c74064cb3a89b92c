"""A step with a loss or gradient that is not finite changes nothing, on all ranks together."""

import json
import subprocess

import pytest

from tests.train.launching import ROOT, SMALL, command, environment, launch


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        ("none", "fp32"),
        pytest.param("zero1", "bf16", marks=pytest.mark.slow),
        pytest.param("zero2", "fp32", marks=pytest.mark.slow),
        ("zero3", "bf16"),
    ],
)
def test_a_nan_on_one_rank_or_a_norm_above_its_limit_changes_nothing_on_any(tmp_path, zero, precision):
    words = command(tmp_path, (), 2)
    script = words.index("train.py")
    words[script:] = ["-m", "tests.train.nonfinite_ranks", zero, precision, str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    files = [tmp_path / f"out.{rank}" for rank in (0, 1)]
    assert all(file.is_file() for file in files), done.stderr[-3000:]
    for file in files:
        first, poisoned, above, last, back = json.loads(file.read_text())
        for good in (first, last):
            assert good["applied"] and good["finite_norm"] and good["counted"] == 1
            assert not good["same_weights"]
        for bad in (poisoned, above):
            assert not bad["applied"] and bad["unchanged"] and bad["counted"] == 0
        assert not poisoned["finite_norm"] and above["finite_norm"]
        assert above["norms"] == last["norms"]  # nothing of the skipped gradient stayed behind
        assert back == {"found": True, "same": True, "counted": 2, "again": True}


def test_a_run_keeps_the_samples_and_stops_after_too_many_skipped_steps(tmp_path, text_shards):
    # A learning rate this high overflows the weights after the first update.
    words = (
        *SMALL,
        f"data.path={text_shards}",
        "train.packs_per_step=2",
        "optim.lr=1e36",
        "optim.warmup=0.0",
    )
    run = launch(tmp_path / "run", *words, "train.steps=20", "train.max_skipped_steps=3", code=2)
    assert "train.max_skipped_steps=3: so many steps in a row changed nothing, up to step 4." in run.output
    assert "step 2: loss or gradient is not finite; nothing was changed. Samples: folder/" in run.output
    kept = sorted((run.folder / "spikes").iterdir())
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in (2, 3, 4)]
    spike = json.loads((kept[0] / "spike.json").read_text())
    assert spike["step"] == 2 and spike["grad_norm"] is None and "grad_norm" in spike["nonfinite"]
    assert not all(sample["finite"] for sample in spike["samples"])
    assert not (run.folder / "final").exists()
