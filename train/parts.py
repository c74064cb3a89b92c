"""Released language models, vision and audio encoders in transformers' own layouts. Never imports torch.

Each part of a first-stage model may come from a folder as `save_pretrained` writes it. What is known
of a layout here: how its names read in ours, what of it this model has no use for, and which facts of
its config.json must be those of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.geometry import MediaConfig
from train.model.config import ModelConfig
from train.model.shapes import POSITIONS

Facts = dict[str, tuple[Any, Any]]
"""By our config path: the folder's value and the model's."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of folder.

    Args:
        kinds: `model_type`s of config.json that are this kind.
        node: the part of config.json that describes it, where the file describes more.
        anchor: a tensor that every such folder holds; what stands before it is the prefix of all.
        rename: from a name without prefix to ours, or None for what has no place in this model.
        facts: what must agree.
    """

    kinds: tuple[str, ...]
    node: str
    anchor: str
    rename: Callable[[str], str | None]
    facts: Callable[[dict[str, Any], ModelConfig, MediaConfig], Facts]

    def names(self, tensors: list[str], where: str) -> dict[str, str]:
        """Returns the folder's tensors by our names; those without a place in this model are left out.

        Raises:
            ValueError: the folder does not hold such a part.
        """
        prefixes = [name.removesuffix(self.anchor) for name in tensors if name.endswith(self.anchor)]
        if not prefixes:
            raise ValueError(
                f"{where}: holds no tensor {self.anchor}. Name a folder of type {self.kinds[0]}."
            )
        prefix = min(prefixes, key=len)
        ours = {name: self.rename(name.removeprefix(prefix)) for name in tensors if name.startswith(prefix)}
        return {name: theirs for theirs, name in ours.items() if name is not None}


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Returns the folder's config.json.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{where}: holds no config.json. Name a folder as transformers' save_pretrained writes it."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{where}: config.json is damaged ({error}). Copy the folder again.") from error
    return config if isinstance(config, dict) else {}


def refuse_part(part: str, folder: Path, model: ModelConfig, media: MediaConfig, where: str) -> list[str]:
    """Returns how a folder's config.json and the model differ, a line each."""
    layout = LAYOUTS[part]
    config = read_config(folder, where)
    kind = config.get("model_type")
    if kind not in layout.kinds:
        return [f"{where}: is a model of type {kind!r}. Name one of type {' or '.join(layout.kinds)}."]
    facts = layout.facts(config.get(layout.node, config), model, media)
    return [
        f"{where}: has {path.rpartition('.')[2]} {theirs}, where {path} is {ours}. Use one for both."
        for path, (theirs, ours) in facts.items()
        if theirs != ours
    ]


def is_tied(folder: Path, where: str) -> bool:
    """Returns whether a language model's output layer is its table of words."""
    return bool(read_config(folder, where).get("tie_word_embeddings"))


def _llm_facts(config: dict[str, Any], model: ModelConfig, media: MediaConfig) -> Facts:
    llm, heads = model.llm, config.get("num_attention_heads", 1)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // heads
    return {
        "model.llm.width": (config.get("hidden_size"), llm.width),
        "model.llm.intermediate": (config.get("intermediate_size"), llm.intermediate),
        "model.llm.layers": (config.get("num_hidden_layers"), llm.layers),
        "model.llm.heads": (heads, llm.heads),
        "model.llm.kv_heads": (config.get("num_key_value_heads") or heads, llm.kv_heads),
        "model.llm.head_dim": (head_dim, llm.head_dim),
        "model.llm.rms_norm_eps": (config.get("rms_norm_eps"), llm.rms_norm_eps),
        "model.llm.rope_theta": (rope.get("rope_theta", config.get("rope_theta", 10000.0)), llm.rope_theta),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "bias": (bool(config.get("attention_bias") or config.get("mlp_bias")), False),
    }


def _vision_facts(config: dict[str, Any], model: ModelConfig, media: MediaConfig) -> Facts:
    # What transformers leaves out of a config.json are its own defaults.
    vision = model.vision
    return {
        "model.vision.width": (config.get("hidden_size", 768), vision.width),
        "model.vision.intermediate": (config.get("intermediate_size", 3072), vision.intermediate),
        "model.vision.layers": (config.get("num_hidden_layers", 12), vision.layers),
        "model.vision.heads": (config.get("num_attention_heads", 12), vision.heads),
        "media.image.patch_pixels": (config.get("patch_size", 16), media.image.patch_pixels),
        "hidden_act": (config.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
    }


def _audio_facts(config: dict[str, Any], model: ModelConfig, media: MediaConfig) -> Facts:
    width = config.get("d_model")
    return {
        "model.audio.width": (width, model.audio.width),
        "model.audio.layers": (config.get("encoder_layers"), model.audio.layers),
        "model.audio.heads": (config.get("encoder_attention_heads"), model.audio.heads),
        "media.audio.mel_bins": (config.get("num_mel_bins"), media.audio.mel_bins),
        "positions": (config.get("max_source_positions"), POSITIONS),
        "encoder_ffn_dim": (config.get("encoder_ffn_dim"), 4 * model.audio.width),
        "activation_function": (config.get("activation_function", "gelu"), "gelu"),
    }


def _rename_llm(name: str) -> str | None:
    return None if name.endswith("rotary_emb.inv_freq") else f"llm.{name}"


def _rename_vision(name: str) -> str | None:
    # The pooling head and a saved range of positions have no place here.
    return None if name.startswith("head.") or name.endswith("position_ids") else f"vision.vpm.{name}"


AUDIO_NAMES = (
    (r"layers\.(\d+)\.self_attn\.q_proj\.", r"blocks.\1.attn.query."),
    (r"layers\.(\d+)\.self_attn\.k_proj\.", r"blocks.\1.attn.key."),
    (r"layers\.(\d+)\.self_attn\.v_proj\.", r"blocks.\1.attn.value."),
    (r"layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.out."),
    (r"layers\.(\d+)\.self_attn_layer_norm\.", r"blocks.\1.attn_ln."),
    (r"layers\.(\d+)\.final_layer_norm\.", r"blocks.\1.mlp_ln."),
    (r"layers\.(\d+)\.fc1\.", r"blocks.\1.mlp.0."),
    (r"layers\.(\d+)\.fc2\.", r"blocks.\1.mlp.2."),
    (r"layer_norm\.", "ln_post."),
    (r"embed_positions\.weight", "positional_embedding"),
)
"""From transformers' names in Whisper's encoder to those of the release; the first that fits."""


def _rename_audio(name: str) -> str | None:
    for pattern, ours in AUDIO_NAMES:
        if match := re.match(pattern, name):
            return f"audio.audio.{match.expand(ours)}{name[match.end() :]}"
    return f"audio.audio.{name}"


LAYOUTS: dict[str, Layout] = {
    "llm": Layout(("llama",), "text_config", "model.embed_tokens.weight", _rename_llm, _llm_facts),
    "vision_encoder": Layout(
        ("siglip", "siglip_vision_model"),
        "vision_config",
        "embeddings.patch_embedding.weight",
        _rename_vision,
        _vision_facts,
    ),
    "audio_encoder": Layout(("whisper",), "", "conv1.weight", _rename_audio, _audio_facts),
}
"""What `model.parts` may hold."""
