"""Names and shapes of every weight of a model, by arithmetic alone. Never imports torch.

So that a folder of weights which does not fit is refused before anything slow is imported; a test
holds it against the model itself.

Source: the layout of the release (arXiv 2502.15803 and the model's public inference code).
"""

from __future__ import annotations

from data.geometry import MediaConfig
from train.model.config import AudioConfig, LLMConfig, ModelConfig, VisionConfig

POSITIONS = 1500
"""Encoder frames in 30 seconds, the longest window of the audio encoder."""

ADAPTER = ".lora_"
"""What the name of an adapter's weight has, and no other."""

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Ends of an adapter's two weights, [rank, inputs] and [outputs, rank], in place of `.weight`."""

Shapes = dict[str, tuple[int, ...]]


def weight_name(parameter: str) -> str:
    """Returns the name of a weight from its parameter's: adapters hide the layer that they are added to."""
    return parameter.replace(".base_layer.", ".").replace(".default.", ".")


def release_shapes(config: ModelConfig, media: MediaConfig) -> Shapes:
    """Returns the shape of every weight by its release name."""
    width = config.llm.width
    image = media.image
    shapes = _llm(config.llm)
    shapes |= _vision(config.vision, image.patch_pixels, image.table_side)
    shapes |= _resampler(image.queries, width, config.vision.width)
    return shapes | _audio(config.audio, media.audio.mel_bins, width)


def _affine(name: str, *shape: int) -> Shapes:
    """Returns a weight and its bias, as long as the weight's first side."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _llm(config: LLMConfig) -> Shapes:
    width, middle = config.width, config.intermediate
    inner, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: Shapes = {
        f"llm.{name}.weight": (config.vocab, width) for name in ("model.embed_tokens", "lm_head")
    }
    shapes["llm.model.norm.weight"] = (width,)
    for layer in range(config.layers):
        root = f"llm.model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{root}.{norm}.weight"] = (width,)
        shapes[f"{root}.self_attn.q_proj.weight"] = (inner, width)
        shapes[f"{root}.self_attn.o_proj.weight"] = (width, inner)
        shapes |= {f"{root}.self_attn.{name}.weight": (keys, width) for name in ("k_proj", "v_proj")}
        shapes |= {f"{root}.mlp.{name}.weight": (middle, width) for name in ("gate_proj", "up_proj")}
        shapes[f"{root}.mlp.down_proj.weight"] = (width, middle)
    return shapes


def _vision(config: VisionConfig, patch: int, table_side: int) -> Shapes:
    width, middle = config.width, config.intermediate
    root = "vision.vpm"
    shapes = _affine(f"{root}.embeddings.patch_embedding", width, 3, patch, patch)
    shapes[f"{root}.embeddings.position_embedding.weight"] = (table_side**2, width)
    for layer in range(config.layers):
        place = f"{root}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _affine(f"{place}.{norm}", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"{place}.self_attn.{name}", width, width)
        shapes |= _affine(f"{place}.mlp.fc1", middle, width) | _affine(f"{place}.mlp.fc2", width, middle)
    return shapes | _affine(f"{root}.post_layernorm", width)


def _resampler(queries: int, width: int, vision_width: int) -> Shapes:
    root = "vision.resampler"
    shapes: Shapes = {
        f"{root}.query": (queries, width),
        f"{root}.proj": (width, width),
        f"{root}.kv_proj.weight": (width, vision_width),
        f"{root}.attn.in_proj_weight": (3 * width, width),
        f"{root}.attn.in_proj_bias": (3 * width,),
    }
    shapes |= _affine(f"{root}.attn.out_proj", width, width)
    for norm in ("ln_q", "ln_kv", "ln_post"):
        shapes |= _affine(f"{root}.{norm}", width)
    return shapes


def _audio(config: AudioConfig, mel_bins: int, llm_width: int) -> Shapes:
    width = config.width
    root = "audio.audio"
    shapes = _affine(f"{root}.conv1", width, mel_bins, 3) | _affine(f"{root}.conv2", width, width, 3)
    shapes[f"{root}.positional_embedding"] = (POSITIONS, width)
    for layer in range(config.layers):
        place = f"{root}.blocks.{layer}"
        shapes |= _affine(f"{place}.attn_ln", width) | _affine(f"{place}.mlp_ln", width)
        for name in ("query", "value", "out"):
            shapes |= _affine(f"{place}.attn.{name}", width, width)
        shapes[f"{place}.attn.key.weight"] = (width, width)
        shapes |= _affine(f"{place}.mlp.0", 4 * width, width) | _affine(f"{place}.mlp.2", width, 4 * width)
    shapes |= _affine(f"{root}.ln_post", width) | _affine(f"{root}.proj", llm_width, width)
    shapes[f"{root}.audio_bos_eos_token.weight"] = (2, llm_width)
    return shapes
