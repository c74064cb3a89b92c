"""Exported folders: tensors are the source's, and transformers computes with them what the trainer does."""

import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from data.config import DataConfig
from data.encode import Encoder
from data.formats import megrez
from data.media import audio_num_samples, image_size
from data.prompt import collate_prompts
from data.records import FolderMedia
from data.sample import MediaSize, Sample
from data.tokenizer import load_tokenizer
from tests.train.launching import ROOT, SMALL, environment, launch
from tests.train.released import conversations, write_release
from tests.train.test_omni import release_shapes
from tests.train.tiny_model import MEDIA, tiny_config
from train.answers import STOPS
from train.export.__main__ import main
from train.export.folder import export
from train.export.request import read_request
from train.generate import generate
from train.release import read_json, read_release
from train.weights import INDEX, WeightReader, plan_shards, weight_index

NEW = 8
NAMES = [
    r"llm\.(model\.(embed_tokens|norm)|lm_head)\.weight",
    r"llm\.model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight",
    r"llm\.model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight",
    r"llm\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
    r"vision\.vpm\.embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)",
    r"vision\.vpm\.encoder\.layers\.\d+\.layer_norm[12]\.(weight|bias)",
    r"vision\.vpm\.encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)\.(weight|bias)",
    r"vision\.vpm\.encoder\.layers\.\d+\.mlp\.fc[12]\.(weight|bias)",
    r"vision\.vpm\.post_layernorm\.(weight|bias)",
    r"vision\.resampler\.(query|proj|kv_proj\.weight|attn\.in_proj_(weight|bias))",
    r"vision\.resampler\.(attn\.out_proj|ln_q|ln_kv|ln_post)\.(weight|bias)",
    r"audio\.audio\.(conv1|conv2|ln_post|proj)\.(weight|bias)",
    r"audio\.audio\.(positional_embedding|audio_bos_eos_token\.weight)",
    r"audio\.audio\.blocks\.\d+\.(attn_ln|mlp_ln|attn\.(query|value|out)|mlp\.[02])\.(weight|bias)",
    r"audio\.audio\.blocks\.\d+\.attn\.key\.weight",
]


def run_export(*words):
    return export(read_request(list(words)))


def tensors_of(folder):
    reader = WeightReader(folder)
    return {name: reader.read("weight", name, 0, 2**62).view(reader.shapes[name]) for name in reader.names()}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A released folder, its model, conversations, and the folder that transformers loads."""
    folder = tmp_path_factory.mktemp("export")
    model = write_release(folder / "release")
    talks = conversations(folder / "media")
    (folder / "talks.json").write_text(json.dumps(talks))
    words = (f"weights={folder}/release", f"out={folder}/omni", "format=transformers")
    run_export(*words, "dtype=fp32", "max_shard=500KB")
    return SimpleNamespace(folder=folder, model=model, talks=talks)


def use(made, packages=()):
    """Returns what another process, which does not know this project, gets from the export."""
    out = made.folder / f"used-{len(packages)}.safetensors"
    script = made.folder / "use_export.py"
    shutil.copy(ROOT / "tests" / "train" / "use_export.py", script)
    command = [sys.executable, "-I", str(script), str(made.folder / "omni"), str(made.folder / "talks.json")]
    env = environment() | {"HF_HOME": str(made.folder / f"home{len(packages)}"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(out), *packages], cwd=made.folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with safe_open(out, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = file.metadata()
    return SimpleNamespace(tensors=tensors, version=facts["version"], answers=json.loads(facts["answers"]))


@pytest.fixture(scope="module")
def used(made):
    return use(made)


@pytest.fixture(scope="module")
def expected(made):
    """What the trainer computes from the same files."""
    return {name: trained(made, [talk]) for name, talk in made.talks.items()}


def trained(made, talks):
    encoder = Encoder(DataConfig(), MEDIA, load_tokenizer(None))
    batch = collate_prompts([encode(talk, encoder, made.folder) for talk in talks], encoder)
    stop = {encoder.tokenizer.special(name) for name in STOPS}
    with torch.no_grad():
        logits = made.model.logits(batch)[0]
    answers = generate(made.model, batch, stop=stop, max_new_tokens=NEW)
    return SimpleNamespace(ids=batch.input_ids[0], logits=logits, tokens=answers)


def encode(talk, encoder, folder):
    """Returns the encoded prompt of a record whose last answer is to be found."""
    limits = encoder.config.limits
    media = FolderMedia(str(folder), limits)
    messages = megrez({"conversations": [*talk, {"role": "assistant", "content": "?"}]}, media)
    sample = Sample("key", messages, media.inlined)
    sizes = {
        name: MediaSize("audio", num_samples=audio_num_samples(data, limits))
        if name.endswith(".wav")
        else MediaSize("image", *image_size(data, limits))
        for name, data in media.inlined.items()
    }
    return encoder.fill(encoder.lay_out_prompt(sample, sizes), sample, "", sizes)


def check_parity(used, expected):
    """Logits within 1e-5 of the trainer's, alone and in a padded batch, and the same greedy tokens."""
    text = load_tokenizer(None)
    for row, (name, wanted) in enumerate(expected.items()):
        assert used.tensors[f"{name}/ids"][0].tolist() == wanted.ids.tolist(), name
        length, (tokens,) = len(wanted.ids), wanted.tokens
        for logits in (used.tensors[f"{name}/logits"][0], used.tensors["batch/logits"][row, -length:]):
            difference = (logits - wanted.logits).abs().max().item()
            print(f"{used.version} {name}: {difference:.1e} of {wanted.logits.abs().max().item():.1f}")
            torch.testing.assert_close(logits, wanted.logits, atol=1e-5, rtol=1e-5)
        for found in (used.tensors[f"{name}/tokens"][0], used.tensors["batch/tokens"][row]):
            assert found[-NEW:][: len(tokens)].tolist() == tokens, name
        for answer in (used.answers[name], used.answers["batch"][row]):
            assert answer == re.sub(r"<\|\w+\|>", "", text.decode(tokens)), name


def test_transformers_computes_what_the_trainer_does(used, expected):
    assert used.version.startswith("5.")
    check_parity(used, expected)
    assert isinstance(used.answers["drawn"], str)


@pytest.mark.slow
def test_transformers_4_computes_the_same(made, expected):
    packages = transformers_4()
    found = use(made, packages=[str(packages)])
    assert found.version.startswith("4.")
    check_parity(found, expected)


def transformers_4():
    """Returns a folder with the newest transformers 4, kept between sessions."""
    folder = Path(tempfile.gettempdir()) / "omni-trainer-transformers-4"
    if folder.is_dir():
        return folder
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    wanted = ("transformers>=4.57,<5", "huggingface_hub<1", "tokenizers>=0.22,<0.23")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=600)
    if done.returncode:
        shutil.rmtree(partial)
        pytest.skip(f"no package registry: {done.stderr.strip().splitlines()[-1]}")
    return partial.rename(folder)


def test_bf16_computes_what_the_trainer_does_in_bf16(made, used):
    half = SimpleNamespace(model=copy.deepcopy(made.model).bfloat16(), folder=made.folder)
    for name, talk in made.talks.items():
        wanted, logits = trained(half, [talk]).logits, used.tensors[f"{name}/bf16"][0]
        assert logits.dtype == wanted.dtype == torch.bfloat16
        difference = (logits.float() - wanted.float()).abs().max().item()
        print(f"bf16 {name}: {difference:.1e}")
        assert difference < 0.1, name


def test_chat_template_has_the_text_of_a_prompt(used):
    text = used.answers["template"]
    assert text.startswith(
        "<|role_start|>system<|role_end|>Be brief.<|turn_end|><|role_start|>user<|role_end|>"
    )
    assert "<|image_start|><|image_pad|><|image_end|>\nAnd this?<|turn_end|>" in text
    assert "Audio 2: <|audio_start|><|audio_pad|><|audio_end|>\nAre you sure?" in text
    assert text.endswith("<|turn_end|><|role_start|>assistant<|role_end|>")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_export_of_an_export_is_bit_equal(made, tmp_path, dtype):
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = run_export(f"weights={made.folder}/release", f"out={once}", "format=megrez", f"dtype={dtype}")
    words = (f"weights={once}", f"out={twice}", "format=megrez", f"dtype={dtype}", "max_shard=300KB")
    second = run_export(*words)
    assert same(tensors_of(once), tensors_of(twice))
    assert second["shards"] > 3 and second["bytes"] == first["bytes"]
    assert json.loads((twice / INDEX).read_text())["metadata"]["total_size"] == first["bytes"]
    if dtype == "fp32":
        assert same(tensors_of(once), tensors_of(made.folder / "release"))
    assert read_json(once)["torch_dtype"] == "float32"  # a release's config goes along as it is
    assert all(any(re.fullmatch(pattern, name) for pattern in NAMES) for name in tensors_of(once))
    for name in ("config.json", "modeling_megrezo.py", "notes.txt", "tokenizer.json"):
        assert (twice / name).read_bytes() == (made.folder / "release" / name).read_bytes()
    assert (once / "README.release.md").read_text() == "A release.\n"


def test_transformers_form_has_the_same_weights_and_its_own_code(made):
    target = made.folder / "omni"
    assert same(tensors_of(target), tensors_of(made.folder / "release"))
    assert read_release(target) == (tiny_config(), MEDIA)
    assert read_json(target)["auto_map"]["AutoModelForCausalLM"] == "modeling_megrezo.MegrezO"
    assert "class MegrezO(" in (target / "modeling_megrezo.py").read_text()
    assert (target / "notes.txt").is_file()
    code = "".join(path.read_text() for path in target.glob("*.py"))
    assert not re.search(r"^\s*(from|import) (data|train|omegaconf|hydra|accelerate|deepspeed)\b", code, re.M)


def test_release_in_bf16_has_8018319840_bytes_in_1231_tensors():
    shapes = release_shapes()
    shards = plan_shards(shapes, itemsize=2)
    index = weight_index(shards, shapes, itemsize=2)
    assert index["metadata"]["total_size"] == 8_018_319_840
    assert len(index["weight_map"]) == 1231 and len(shards) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, mixed_shards):
    """A run of one step on two ranks under ZeRO-3."""
    words = (*SMALL, "zero=zero3", f"data.path={mixed_shards}", "train.steps=1", "train.packs_per_step=2")
    return launch(tmp_path_factory.mktemp("exported") / "run", *words, processes=2)


@pytest.mark.parametrize("form", ["megrez", "transformers"])
def test_run_is_exported_from_its_last_checkpoint_as_from_its_end(run, tmp_path, form):
    young = tmp_path / "young"
    shutil.copytree(run.folder, young, ignore=shutil.ignore_patterns("final"))
    for name, folder in {"end": run.folder, "checkpoint": young}.items():
        result = run_export(f"run={folder}", f"out={tmp_path / name}", f"format={form}", "dtype=fp32")
        assert result["step"] == 1
    weights = {name: weight.view(-1) for name, weight in tensors_of(tmp_path / "end").items()}
    assert same(weights, run.weights())
    assert same(tensors_of(tmp_path / "end"), tensors_of(tmp_path / "checkpoint"))
    card = (tmp_path / "end" / "README.md").read_text()
    stage = run.stage
    assert "| recipe | omni_sft |" in card and "| steps | 1 |" in card
    assert stage["weights_digest"] in card and stage["data_digest"] in card and '"loss"' in card
    assert "the newest checkpoint" in (tmp_path / "checkpoint" / "README.md").read_text()
    assert (tmp_path / "end" / "processor_config.json").is_file() == (form == "transformers")
    model, media = read_release(tmp_path / "end")
    assert (model.llm.width, media.image.queries) == (64, 4)


def test_command_prints_json_and_refuses_a_folder_in_use(made, tmp_path, capsys):
    words = [f"weights={made.folder}/release", f"out={tmp_path}/out", "format=megrez", "--json"]
    main(words)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["format"], found["dtype"], found["shards"]) == ("megrez", "bf16", 1)
    assert "GB written" in printed.err
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    text = f"out={tmp_path}/out: is there already, and not empty. Name a new folder.\n"
    assert capsys.readouterr().err == text


def test_weights_of_another_model_are_refused_and_nothing_is_left(made, tmp_path):
    folder = tmp_path / "wrong"
    shutil.copytree(made.folder / "release", folder)
    content = read_json(folder) | {"intermediate_size": 100}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"weight llm\.model\.layers\.0\.mlp\.down_proj\.weight has shape"):
        run_export(f"weights={folder}", f"out={tmp_path}/out", "format=megrez")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("run=x format=megrez", "out: it is not set."),
        ("run=x out=y", "format: it is not set."),
        (
            "run=x out=y format=transfomers",
            "format='transfomers': not a known value. Did you mean 'transform",
        ),
        ("run=x out=y format=megrez dtype=fp16", "dtype='fp16': not a known value."),
        ("run=x out=y format=megrez max_shard=5XB", "max_shard=5XB: is no size."),
        ("run=x out=y format=megrez max_shards=5", "max_shards: not a known key. Did you mean 'max_shard'?"),
        ("run=x out=y format", "format: is not KEY=VALUE."),
        ("run=x run=y out=z format=megrez", "run=y: run is given twice."),
        ("run=x weights=w out=y format=megrez", "weights=w: run=x is set too."),
        ("run=x out=y format=megrez", "run=x: holds no config.yaml."),
        ("weights=w out=y format=megrez", "weights=w: holds no config.json."),
    ],
)
def test_mistakes_are_refused_by_name(words, problem):
    with pytest.raises(ValueError) as error:
        read_request(words.split())
    assert str(error.value).startswith(problem)


def test_mistakes_are_refused_before_torch_is_imported(made):
    words = f"weights={made.folder}/release out=nowhere format=megrez"
    code = (
        "import sys\nfrom train.export.request import read_request\n"
        f"read_request({words.split()!r})\nimport train.export\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
