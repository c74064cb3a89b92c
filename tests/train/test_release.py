"""config.json of a released folder: what is written is read back, and what cannot be built is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from data.config import AudioText, TemplateConfig
from data.geometry import AudioGeometry, ImageGeometry, LongAudio, MediaConfig
from tests.train.launching import ROOT
from tests.train.tiny_model import MEDIA, tiny_config
from train.model.config import ModelConfig
from train.release import CONFIG, OWN, read_release, release_config, sizes_of, template_of

RELEASE = {
    "architectures": ["MegrezO"],
    "model_type": "megrezo",
    "hidden_size": 2560,
    "intermediate_size": 7168,
    "num_hidden_layers": 32,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000.0,
    "vocab_size": 122880,
    "max_position_embeddings": 4096,
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 980,
        "patch_size": 14,
    },
    "audio_config": {"n_mels": 128, "n_ctx": 1500, "n_state": 1280, "n_head": 20, "n_layer": 32},
    "query_num": 64,
}


def written(model, media, template=None):
    content = release_config(
        model, media, template, eos_token_id=120005, pad_token_id=120002, dtype="bfloat16"
    )
    return json.loads(json.dumps(content))


def test_what_is_written_is_read_back(tmp_path):
    media = MediaConfig(
        image=ImageGeometry(slice_pixels=112, max_slices=4, max_side_patches=50, table_side=16),
        audio=AudioGeometry(mel_bins=80, window_seconds=7, pool=False, long_audio=LongAudio.truncate),
    )
    template = TemplateConfig(
        system="", audio_text=AudioText.drop, slice_start="<|video_start|>", slice_end="<|video_end|>"
    )
    content = written(tiny_config(), media, template)
    (tmp_path / CONFIG).write_text(json.dumps(content))
    assert read_release(tmp_path) == (tiny_config(), media)
    assert template_of(content) == template
    assert content["vision_config"]["image_size"] == 16 * 14


def test_file_without_our_object_has_the_values_of_the_release():
    model, media = sizes_of(RELEASE)
    assert model == replace(ModelConfig(), name="megrez_3b_omni")
    assert media == MediaConfig() and template_of(RELEASE) == TemplateConfig()
    shared = {name: value for name, value in written(ModelConfig(), MediaConfig()).items() if name in RELEASE}
    assert shared | {"audio_config": RELEASE["audio_config"]} == RELEASE


def test_rope_theta_of_newer_files_is_found():
    content = {name: value for name, value in RELEASE.items() if name != "rope_theta"}
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": 7e6}
    assert sizes_of(content)[0].llm.rope_theta == 7e6


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"drop_vision_last_layer": True}, "drop_vision_last_layer=True: not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True: not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling={'type': 'linear'}: not supported"),
        ({"model_type": "llama"}, "model_type='llama': not a model of this kind."),
        ({"hidden_size": None}, "hidden_size is missing, and must be a number."),
        ({"vision_config": {"hidden_size": 8}}, "vision_config.image_size is missing"),
        ({"audio_config": RELEASE["audio_config"] | {"n_ctx": 750}}, "audio_config.n_ctx=750: not supported"),
        ({OWN: {"long_audio": "slit"}}, "trainer.long_audio='slit': not a known value."),
        ({"num_key_value_heads": 7}, "llm.kv_heads=7: must divide heads=40."),
    ],
)
def test_what_is_not_built_is_refused_by_name(change, problem):
    with pytest.raises(ValueError) as error:
        sizes_of(RELEASE | change)
    assert str(error.value).startswith(f"{CONFIG}: {problem}")


def test_folder_without_or_with_a_broken_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_release(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_release(tmp_path)


def test_no_torch_is_imported():
    code = "import sys, train.release; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tiny_sizes_survive():
    assert sizes_of(written(tiny_config(), MEDIA)) == (tiny_config(), MEDIA)
