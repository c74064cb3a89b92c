"""Low-rank adapters: trained on any backend, on a base that stays as it is, kept alone, read back merged."""

import functools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data.tokenizer import BUILT_IN
from tests.train.launching import SMALL, launch
from tests.train.released import ModelReader
from tests.train.test_compose import config_of, mistakes
from train.checkpoint import PieceReader
from train.config import MODULES
from train.export.__main__ import main as export
from train.first_weights import open_first_weights
from train.lora import LAYERS, TARGETS, LoraConfig
from train.model.initial import build_model
from train.model.llm import build_llm
from train.model.omni import module_of
from train.model.shapes import DOWN, UP, release_shapes
from train.release import release_config
from train.stored import read_result
from train.weights import StoredReader, WeightReader, write_weights

ENCODERS = ("vision_encoder", "audio_encoder")
ADAPTED = ("llm", *ENCODERS)
LORA = ("lora.rank=4", "lora.alpha=8", f"lora.modules=[{','.join(ADAPTED)}]")
STEPS = ("train.steps=4", "train.packs_per_step=4", "optim.lr=1e-2", "checkpoint.every=2")


def whole(reader) -> dict[str, torch.Tensor]:
    return {
        name: reader.read("weight", name, 0, math.prod(shape)).reshape(shape)
        for name, shape in reader.shapes.items()
    }


def result(run) -> dict[str, torch.Tensor]:
    """Returns the weights of a finished run, merged."""
    return whole(StoredReader(read_result(run.folder / "final", "run"), ""))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of released weights, fp32."""
    folder = tmp_path_factory.mktemp("base")
    config = config_of(*SMALL)
    write_weights(ModelReader(build_model(config.model, config.media, 7)), folder)
    special = {"eos_token_id": 5, "pad_token_id": 2, "dtype": "float32"}
    content = release_config(config.model, config.media, config.data.template, **special)
    (folder / "config.json").write_text(json.dumps(content))
    shutil.copy(BUILT_IN, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mixed_shards, base):
    folder = tmp_path_factory.mktemp("runs")
    words = (*SMALL, *STEPS, *LORA, f"data.path={mixed_shards}", f"model.weights={base}")

    @functools.cache
    def run(zero, processes, precision):
        own = (f"zero={zero}", f"precision={precision}")
        return launch(folder / f"{zero}-{processes}-{precision}", *words, *own, processes=processes)

    return run


@pytest.fixture(scope="module")
def plain(runs):
    return runs("none", 1, "fp32")


def adapters_of(run) -> dict[str, torch.Tensor]:
    found = load_file(run.folder / "final" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


def test_a_stage_says_what_trains_and_keeps_adapters_and_what_trained_whole(plain):
    assert plain.output.count("M in adapters of rank 4: trains at lr 0.01") == len(ADAPTED)
    assert plain.stage["lora"] == {"rank": 4, "alpha": 8.0, "targets": [], "modules": [*ADAPTED]}
    own = WeightReader(plain.folder / "final").shapes
    assert {module_of(name) for name in own} == {"vision_proj", "audio_proj"}
    config = config_of(*SMALL, *LORA)
    adapted = config.lora.weights(release_shapes(config.model, config.media))
    layers = [name.removesuffix(".weight") for name in adapted]
    found = adapters_of(plain)
    assert sorted(found) == sorted(layer + end for layer in layers for end in (DOWN, UP))
    assert all(tensor.abs().sum() > 0 for tensor in found.values())
    assert plain.losses[-1] < plain.losses[0]


@pytest.mark.parametrize("zero", ["none", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_losses_and_adapters_do_not_depend_on_ranks_or_zero(runs, plain, zero):
    spread = runs(zero, 2, "fp32")
    assert spread.losses == pytest.approx(plain.losses, rel=1e-5)
    assert spread.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
    for ours, theirs in zip(spread.records, plain.records):
        assert ours["grad_norm_by_module"] == pytest.approx(theirs["grad_norm_by_module"], rel=1e-3)
    assert adapters_of(spread).keys() == adapters_of(plain).keys()


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        ("none", "fp32"),
        pytest.param("zero2", "bf16", marks=pytest.mark.slow),
        pytest.param("zero3", "fp32", marks=pytest.mark.slow),
    ],
)
def test_what_lies_below_adapters_does_not_change_by_one_bit(runs, base, zero, precision):
    run = runs(zero, 1 if zero == "none" else 2, precision)
    trained = whole(PieceReader(run.folder / "checkpoints" / "step-00000004"))
    changed = set()
    for name, weight in whole(WeightReader(base)).items():
        rounded = (
            weight.bfloat16() if precision == "bf16" and trained[name].dtype == torch.bfloat16 else weight
        )
        if not torch.equal(trained[name], rounded):
            changed.add(module_of(name))
    assert changed == {"vision_proj", "audio_proj"}
    merged = result(run)
    config, stored = config_of(*SMALL, *LORA), whole(WeightReader(base))
    adapted = config.lora.weights(release_shapes(config.model, config.media))
    frozen = [name for name in merged if module_of(name) in ADAPTED and name not in adapted]
    assert frozen and all(torch.equal(merged[name], stored[name]) for name in frozen)


def test_an_export_is_the_base_with_adapters_merged_under_the_names_of_the_release(tmp_path, plain, base):
    export([f"run={plain.folder}", f"out={tmp_path}/out", "format=megrez", "dtype=fp32"])
    exported, stored = whole(WeightReader(tmp_path / "out")), whole(WeightReader(base))
    adapters, own = adapters_of(plain), whole(WeightReader(plain.folder / "final"))
    assert exported.keys() == stored.keys()
    for name, weight in exported.items():
        layer = name.removesuffix(".weight")
        if layer + UP in adapters:
            up, down = adapters[layer + UP].double(), adapters[layer + DOWN].double()
            expected = stored[name].double() + 2.0 * up @ down
            assert not torch.equal(weight, stored[name])
            torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(weight, own.get(name, stored[name]))


def test_an_unfinished_run_exports_what_a_finished_one_does(tmp_path, plain):
    shutil.copytree(plain.folder, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    for run, out in ((plain.folder, "finished"), (tmp_path / "run", "unfinished")):
        export([f"run={run}", f"out={tmp_path}/{out}", "format=megrez", "dtype=fp32"])
    left, right = (whole(WeightReader(tmp_path / out)) for out in ("finished", "unfinished"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Released(nn.Module):
    """The part of a released model that peft needs to find the language model in."""

    def __init__(self, llm):
        super().__init__()
        self.llm = llm

    def forward(self, ids):
        return self.llm(input_ids=ids, use_cache=False).logits


def language_model(weights: dict[str, torch.Tensor]) -> Released:
    model = Released(build_llm(config_of(*SMALL).model.llm)).eval()
    model.load_state_dict({name: weight for name, weight in weights.items() if name.startswith("llm.")})
    return model


@pytest.fixture(scope="module")
def child(tmp_path_factory, plain, mixed_shards):
    """A run of nothing but adapters, in two layers of the language model, on a run with adapters."""
    frozen = [f"tune_{name}=false" for name in MODULES if name != "llm"]
    words = (*SMALL, *frozen, "lora.rank=2", "lora.targets=[q_proj,down_proj]", f"init_from={plain.folder}")
    few = ("train.steps=2", "train.packs_per_step=2", f"data.path={mixed_shards}", "optim.lr=1e-2")
    return launch(tmp_path_factory.mktemp("child") / "run", *words, *few)


def test_peft_loads_the_adapters_onto_the_base_and_computes_the_same(plain, child):
    from peft import PeftModel

    ids = torch.arange(40)[None] * 37 % 2048
    base = result(plain)
    with torch.no_grad():
        before = language_model(base)(ids)
        merged = language_model(result(child))(ids)
        theirs = PeftModel.from_pretrained(language_model(base), child.folder / "final")
        found = theirs(ids)
    assert theirs.peft_config["default"].r == 2
    assert (merged - before).abs().max() > 1e-2
    torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_ends_bit_equal(runs, tmp_path, mixed_shards, base):
    run = runs("zero3", 2, "fp32")
    shutil.copytree(run.folder, tmp_path / "again", ignore=shutil.ignore_patterns("final", "step-00000004"))
    words = (*SMALL, *STEPS, *LORA, f"data.path={mixed_shards}", f"model.weights={base}", "zero=zero3")
    other = launch(tmp_path / "again", *words[:-1], "lora.alpha=4", code=2)
    assert "lora.alpha: 8.0 there, 4.0 now" in other.output
    again = launch(tmp_path / "again", *words, "precision=fp32", processes=2)
    assert "Goes on after step 2" in again.output and again.losses == run.losses
    left, right = adapters_of(again), adapters_of(run)
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert again.stage["weights_digest"] == run.stage["weights_digest"]


def test_a_stage_on_adapters_starts_from_both_merged_and_adds_its_own(plain, child):
    config = config_of(*SMALL, f"init_from={plain.folder}")
    before, parent = open_first_weights(config), result(plain)
    assert "  merged        " in "\n".join(before.report())
    first = whole(StoredReader(before.stored, ""))
    assert first.keys() == parent.keys() and all(torch.equal(first[name], parent[name]) for name in first)
    assert not list((child.folder / "final").glob("model*")), "frozen weights were written again"
    after, adapters = result(child), adapters_of(child)
    for name, weight in after.items():
        layer = name.removesuffix(".weight")
        if layer + UP in adapters:
            expected = parent[name] + 8.0 * adapters[layer + UP] @ adapters[layer + DOWN]
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(weight, parent[name])


def test_a_base_that_changed_or_is_gone_is_refused(plain, base, tmp_path):
    final = tmp_path / "final"
    shutil.copytree(plain.folder / "final", final)
    shutil.copytree(base, tmp_path / "base")
    kept = (final / "base.json").read_text()
    (final / "base.json").write_text(kept.replace(str(base), str(tmp_path / "base")))
    read_result(final, "run=x")
    (file,) = (tmp_path / "base").glob("model-*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"else")
    with pytest.raises(
        ValueError, match=rf"run=x: its adapters were trained on {file}, which has changed since"
    ):
        read_result(final, "run=x")
    file.unlink()
    with pytest.raises(ValueError, match=rf"run=x: its adapters were trained on {file}, and it is gone"):
        read_result(final, "run=x")


def test_weights_that_no_file_holds_are_kept_with_the_adapters(tmp_path, text_shards):
    words = (*SMALL, f"data.path={text_shards}", "train.steps=1", "train.packs_per_step=2", "lora.rank=2")
    run = launch(tmp_path / "run", *words)
    assert json.loads((run.folder / "final" / "base.json").read_text())["weights"] == {}
    config = config_of(*SMALL)
    drawn = dict(build_model(config.model, config.media, config.seed).named_parameters())
    found = result(run)
    assert found.keys() == drawn.keys()
    table = "llm.model.embed_tokens.weight"
    assert torch.equal(found[table], drawn[table])


def test_the_names_of_targets_are_those_of_every_linear_layer():
    config = config_of(*SMALL)
    shapes = release_shapes(config.model, config.media)
    for module, root in LAYERS.items():
        linear = {name for name, shape in shapes.items() if name.startswith(root) and len(shape) == 2}
        assert set(LoraConfig(rank=1, modules=[module]).weights(shapes)) == linear
        assert all(any(name.endswith(f"{end}.weight") for name in linear) for end in TARGETS[module])
    assert LoraConfig(modules=["llm"]).weights(shapes) == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lora.rank=-1"], "lora.rank=-1: must not be negative. Use 0 for no adapters, or 16."),
        (["lora.alpha=8"], "lora.alpha: lora.rank=0, so there are no adapters. Set lora.rank=16."),
        (["lora.rank=4", "lora.alpha=0"], "lora.alpha=0.0: must be above 0. Use 16."),
        (
            ["lora.rank=4", "lora.modules=[lm]"],
            "lora.modules='lm': not known. Did you mean 'llm'? Known: llm, vision_encoder, audio_encoder.",
        ),
        (
            ["lora.rank=4", "lora.modules=[vision_proj]"],
            "lora.modules='vision_proj': is a connector, which trains whole. Take it out; "
            "tune_vision_proj decides.",
        ),
        (
            ["lora.rank=4", "lora.targets=[q_prj]"],
            "lora.targets='q_prj': not known. Did you mean 'q_proj'? Known: q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj.",
        ),
        (
            ["lora.rank=4", "lora.targets=[up_proj]", "lora.modules=[llm,audio_encoder]"],
            "lora.modules: no target is a layer of audio_encoder. Name one of query, key, value, out, mlp.0, "
            "mlp.2.",
        ),
        (
            ["lora.rank=4", "tune_llm=false"],
            "lora.modules: llm is frozen. Set tune_llm=true, which trains its adapters, or take it out.",
        ),
        (
            ["recipe=demo_vision", "data=demo", "lora.rank=4", "lora.modules=[vision_encoder]"],
            "lora.rank=4: objective=patch_labels trains a tower whole. Use lora.rank=0.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(words, line):
    assert line in mistakes(*words)
