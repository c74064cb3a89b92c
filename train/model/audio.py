"""Whisper's encoder over clips laid end to end, and the projection behind it.

Sources: Whisper (arXiv 2212.04356), Megrez-Omni (arXiv 2502.15803).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.geometry import AudioGeometry
from data.sample import AudioBatch
from train.model.config import AudioConfig
from train.model.shapes import POSITIONS
from train.model.tower import Segments, pre_norm_layer, run_layers


class Audio(nn.Module):
    """Encoder and connector of clips; the release nests them one level deeper than pictures."""

    def __init__(self, config: AudioConfig, geometry: AudioGeometry, width: int):
        super().__init__()
        self.audio = AudioEncoder(config, geometry, width)

    def forward(self, batch: AudioBatch) -> tuple[Tensor, Tensor]:
        """Returns what `AudioEncoder` does."""
        return self.audio(batch)


class AudioLayer(nn.Module):
    """One encoder layer under Whisper's parameter names. The keys have no bias."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        names = ("query", "key", "value", "out")
        self.attn_ln = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({name: nn.Linear(width, width, bias=name != "key") for name in names})
        self.mlp_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """Returns a tensor shaped like x."""
        norms = (self.attn_ln, self.mlp_ln)
        return pre_norm_layer(x, segments, self.heads, norms, list(self.attn.values()), self.mlp)


class AudioEncoder(nn.Module):
    """Convolutions, layers, the pool, and the projection (`proj`, `audio_bos_eos_token`).

    `positional_embedding` is Whisper's fixed table: stored with the weights, never tuned.
    `recompute` rebuilds activations in the backward pass.
    """

    def __init__(self, config: AudioConfig, geometry: AudioGeometry, width: int):
        super().__init__()
        self.recompute = False
        self.pool = geometry.pool
        self.conv1 = nn.Conv1d(geometry.mel_bins, config.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, kernel_size=3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, config.width), requires_grad=False)
        self.blocks = nn.ModuleList(AudioLayer(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(config.width)
        self.proj = nn.Linear(config.width, width)
        self.audio_bos_eos_token = nn.Embedding(2, width)

    def forward(self, batch: AudioBatch, project: bool = True):
        """Returns the clips' tokens [sum tokens, D], in order, and the bos and eos vectors [2, D].

        Without `project` it is only the features before the projection, [sum tokens, width].
        """
        x = self._frames(batch) + self.positional_embedding[batch.position_ids]
        segments = (batch.cu_seqlens, batch.max_seqlen)
        x = run_layers(self.blocks, x, segments, self.recompute and self.training)
        features = self.ln_post(self._pooled(x, batch.pool))
        if not project:
            return features
        tokens = self.proj(features)
        return tokens, self.audio_bos_eos_token(torch.arange(2, device=tokens.device))

    def _frames(self, batch: AudioBatch) -> Tensor:
        """Returns [sum frames, width]. The gap is zeroed twice, so no clip sees its neighbour."""
        x = F.gelu(self.conv1(batch.mel[None].to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x.masked_fill(batch.gap, 0.0)))
        return x[0].t().index_select(0, batch.keep)

    def _pooled(self, x: Tensor, first: Tensor) -> Tensor:
        kept = x.index_select(0, first)
        return (kept + x.index_select(0, first + 1)) / 2 if self.pool else kept


def sinusoids(length: int, width: int) -> Tensor:
    """Returns Whisper's position table [length, width]: sines in the first half, cosines in the second."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) / max(half - 1, 1) * torch.arange(half))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
