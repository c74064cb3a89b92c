"""Where a stage's first weights come from: parts and releases that fit are read, others refused by name."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.train import native_parts
from tests.train.native_parts import SMALL_SIDE, write_parts
from tests.train.released import write_release
from tests.train.test_vision import square
from tests.train.tiny_model import LLM, MEDIA, make_batch, make_sample, mixed_samples, tiny_config
from train.config import RunConfig
from train.first_weights import PATCH_POSITIONS, WORDS, open_first_weights
from train.model.config import PartsConfig
from train.model.initial import RandomWeights, build_model
from train.model.omni import MegrezOmni, meta_model
from train.model.shapes import release_shapes
from train.weights import FirstWeightsReader, grow_rows, interpolate_positions


def config_of(media=MEDIA, **changes) -> RunConfig:
    return RunConfig(stage="vision_align", model=replace(tiny_config(), **changes), media=media)


def loaded(config: RunConfig) -> MegrezOmni:
    """Returns a model with the weights that a run of `config` would start from."""
    model = meta_model(config.model, config.media)
    reader = FirstWeightsReader(open_first_weights(config), RandomWeights(model, config.seed))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read("weight", name, 0, parameter.numel()).reshape(parameter.shape))
    return model.eval()


def refusal(config: RunConfig) -> str:
    with pytest.raises(ValueError) as error:
        open_first_weights(config)
    return str(error.value)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return folder, write_parts(folder)


def all_parts(folder: Path) -> PartsConfig:
    return PartsConfig(**{name: str(folder / name) for name in ("llm", "vision_encoder", "audio_encoder")})


def test_shapes_by_arithmetic_are_those_of_the_model():
    config = tiny_config()
    model = meta_model(config, MEDIA)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert release_shapes(config, MEDIA) == expected


@torch.no_grad()
def test_a_language_model_of_its_own_folder_gives_the_same_logits(parts):
    folder, native = parts
    model = loaded(config_of(parts=PartsConfig(llm=str(folder / "llm"))))
    ids = torch.randint(0, LLM.vocab, (1, 40))
    assert_close(model.llm(ids).logits, native["llm"](ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_vision_encoder_of_its_own_folder_gives_the_same_features(parts):
    folder, native = parts
    model = loaded(config_of(parts=all_parts(folder)))
    side = MEDIA.image.table_side
    image = torch.randint(0, 256, (3, side * 14, side * 14), dtype=torch.uint8)
    pixels = ((image - 127.5) / 127.5)[None]
    output = native["vision_encoder"](pixel_values=pixels, interpolate_pos_encoding=True)
    assert side != SMALL_SIDE
    assert_close(model.vision.vpm(square(side, image)), output.last_hidden_state[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_audio_encoder_of_its_own_folder_gives_the_same_features(parts):
    folder, native = parts
    unpooled = replace(MEDIA, audio=replace(MEDIA.audio, pool=False))
    model = loaded(config_of(unpooled, parts=PartsConfig(audio_encoder=str(folder / "audio_encoder"))))
    mel = torch.randn(MEDIA.audio.mel_bins, 3000)
    sample = make_sample(1, 8, clips=[1500])
    sample.clips, sample.clip_tokens = [mel.numpy()], [1500]
    from data.collate import collate

    batch = collate([[sample]], 2048, unpooled, 0, "token")
    features = model.audio.audio(batch.audio, project=False)
    expected = native["audio_encoder"].model.encoder(mel[None]).last_hidden_state[0]
    assert_close(features, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["siglip", "whisper_encoder"])
def test_a_whole_model_and_a_bare_encoder_are_read_alike(tmp_path, kind):
    part = getattr(native_parts, kind)(*([8] if kind == "siglip" else []))
    part.save_pretrained(tmp_path)
    if kind == "siglip":
        name, ours, theirs = (
            "vision_encoder",
            PATCH_POSITIONS,
            "vision_model.embeddings.position_embedding.weight",
        )
    else:
        name, ours, theirs = (
            "audio_encoder",
            "audio.audio.blocks.1.attn.key.weight",
            "layers.1.self_attn.k_proj.weight",
        )
    model = loaded(config_of(parts=PartsConfig(**{name: str(tmp_path)})))
    assert torch.equal(model.get_parameter(ours), load_file(tmp_path / "model.safetensors")[theirs])


def test_connectors_are_drawn_as_in_a_model_of_its_own_and_the_report_says_all(parts):
    folder, _ = parts
    config = config_of(parts=all_parts(folder))
    model, fresh = loaded(config), build_model(config.model, config.media, config.seed)
    drawn = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(("vision.resampler", "audio.audio.proj"))
    ]
    assert drawn and all(torch.equal(model.get_parameter(n), fresh.get_parameter(n)) for n in drawn)
    report = "\n".join(open_first_weights(config).report())
    assert f"interpolated  {PATCH_POSITIONS}: {SMALL_SIDE} x {SMALL_SIDE} to 8 x 8" in report
    assert "drawn         16 tensors (vision.resampler.query" in report
    assert "left out      39 tensors (head.attention" in report


def test_a_tied_output_layer_is_the_table_of_words(tmp_path):
    native_parts.llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = loaded(config_of(parts=PartsConfig(llm=str(tmp_path))))
    assert torch.equal(model.llm.lm_head.weight, model.llm.model.embed_tokens.weight)


def test_new_words_are_the_mean_of_the_others(tmp_path):
    native_parts.llama(vocab_size=LLM.vocab - 5).save_pretrained(tmp_path)
    config = config_of(parts=PartsConfig(llm=str(tmp_path)))
    model, stored = loaded(config), load_file(tmp_path / "model.safetensors")
    for ours, theirs in zip(WORDS, ("model.embed_tokens.weight", "lm_head.weight")):
        table = model.get_parameter(ours)
        assert torch.equal(table[:-5], stored[theirs])
        assert_close(table[-5:], stored[theirs].mean(0).expand(5, -1))
    report = "\n".join(open_first_weights(config).report())
    assert f"grown         {WORDS[0]}: 2043 to 2048 rows" in report


def test_growing_and_interpolating_keep_what_is_there():
    table = torch.randn(49, 6)
    assert torch.equal(grow_rows(table, 52)[:49], table)
    assert_close(interpolate_positions(table, 49), table)
    flat = torch.ones(25, 3) * torch.tensor([1.0, 2.0, 3.0])
    assert_close(interpolate_positions(flat, 64), flat[:1].expand(64, -1))


def test_a_release_is_read_bit_by_bit_and_any_range_alone(tmp_path):
    model = write_release(tmp_path / "release")
    config = config_of(weights=str(tmp_path / "release"))
    again = loaded(config)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(one, other), name
    reader = FirstWeightsReader(open_first_weights(config), RandomWeights(model, 0))
    name = "vision.vpm.embeddings.patch_embedding.weight"
    flat = model.get_parameter(name).detach().reshape(-1)
    for start, stop in [(0, 1), (587, 589), (100, flat.numel()), (588, 1176)]:
        assert torch.equal(reader.read("weight", name, start, stop), flat[start:stop])


# What does not fit.


def damaged(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "header":
        path.write_bytes(struct.pack("<Q", 50) + b"{" * 50)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        path.rename(folder / "pytorch_model.bin")
    elif how == "gone":
        path.unlink()
    elif how == "index":
        index = {"weight_map": {"lm_head.weight": "model.safetensors", "x": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "config":
        (folder / "config.json").write_text("{")
    else:
        change_tensors(folder, how)


def change_tensors(folder: Path, how: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    if how == "shape":
        tensors["model.norm.weight"] = torch.ones(63)
    elif how == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.layers.0.mlp.gate_up.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "bytes, but its header promises"),
        ("header", "model.safetensors is damaged or cut short"),
        ("empty", "model.safetensors is damaged or cut short"),
        ("pickle", "holds pytorch_model.bin and no safetensors"),
        ("gone", "holds neither model.safetensors nor"),
        ("index", "model-2.safetensors is missing"),
        ("config", "config.json is damaged"),
        ("shape", "model.norm.weight has shape [63], the model's is [64]"),
        ("missing", "lacks llm.model.norm.weight"),
        ("unexpected", "holds model.layers.0.mlp.gate_up.weight, which the model has no place for"),
    ],
)
def test_a_damaged_part_is_refused_by_name(tmp_path, how, said):
    native_parts.llama().save_pretrained(tmp_path)
    damaged(tmp_path, how)
    text = refusal(config_of(parts=PartsConfig(llm=str(tmp_path))))
    assert said in text and text.startswith("model.parts")


def test_what_is_named_may_be_missing_or_too_much(tmp_path):
    native_parts.llama().save_pretrained(tmp_path)
    change_tensors(tmp_path, "missing")
    change_tensors(tmp_path, "unexpected")
    parts = PartsConfig(llm=str(tmp_path))
    named = config_of(parts=parts, fresh=["llm.model.norm"], ignore=["model.layers.0.mlp.gate_up"])
    first = open_first_weights(named)
    assert "llm.model.norm.weight" in first.drawn
    assert first.left_out == ["model.layers.0.mlp.gate_up.weight"]
    assert "'llm.nrm' begins no weight's name" in refusal(config_of(parts=parts, fresh=["llm.nrm"]))


def test_folders_of_other_models_are_refused_together(tmp_path, parts):
    folder, _ = parts
    swapped = PartsConfig(
        llm=str(folder / "audio_encoder"),
        vision_encoder=str(tmp_path / "no"),
        audio_encoder=str(folder / "llm"),
    )
    lines = refusal(config_of(parts=swapped)).splitlines()
    assert lines == [
        f"model.parts.llm={folder / 'audio_encoder'}: is a model of type 'whisper'. Name one of type llama.",
        f"model.parts.vision_encoder={tmp_path / 'no'}: there is no such folder. Name a folder that holds "
        "model.safetensors or model.safetensors.index.json.",
        f"model.parts.audio_encoder={folder / 'llm'}: is a model of type 'llama'. Name one of type whisper.",
    ]


def test_a_part_of_another_size_is_refused_with_every_difference(tmp_path):
    native_parts.llama(num_hidden_layers=1, rms_norm_eps=1e-6).save_pretrained(tmp_path)
    where = f"model.parts.llm={tmp_path}"
    assert refusal(config_of(parts=PartsConfig(llm=str(tmp_path)))).splitlines() == [
        f"{where}: has layers 1, where model.llm.layers is 2. Use one for both.",
        f"{where}: has rms_norm_eps 1e-06, where model.llm.rms_norm_eps is 1e-05. Use one for both.",
    ]


def test_a_release_of_another_size_is_refused_with_every_difference(tmp_path):
    write_release(tmp_path / "release")
    config = config_of(weights=str(tmp_path / "release"), llm=replace(LLM, layers=3, vocab=1024))
    text = refusal(config)
    assert "  model.llm.layers: 2 there, 3 now" in text and "  model.llm.vocab: 2048 there, 1024 now" in text


def test_a_release_grows_by_new_words(tmp_path):
    stored = write_release(tmp_path / "release").llm.lm_head.weight
    config = config_of(weights=str(tmp_path / "release"), llm=replace(LLM, vocab=2050))
    table = loaded(config).llm.lm_head.weight
    assert torch.equal(table[:2048], stored)
    assert_close(table[2048:], stored.mean(0).expand(2, -1))


def test_another_slicing_than_the_releases_is_no_other_model(tmp_path):
    write_release(tmp_path / "release")
    media = replace(MEDIA, image=replace(MEDIA.image, max_slices=2))
    assert not open_first_weights(config_of(media, weights=str(tmp_path / "release"))).drawn


def test_weights_are_told_from_others_without_reading_all_of_them(tmp_path):
    write_release(tmp_path / "one", seed=0)
    write_release(tmp_path / "same", seed=0)
    write_release(tmp_path / "other", seed=1)
    prints = [
        open_first_weights(config_of(weights=str(tmp_path / n))).digest for n in ("one", "same", "other")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_two_beginnings_at_once_are_refused():
    config = config_of(weights="a", parts=PartsConfig(llm="b"))
    assert config.model.problems() == ["parts.llm=b: model.weights=a is set too. Set one of them."]
    config = config_of(weights="a")
    config.init_from = "runs/x"
    config.parents = ["x"]
    assert "model.weights=a: init_from=runs/x is set too. Set one of them." in config.problems()
    assert config_of(fresh=["llm."]).model.problems()


def test_a_batch_runs_on_assembled_parts(parts):
    model = loaded(config_of(parts=all_parts(parts[0])))
    with torch.no_grad():
        assert model(make_batch([mixed_samples()])).loss_sum.isfinite()
