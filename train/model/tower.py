"""The transformer layers that both encoder towers are made of: pre-norm, self-attention by segment.

Written once; the two towers differ only in the names of their parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.model.attention import varlen_attention

Segments = tuple[Tensor, int]
"""cu_seqlens int32 [N + 1] and the longest segment."""


def pre_norm_layer(
    x: Tensor,
    segments: Segments,
    heads: int,
    norms: tuple[nn.Module, nn.Module],
    projections: Sequence[nn.Module],
    mlp: nn.Module,
) -> Tensor:
    """Returns x after one encoder layer.

    Args:
        norms: the ones before attention and before the feed-forward part.
        projections: query, key, value and output.

    Shapes: x and result [tokens, width].
    """
    cu_seqlens, longest = segments
    query, key, value, out = projections
    normed = norms[0](x)
    q, k, v = (project(normed).unflatten(-1, (heads, -1)) for project in (query, key, value))
    attended = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=False)
    x = x + out(attended.flatten(1))
    return x + mlp(norms[1](x))


def run_layers(layers: Iterable[nn.Module], x: Tensor, segments: Segments, recompute: bool) -> Tensor:
    """Returns x after all layers; with `recompute`, activations are rebuilt in the backward pass."""
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(layer, x, segments, use_reentrant=False)
        else:
            x = layer(x, segments)
    return x
