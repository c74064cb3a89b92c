"""Laws of numerics, on real runs of `train.py`: what must not change a loss or a gradient."""

import functools
import shutil

import pytest
import torch

from tests.train.launching import SMALL, launch
from train.model.initial import build_model
from train.model.omni import module_of

TOLERANCE = 1e-5
STEPS = ("train.steps=4", "train.packs_per_step=4", "optim.lr=1e-3")


def same(a, b, tolerance=TOLERANCE):
    assert len(a) == len(b)
    for left, right in zip(a, b):
        assert left == pytest.approx(right, rel=tolerance), (a, b)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mixed_shards):
    """Runs over the mixed shards, each made once: the plain one is what the others must equal."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(zero, processes, micro, precision="fp32"):
        words = (*SMALL, *STEPS, f"data.path={mixed_shards}", f"zero={zero}", f"precision={precision}")
        name = f"{zero}-{processes}-{micro}-{precision}"
        return launch(folder / name, *words, f"train.micro_batch_packs={micro}", processes=processes)

    return run


@pytest.fixture(scope="module")
def plain(runs):
    return runs("none", 1, 4)


def test_loss_and_gradients_do_not_depend_on_the_micro_batch(runs, plain):
    cut = runs("none", 1, 1)
    same(cut.losses, plain.losses)
    same(cut.grad_norms, plain.grad_norms)


def offloaded(zero):
    # DeepSpeed builds its CPU optimizer at the first use, once a machine.
    missing = shutil.which("g++") is None
    needs_compiler = pytest.mark.skipif(missing, reason="needs a C++ compiler (g++)")
    return pytest.param(zero, 1, marks=[pytest.mark.slow, needs_compiler])


@pytest.mark.parametrize(
    ("zero", "micro"),
    [
        ("none", 2),
        pytest.param("zero1", 1, marks=pytest.mark.slow),
        ("zero2", 1),
        ("zero3", 2),
        offloaded("zero2_offload"),
        offloaded("zero3_offload"),
    ],
)
def test_loss_and_gradients_do_not_depend_on_ranks_or_zero(runs, plain, zero, micro):
    spread = runs(zero, 2, micro)
    same(spread.losses, plain.losses)
    same(spread.grad_norms, plain.grad_norms)
    for ours, theirs in zip(spread.records, plain.records):
        assert ours["grad_norm_by_module"] == pytest.approx(theirs["grad_norm_by_module"], rel=1e-4)
        assert ours["loss_by_source"] == pytest.approx(theirs["loss_by_source"], rel=TOLERANCE)
        assert ours["loss_by_modality"] == pytest.approx(theirs["loss_by_modality"], rel=TOLERANCE)


def test_one_process_of_zero_equals_plain_training(runs, plain):
    alone = runs("zero2", 1, 2)
    same(alone.losses, plain.losses)
    same(alone.grad_norms, plain.grad_norms)


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(tmp_path, mixed_shards, plain):
    every = [f"model.recompute.{module}=true" for module in ("llm", "vision_encoder", "audio_encoder")]
    words = (*SMALL, *STEPS, *every, f"data.path={mixed_shards}", "zero=zero3")
    recomputed = launch(tmp_path / "run", *words, processes=2)
    same(recomputed.losses, plain.losses)
    same(recomputed.grad_norms, plain.grad_norms)


@pytest.mark.slow
def test_a_loss_weighted_by_sample_does_not_depend_on_ranks(tmp_path, mixed_shards, plain):
    words = (*SMALL, *STEPS, f"data.path={mixed_shards}", "train.loss=sqrt")
    alone = launch(tmp_path / "alone", *words, "train.micro_batch_packs=4")
    spread = launch(tmp_path / "spread", *words, "zero=zero2", processes=2)
    same(spread.losses, alone.losses)
    same(spread.grad_norms, alone.grad_norms)
    assert alone.losses != plain.losses


@pytest.mark.slow
def test_bf16_stays_near_fp32_on_every_backend(runs, plain):
    for zero, processes in (("none", 1), ("zero2", 2)):
        same(runs(zero, processes, 1, "bf16").losses, plain.losses, tolerance=2e-2)


def test_loss_and_gradients_do_not_depend_on_the_packing(tmp_path, text_shards):
    # Every sample is in the one step of the epoch, laid into rows of another length.
    words = (*SMALL, f"data.path={text_shards}", "train.epochs=1", "optim.lr=1e-3")
    short = launch(tmp_path / "short", *words, "data.pack.length=128", "train.packs_per_step=32")
    long = launch(tmp_path / "long", *words, "data.pack.length=512", "train.packs_per_step=8")
    alone = launch(
        tmp_path / "alone", *words, "data.pack.length=128", "train.packs_per_step=24", "data.pack.buffer=1"
    )
    assert short.stage["steps"] == long.stage["steps"] == alone.stage["steps"] == 1
    assert short.stage["samples"] == long.stage["samples"] == {"good": 24, "bad": 0}
    same(long.losses + alone.losses, short.losses * 2)
    same(long.grad_norms + alone.grad_norms, short.grad_norms * 2)


@pytest.fixture(scope="module")
def rare_shards(tmp_path_factory):
    """One picture and one clip among text, so that some steps have media and most have none."""
    from tests.records import prepare, write_records

    folder = tmp_path_factory.mktemp("rare")
    kinds = ["text"] * 20 + ["image", "audio"] + ["text"] * 20
    return prepare(write_records(folder / "records", kinds, seed=3), folder / "shards")


def test_ranks_and_steps_without_media_neither_hang_nor_change_the_result(tmp_path, rare_shards):
    words = (*SMALL, f"data.path={rare_shards}", "train.steps=6", "train.packs_per_step=2", "optim.lr=1e-3")
    plain = launch(tmp_path / "plain", *words, "data.pack.buffer=4")
    modalities = [set(record["loss_by_modality"]) for record in plain.records]
    assert {"text"} in modalities, "no step without any media"
    assert set().union(*modalities) == {"text", "image", "audio"}
    for zero in ("zero2", "zero3"):
        spread = launch(tmp_path / zero, *words, "data.pack.buffer=4", f"zero={zero}", processes=2)
        same(spread.losses, plain.losses)
        same(spread.grad_norms, plain.grad_norms)


@pytest.mark.parametrize("zero", ["none", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_frozen_modules_do_not_change_by_one_bit_and_tuned_ones_do(tmp_path, picture_shards, zero):
    words = (*SMALL, "recipe=vision_tune", "data.tags=[]", f"data.path={picture_shards}", *STEPS)
    run = launch(tmp_path / "run", *words, f"zero={zero}", processes=1 if zero == "none" else 2)
    from tests.train.test_compose import config_of

    config = config_of(*SMALL)
    before = dict(build_model(config.model, config.media, config.seed).named_parameters())
    after = run.weights()
    assert set(after) == set(before)
    assert run.stage["tuned"] == ["vision_encoder", "vision_proj"]
    changed = set()
    for name, weight in after.items():
        if not torch.equal(weight, before[name].detach().reshape(-1)):
            changed.add(module_of(name))
    assert changed == {"vision_encoder", "vision_proj"}
