"""Released parts at toy size, as transformers' own classes save them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from tests.train.tiny_model import AUDIO, LLM, MEDIA, VISION

SMALL_SIDE = 5
"""Side of the saved table of positions, smaller than the model's."""


def write_parts(folder: Path) -> dict[str, torch.nn.Module]:
    """Saves a language model and both towers into `folder`/PART, and returns them in evaluation mode."""
    torch.manual_seed(0)
    parts = {"llm": llama(), "vision_encoder": siglip_vision(SMALL_SIDE), "audio_encoder": whisper()}
    for name, part in parts.items():
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        part.eval().save_pretrained(folder / name)
    return parts


def llama(**changes) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": LLM.width,
        "intermediate_size": LLM.intermediate,
        "num_hidden_layers": LLM.layers,
        "num_attention_heads": LLM.heads,
        "num_key_value_heads": LLM.kv_heads,
        "head_dim": LLM.head_dim,
        "vocab_size": LLM.vocab,
        "rms_norm_eps": LLM.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": LLM.rope_theta},
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def vision_config(side: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=VISION.width,
        intermediate_size=VISION.intermediate,
        num_hidden_layers=VISION.layers,
        num_attention_heads=VISION.heads,
        image_size=side * 14,
        patch_size=14,
    )


def siglip_vision(side: int) -> SiglipVisionModel:
    return SiglipVisionModel(vision_config(side))


def siglip(side: int) -> SiglipModel:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 32}, vision_config=vision_config(side)))


def whisper_config(**changes) -> WhisperConfig:
    sizes = {
        "d_model": AUDIO.width,
        "encoder_layers": AUDIO.layers,
        "encoder_attention_heads": AUDIO.heads,
        "encoder_ffn_dim": 4 * AUDIO.width,
        "num_mel_bins": MEDIA.audio.mel_bins,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "vocab_size": 64,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    }
    return WhisperConfig(**(sizes | changes))


def whisper(**changes) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration(whisper_config(**changes))


def whisper_encoder() -> torch.nn.Module:
    return WhisperModel(whisper_config()).encoder
