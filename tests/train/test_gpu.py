"""A whole stage on a GPU, where there is one: near the same stage on the CPU."""

import os

import pytest

from tests.train.launching import SMALL, launch

WORDS = (*SMALL, "train.steps=4", "train.packs_per_step=4", "optim.lr=1e-3")


@pytest.mark.gpu
@pytest.mark.parametrize("zero", ["none", "zero2", "zero3"])
def test_a_stage_on_the_gpu_is_near_the_cpu(tmp_path, mixed_shards, zero):
    plain = launch(tmp_path / "cpu", *WORDS, f"data.path={mixed_shards}")
    words = (*WORDS, f"data.path={mixed_shards}", f"zero={zero}", "precision=bf16", "data.workers=1")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    run = launch(tmp_path / "gpu", *words, env={"CUDA_VISIBLE_DEVICES": visible, "DS_ACCELERATOR": "cuda"})
    assert "x cuda" in run.output
    assert run.losses == pytest.approx(plain.losses, rel=2e-2)
