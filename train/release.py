"""The config.json of a released model folder <-> our config dataclasses. Imports no torch.

Sizes stand under the release's own names: those of Llama at the top level, those of SigLIP in
`vision_config`, those of Whisper in `audio_config`. What the release has no word for stands in one
object of our own, `trainer`; a folder without it has the release's values.

Source: Megrez-Omni (arXiv 2502.15803) and the config.json that its public inference code reads.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from data.config import AudioText, TemplateConfig
from data.geometry import AudioGeometry, ImageGeometry, LongAudio, MediaConfig
from train.model.config import AudioConfig, LLMConfig, ModelConfig, VisionConfig
from train.model.shapes import POSITIONS

CONFIG = "config.json"
ARCHITECTURE = "MegrezO"
MODEL_TYPE = "megrezo"
NAME = "megrez_3b_omni"
OWN = "trainer"
"""Key of our own object."""

LLM_NAMES = {
    "width": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "rms_norm_eps": "rms_norm_eps",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
VISION_NAMES = {
    "width": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}
AUDIO_NAMES = {"width": "n_state", "layers": "n_layer", "heads": "n_head"}

HEAD_WIDTH = 128
"""Channels of one head of the resampler, where no number of heads is given."""

ONLY: dict[str, Any] = {
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "drop_vision_last_layer": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}
"""Values that are the only ones built here, of keys that may be missing."""


def read_release(folder: Path) -> tuple[ModelConfig, MediaConfig]:
    """Returns the model and media configs of a released folder's config.json.

    Raises:
        ValueError: there is no such file, a size is missing, or a value is not supported.
    """
    return sizes_of(read_json(folder), str(folder / CONFIG))


def read_json(folder: Path) -> dict[str, Any]:
    """Returns a released folder's config.json.

    Raises:
        ValueError: it is missing, or is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file. Name a folder that holds a released model.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no JSON object. Download it again.")
    return content


def sizes_of(content: dict[str, Any], where: str = CONFIG) -> tuple[ModelConfig, MediaConfig]:
    """Returns the model and media configs that the content of a config.json describes.

    Raises:
        ValueError: a size is missing or impossible, or a value is not supported; all on lines of their own.
    """
    found = _Content(content, where)
    found.refuse_other_models()
    media = MediaConfig(image=_image(found), audio=_audio_geometry(found))
    model = ModelConfig(
        name=found.own("name", NAME), llm=_llm(found), vision=_vision(found), audio=_audio(found)
    )
    parts = {"llm": model.llm, "vision": model.vision, "audio": model.audio, "model": model}
    parts |= {"media.image": media.image, "media.audio": media.audio}
    problems = [f"{where}: {name}.{line}" for name, part in parts.items() for line in part.problems()]
    if problems:
        raise ValueError("\n".join(problems))
    return model, media


def template_of(content: dict[str, Any], where: str = CONFIG) -> TemplateConfig:
    """Returns the chat template's options in a config.json; the release's where it has none.

    Raises:
        ValueError: an option has no meaning.
    """
    found = _Content(content, where)
    known = {entry.name for entry in fields(TemplateConfig)} - {"audio_text"}
    given: dict[str, Any] = {name: found.own(name, None) for name in known}
    given = {name: value for name, value in given.items() if value is not None}
    return TemplateConfig(audio_text=found.choice("audio_text", AudioText, AudioText.append), **given)


def _llm(found: _Content) -> LLMConfig:
    sizes = {name: found.need(theirs) for name, theirs in LLM_NAMES.items()}
    heads = sizes["heads"]
    head_dim = found.content.get("head_dim") or sizes["width"] // max(heads, 1)
    kv_heads = found.content.get("num_key_value_heads") or heads
    return LLMConfig(**sizes, head_dim=head_dim, kv_heads=kv_heads, rope_theta=found.rope_theta())


def _vision(found: _Content) -> VisionConfig:
    sizes = {name: found.need(f"vision_config.{theirs}") for name, theirs in VISION_NAMES.items()}
    heads = found.own("resampler_heads", found.content.get("resampler_heads"))
    heads = heads or max(found.need("hidden_size") // HEAD_WIDTH, 1)
    return VisionConfig(**sizes, resampler_heads=heads)


def _audio(found: _Content) -> AudioConfig:
    sizes = {name: found.need(f"audio_config.{theirs}") for name, theirs in AUDIO_NAMES.items()}
    found.expect("audio_config.output_dim", found.need("hidden_size"), "it must be hidden_size")
    found.expect("audio_config.n_ctx", POSITIONS, "other windows are not built")
    found.expect("audio_config.add_audio_bos_eos_token", True, "clips without marks are not built")
    return AudioConfig(**sizes)


def _image(found: _Content) -> ImageGeometry:
    release = ImageGeometry()
    side = found.need("vision_config.image_size")
    patch = found.get("patch_size") or found.need("vision_config.patch_size")
    found.expect("vision_config.patch_size", patch, "it must be patch_size")
    return ImageGeometry(
        patch_pixels=patch,
        slice_pixels=found.slicing("scale_resolution", release.slice_pixels),
        max_slices=found.slicing("max_slice_nums", release.max_slices),
        queries=found.content.get("query_num", release.queries),
        table_side=side // patch,
        max_side_patches=found.own("max_side_patches", release.max_side_patches),
    )


def _audio_geometry(found: _Content) -> AudioGeometry:
    release = AudioGeometry()
    return AudioGeometry(
        mel_bins=found.need("audio_config.n_mels"),
        window_seconds=found.own("window_seconds", release.window_seconds),
        pool=found.get("audio_config.avg_pool", release.pool),
        long_audio=found.choice("long_audio", LongAudio, release.long_audio),
    )


class _Content:
    """The content of a config.json, asked by dotted names; `where` opens the text of every error."""

    def __init__(self, content: dict[str, Any], where: str):
        self.content = content
        self.where = where

    def get(self, path: str, default: Any = None) -> Any:
        node: Any = self.content
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return default if node is None else node

    def need(self, path: str) -> Any:
        """Returns a number; everything that decides sizes must be there."""
        value = self.get(path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            state = "is missing" if value is None else f"is {value!r}"
            raise ValueError(f"{self.where}: {path} {state}, and must be a number. Use the model's own file.")
        return value

    def own(self, name: str, default: Any) -> Any:
        return self.get(f"{OWN}.{name}", default)

    def slicing(self, name: str, default: int) -> int:
        """Returns a constant of slicing, from the top level or from `slice_config`, as related models do."""
        return self.get(name) or self.get(f"slice_config.{name}") or default

    def choice(self, name: str, kind, default):
        value = self.own(name, default.value)
        if value not in [choice.value for choice in kind]:
            known = ", ".join(choice.value for choice in kind)
            raise ValueError(f"{self.where}: {OWN}.{name}={value!r}: not a known value. Use one of {known}.")
        return kind(value)

    def rope_theta(self) -> float:
        if self.get("rope_theta") is not None:
            return float(self.need("rope_theta"))
        return float(self.need("rope_parameters.rope_theta"))

    def expect(self, path: str, value: Any, why: str) -> None:
        given = self.get(path)
        if given is not None and given != value:
            raise ValueError(f"{self.where}: {path}={given!r}: not supported, {why}. Use {value!r}.")

    def refuse_other_models(self) -> None:
        kind = self.content.get("model_type")
        if kind != MODEL_TYPE:
            raise ValueError(
                f"{self.where}: model_type={kind!r}: not a model of this kind. Use one of {MODEL_TYPE!r}."
            )
        for path, value in ONLY.items():
            self.expect(path, value, "only the release's value is built")
        self.expect("rope_parameters.rope_type", "default", "only plain rope is built")


def release_config(
    model: ModelConfig,
    media: MediaConfig,
    template: TemplateConfig | None = None,
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None,
    dtype: str,
) -> dict[str, Any]:
    """Returns the content of a config.json from which `read_release` makes the same configs.

    Args:
        dtype: torch's name of what the weights are stored in, such as `bfloat16`.
    """
    llm, image = model.llm, media.image
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(llm, ours) for ours, theirs in LLM_NAMES.items()},
        "num_key_value_heads": llm.kv_heads,
        "head_dim": llm.head_dim,
        "rope_theta": llm.rope_theta,
        **{name: value for name, value in ONLY.items() if value is not None},
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "vision_config": _vision_json(model.vision, image),
        "audio_config": _audio_json(model, media.audio),
        "query_num": image.queries,
        "patch_size": image.patch_pixels,
        "vision_batch_size": 8,
        "max_slice_nums": image.max_slices,
        "scale_resolution": image.slice_pixels,
        "torch_dtype": dtype,
        OWN: _own_json(model, media, template or TemplateConfig()),
    }


def _vision_json(vision: VisionConfig, image: ImageGeometry) -> dict[str, Any]:
    sizes = {theirs: getattr(vision, ours) for ours, theirs in VISION_NAMES.items()}
    side = image.table_side * image.patch_pixels
    return sizes | {"image_size": side, "patch_size": image.patch_pixels}


def _audio_json(model: ModelConfig, audio: AudioGeometry) -> dict[str, Any]:
    return {
        "n_mels": audio.mel_bins,
        "n_ctx": POSITIONS,
        **{theirs: getattr(model.audio, ours) for ours, theirs in AUDIO_NAMES.items()},
        "output_dim": model.llm.width,
        "avg_pool": audio.pool,
        "add_audio_bos_eos_token": True,
    }


def _own_json(model: ModelConfig, media: MediaConfig, template: TemplateConfig) -> dict[str, Any]:
    options = {entry.name: getattr(template, entry.name) for entry in fields(TemplateConfig)}
    return {
        "name": model.name,
        "resampler_heads": model.vision.resampler_heads,
        "max_side_patches": media.image.max_side_patches,
        "window_seconds": media.audio.window_seconds,
        "long_audio": media.audio.long_audio.value,
        **options,
        "audio_text": template.audio_text.value,
    }
