"""A model of every part at toy size, and random encoded samples for it."""

from __future__ import annotations

import numpy as np
import torch

from data.collate import collate
from data.geometry import AudioGeometry, ImageGeometry, MediaConfig
from data.sample import IGNORE, Batch, EncodedSample
from train.model.config import AudioConfig, LLMConfig, ModelConfig, RecomputeConfig, VisionConfig
from train.model.initial import build_model
from train.model.omni import MegrezOmni

LENGTH = 128
MEDIA = MediaConfig(
    image=ImageGeometry(patch_pixels=14, slice_pixels=56, queries=4, table_side=8),
    audio=AudioGeometry(mel_bins=16),
)
LLM = LLMConfig(width=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=2048)
VISION = VisionConfig(width=32, intermediate=48, layers=2, heads=2, resampler_heads=4)
AUDIO = AudioConfig(width=32, layers=2, heads=2)


def tiny_config(recompute: bool = False) -> ModelConfig:
    flags = RecomputeConfig(llm=recompute, vision_encoder=recompute, audio_encoder=recompute)
    return ModelConfig(name="tiny", llm=LLM, vision=VISION, audio=AUDIO, recompute=flags)


def tiny_model(seed: int = 0, recompute: bool = False) -> MegrezOmni:
    """Weights five times as large as usual, so that a token out of place shows in the logits."""
    model = build_model(tiny_config(recompute), MEDIA, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.mul_(5.0)
    return model


def make_sample(seed: int, text: int, grids=(), clips=()) -> EncodedSample:
    """Slices of `grids`, clips of `clips` frames, then `text` random tokens, the later half supervised."""
    rng = np.random.default_rng(seed)
    width = 3 * MEDIA.image.patch_pixels**2
    tokens = [(frames - 2) // 2 + 1 for frames in clips]
    slice_starts = [1 + MEDIA.image.queries * i for i in range(len(grids))]
    place = 1 + MEDIA.image.queries * len(grids)
    clip_starts = [place + sum(count + 2 for count in tokens[:i]) for i in range(len(clips))]
    length = place + sum(count + 2 for count in tokens) + text
    ids = rng.integers(0, LLM.vocab, length).astype(np.int32)
    labels = np.where(np.arange(length) >= length - text // 2, ids, IGNORE).astype(np.int32)
    return EncodedSample(
        key=f"sample{seed}",
        source="tiny",
        modality="image" if grids else "audio" if clips else "text",
        input_ids=ids,
        labels=labels,
        slices=[rng.integers(0, 256, (h * w, width)).astype(np.uint8) for h, w in grids],
        grids=list(grids),
        slice_starts=slice_starts,
        clips=[rng.normal(size=(MEDIA.audio.mel_bins, 2 * n)).astype(np.float32) for n in clips],
        clip_tokens=tokens,
        clip_starts=clip_starts,
    )


def mixed_samples() -> list[EncodedSample]:
    """Text, pictures of unequal slices, clips of unequal length, and both in one sample."""
    return [
        make_sample(1, 14),
        make_sample(2, 10, grids=[(3, 4), (2, 5), (2, 5)]),
        make_sample(3, 9, clips=[7, 12]),
        make_sample(4, 12, grids=[(4, 4)], clips=[7]),
        make_sample(5, 6),
    ]


def make_batch(packs: list[list[EncodedSample]], length: int = LENGTH) -> Batch:
    return collate(packs, length, MEDIA, 0, "token")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
