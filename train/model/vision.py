"""SigLIP encoder at native resolution and the resampler behind it, over all slices at once.

Sources: SigLIP (arXiv 2303.15343), Megrez-Omni (arXiv 2502.15803).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.geometry import ImageGeometry
from data.sample import VisionBatch
from train.model.attention import varlen_attention
from train.model.config import VisionConfig
from train.model.tower import Segments, pre_norm_layer, run_layers

EPS = 1e-6


class Vision(nn.Module):
    """Encoder and connector of pictures, under the names of the release."""

    def __init__(self, config: VisionConfig, image: ImageGeometry, width: int):
        super().__init__()
        self.vpm = VisionEncoder(config, image)
        self.resampler = Resampler(config, image, width)

    def forward(self, batch: VisionBatch) -> Tensor:
        """Returns [N * Q, D]: the tokens of every slice, in order."""
        return self.resampler(self.vpm(batch), batch)


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel, applied to pixels already cut into patches."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns [P, width] from uint8 pixels [P, 3 * patch^2], scaled to [-1, 1] first."""
        x = (pixels.to(self.weight.dtype) - 127.5) / 127.5
        return F.linear(x, self.weight.flatten(1), self.bias)


class VisionEmbeddings(nn.Module):
    """Patch embedding plus a learned position from a square table."""

    def __init__(self, width: int, image: ImageGeometry):
        super().__init__()
        self.patch_embedding = PatchEmbedding(3, width, image.patch_pixels, image.patch_pixels)
        self.position_embedding = nn.Embedding(image.table_side**2, width)

    def forward(self, pixels: Tensor, position_ids: Tensor) -> Tensor:
        """Returns [P, width]."""
        return self.patch_embedding(pixels) + self.position_embedding(position_ids)


class FeedForward(nn.Module):
    """Two layers with the tanh form of GELU."""

    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor shaped like x."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """One encoder layer under SigLIP's parameter names."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.layer_norm1 = nn.LayerNorm(width, EPS)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, EPS)
        self.mlp = FeedForward(width, config.intermediate)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """Returns a tensor shaped like x."""
        norms = (self.layer_norm1, self.layer_norm2)
        return pre_norm_layer(x, segments, self.heads, norms, list(self.self_attn.values()), self.mlp)


class VisionEncoder(nn.Module):
    """SigLIP without its pooling head. `recompute` rebuilds activations in the backward pass."""

    def __init__(self, config: VisionConfig, image: ImageGeometry):
        super().__init__()
        self.recompute = False
        self.embeddings = VisionEmbeddings(config.width, image)
        layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.width, EPS)

    def forward(self, batch: VisionBatch) -> Tensor:
        """Returns [P, vision width]."""
        x = self.embeddings(batch.pixels, batch.position_ids)
        segments = (batch.cu_seqlens, batch.max_seqlen)
        x = run_layers(self.encoder["layers"], x, segments, self.recompute and self.training)  # type: ignore[arg-type]
        return self.post_layernorm(x)


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention`'s parameters, used on segments instead of padded rows."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """Returns [N * Q, D]: the same `query` [Q, D] looks at the keys of each of N segments."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1))
            for x, weight, bias in zip((query, key, value), weights, biases)
        )
        cu_seqlens, longest = segments
        items, queries = len(cu_seqlens) - 1, len(query)
        cu_q = torch.arange(items + 1, device=cu_seqlens.device, dtype=torch.int32) * queries
        repeated = q.expand(items, *q.shape).flatten(0, 1)
        out = varlen_attention(repeated, k, v, cu_q, cu_seqlens, queries, longest, causal=False)
        return self.out_proj(out.flatten(1))


class Resampler(nn.Module):
    """Turns the patches of each slice into Q tokens of the language model by one cross-attention."""

    def __init__(self, config: VisionConfig, image: ImageGeometry, width: int):
        super().__init__()
        self.sides = max(image.max_side_patches, image.table_side)
        self.slice_side = image.slice_pixels // image.patch_pixels
        self.query = nn.Parameter(torch.empty(image.queries, width))
        self.proj = nn.Parameter(torch.empty(width, width))
        self.kv_proj = nn.Linear(config.width, width, bias=False)
        self.attn = CrossAttention(width, config.resampler_heads)
        self.ln_q = nn.LayerNorm(width, EPS)
        self.ln_kv = nn.LayerNorm(width, EPS)
        self.ln_post = nn.LayerNorm(width, EPS)

    def forward(self, features: Tensor, batch: VisionBatch) -> Tensor:
        """Returns [N * Q, D] from the encoder's features [P, vision width]."""
        values = self.ln_kv(self.kv_proj(features))
        keys = values + sincos_positions(batch.coordinates, values.shape[1], self.sides, values.dtype)
        segments = (batch.cu_seqlens, batch.max_seqlen)
        out = self.ln_post(self.attn(self.ln_q(self.query), keys, values, segments))
        return out @ self.proj


def sincos_positions(coordinates: Tensor, width: int, sides: int, dtype: torch.dtype) -> Tensor:
    """Returns 2-D sin-cos positions: half of the channels from the column, half from the row.

    Each half is [sin, cos] of the patch index times 10000^(-i / (width / 4)). Computed in fp32 at
    every call, from `sides` distinct indices: a stored table would be rounded when the model is
    cast, and would be missing from the release's checkpoint.

    Shapes: coordinates int64 [P, 2] (row, column), below `sides`; result [P, width].
    """
    indices = torch.arange(sides, device=coordinates.device, dtype=torch.float32)
    return _sincos_table(indices, width).to(dtype)[coordinates.flip(1)].flatten(1)


def sincos_grid(points: int, width: int, extent: int) -> Tensor:
    """Returns sin-cos positions, [points, width], of points spread evenly over a square, row by row.

    They start where the patches are: queries that were placed by their own numbers would leave most
    of a slice of `extent` x `extent` patches to none of them.
    """
    side = math.isqrt(points - 1) + 1
    centres = (torch.arange(side, dtype=torch.float32) + 0.5) * extent / side - 0.5
    places = torch.arange(points)
    coordinates = torch.stack([places % side, places // side], dim=1)
    return _sincos_table(centres, width)[coordinates].flatten(1)


def _sincos_table(positions: Tensor, width: int) -> Tensor:
    quarter = width // 4
    exponents = torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter
    angles = positions[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)
