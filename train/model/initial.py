"""What a weight is before anything was learnt: drawn from the seed and its own name, or a fixed table.

A weight depends on nothing else, so ranks that hold different parts of it agree, and a part that a
checkpoint lacks begins as it would have in a model of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.geometry import MediaConfig
from train.model.audio import AudioEncoder, sinusoids
from train.model.config import ModelConfig
from train.model.omni import MegrezOmni, meta_model
from train.model.shapes import DOWN, UP, weight_name
from train.model.vision import Resampler, sincos_grid

STD = 0.02

Rule = Callable[[torch.Generator], Tensor]
"""Makes one weight, fp32 on the CPU."""

CONNECTOR_ENDS = ("vision.resampler.proj", "audio.audio.proj.weight")


class RandomWeights:
    """The initial weights of a model, with the interface of `train.weights.WeightReader`.

    Matrices are normal(0, 1 / sqrt(inputs)), which is the usual 0.02 at a width of 2560: narrower
    towers with 0.02 stay nearly silent for hundreds of steps. Embeddings are normal(0, 0.02),
    biases 0, norms 1. Queries and the position tables of both towers start from sines and cosines.

    The connectors end in smaller weights, so that pictures and clips enter the language model at
    the scale of words: louder ones would drown what its first layers add. Adapters add nothing at first.

    Args:
        model: on any device, its parameters not yet partitioned.
    """

    folder = "random weights"

    def __init__(self, model: MegrezOmni, seed: int) -> None:
        self.seed = seed
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._rules: dict[str, Rule] = {}
        for path, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                name = weight_name(f"{path}.{own}")
                self.shapes[name] = tuple(parameter.shape)
                self._rules[name] = _rule(name, module, self.shapes[name])

    def place(self, name: str) -> str:
        """Returns nothing: a drawn weight is in no file."""
        return ""

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Returns elements [start, stop) of a flattened weight."""
        assert kind == "weight"
        return self.whole(name).reshape(-1)[start:stop]

    def whole(self, name: str) -> Tensor:
        """Returns a weight, fp32."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        return self._rules[name](torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def _rule(name: str, module: nn.Module, shape: tuple[int, ...]) -> Rule:
    if isinstance(module, AudioEncoder):
        return lambda _: sinusoids(*shape)
    if isinstance(module, Resampler) and name.endswith(".query"):
        return lambda _: sincos_grid(shape[0], shape[1], module.slice_side)
    if name.endswith(".position_embedding.weight"):
        return lambda _: sincos_grid(shape[0], shape[1], math.isqrt(shape[0]))
    if len(shape) == 1:
        # The only vectors named `weight` are the gains of norms.
        return lambda _: torch.full(shape, 1.0 if name.endswith(".weight") else 0.0)
    if name.endswith(DOWN):
        bound = shape[1] ** -0.5  # nn.Linear's own, kaiming_uniform_(a=sqrt(5))
        return lambda generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.endswith(UP):
        return lambda _: torch.zeros(shape)
    std = STD if isinstance(module, nn.Embedding) else math.prod(shape[1:]) ** -0.5
    if name in CONNECTOR_ENDS:
        std = STD * shape[1] ** -0.5
    return lambda generator: torch.empty(shape).normal_(std=std, generator=generator)


@torch.no_grad()
def initialise(model: MegrezOmni, seed: int) -> None:
    """Gives a whole model its initial weights, in place."""
    weights = RandomWeights(model, seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.whole(weight_name(name)))


def build_model(
    config: ModelConfig, media: MediaConfig, seed: int, kind: type[MegrezOmni] = MegrezOmni
) -> MegrezOmni:
    """Returns a whole fp32 model on the CPU with its initial weights."""
    model = meta_model(config, media, kind)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model
