"""Text + image + audio language model: towers, connectors and LLM under the names of the release.

Source: Megrez-Omni (arXiv 2502.15803). Parameters are the whole state: the model has no buffers,
so it can be built on the meta device and filled from a checkpoint.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.geometry import MediaConfig
from data.sample import Batch
from train.model.audio import POSITIONS, Audio, AudioEncoder, sinusoids
from train.model.config import ModelConfig
from train.model.llm import build_llm
from train.model.placement import place_media
from train.model.vision import Resampler, Vision, sincos_grid

MODULES: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("vision.vpm.",),
    "vision_proj": ("vision.resampler.",),
    "llm": ("llm.",),
    "audio_encoder": ("audio.audio.",),
    "audio_proj": ("audio.audio.proj.", "audio.audio.audio_bos_eos_token."),
}
"""Name prefixes of what a stage tunes or freezes; the longest that fits decides."""

NEVER_TUNED = ("audio.audio.positional_embedding",)
"""Fixed tables that are stored as parameters."""

STD = 0.02


class LossParts(NamedTuple):
    """What a micro-batch gives: `loss_sum` fp32 scalar with its graph, `row_losses` fp32 [S] without."""

    loss_sum: Tensor
    row_losses: Tensor


def module_of(name: str) -> str:
    """Returns which of `MODULES` a parameter belongs to.

    Raises:
        ValueError: no module has a parameter of such a name.
    """
    fitting = [
        (len(p), module) for module, prefixes in MODULES.items() for p in prefixes if name.startswith(p)
    ]
    if not fitting:
        raise ValueError(f"parameter={name!r}: belongs to none of {', '.join(MODULES)}. Use release names.")
    return max(fitting)[1]


class MegrezOmni(nn.Module):
    """The whole model.

    Modules whose parameters do not require a gradient, with nothing trained before them, run
    without recording anything: autograd keeps no activation of them.
    """

    def __init__(self, config: ModelConfig, media: MediaConfig):
        super().__init__()
        width = config.llm.width
        self.llm = build_llm(config.llm)
        self.vision = Vision(config.vision, media.image, width)
        self.audio = Audio(config.audio, media.audio, width)
        self.vision.vpm.recompute = config.recompute.vision_encoder
        self.audio.audio.recompute = config.recompute.audio_encoder
        if config.recompute.llm:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws every weight anew from torch's global generator.

        Matrices are normal(0, 1 / sqrt(inputs)), which is the usual 0.02 at a width of 2560: narrower
        towers with 0.02 stay nearly silent for hundreds of steps. Embeddings are normal(0, 0.02),
        biases 0, norms 1. Queries and the position tables of both towers start from sines and cosines.

        The connectors end in smaller weights, so that pictures and clips enter the language model at
        the scale of words: louder ones would drown what its first layers add.
        """
        for module in self.modules():
            _initialise(module)
        for weight in (self.vision.resampler.proj, self.audio.audio.proj.weight):
            nn.init.normal_(weight, std=STD * weight.shape[1] ** -0.5)
        positions = self.vision.vpm.embeddings.position_embedding.weight
        positions.copy_(sincos_grid(len(positions), positions.shape[1], math.isqrt(len(positions))))

    def set_tuned(self, flags: Mapping[str, bool]) -> None:
        """Makes exactly the modules with a true flag trainable.

        Raises:
            ValueError: the flags are not one for each of `MODULES`.
        """
        for name in flags:
            if name not in MODULES:
                near = difflib.get_close_matches(name, MODULES, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"tuned={name!r}: not a known module. {hint}Known: {', '.join(MODULES)}.")
        if missing := [name for name in MODULES if name not in flags]:
            raise ValueError(f"tuned={missing[0]!r}: has no flag. Give one to each of {', '.join(MODULES)}.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(flags[module_of(name)] and name not in NEVER_TUNED)

    def forward(self, batch: Batch) -> LossParts:
        """Returns the weighted sum of the losses at `batch.supervised` and each of them.

        Every encoder and connector runs in every call. Their features of a blank item are cut to
        no rows, which leaves them in the graph with gradients of exactly zero.
        """
        rows = self.hidden(batch).index_select(0, batch.supervised)
        return LossParts(*self.llm.lm_head(rows, batch.targets, batch.weights))

    def logits(self, batch: Batch) -> Tensor:
        """Returns the logits of every position, [B, L, V]: for tests and small models."""
        return self.llm.lm_head(self.hidden(batch)).view(*batch.input_ids.shape, -1)

    def hidden(self, batch: Batch) -> Tensor:
        """Returns the language model's last hidden states, [T, D]."""
        embeddings = self.embed(batch)[None]
        output = self.llm.model(
            inputs_embeds=embeddings,
            # transformers passes a mask of four dimensions on untouched. With None it would compare
            # the positions with each other on the device and wait for the answer.
            attention_mask=embeddings.new_empty(1, 1, 0, 0),
            position_ids=batch.position_ids.reshape(1, -1),
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
        return output.last_hidden_state[0]

    def embed(self, batch: Batch) -> Tensor:
        """Returns what enters the language model, [T, D]: words, with media in their places."""
        words = self.llm.model.embed_tokens(batch.input_ids.reshape(-1))
        return place_media(words, batch.vision, batch.audio, self.vision, self.audio)


def build_model(
    config: ModelConfig, media: MediaConfig, seed: int, kind: type[MegrezOmni] = MegrezOmni
) -> MegrezOmni:
    """Returns a model with random fp32 weights on the CPU that depend on `seed` (and `kind`) alone."""
    with torch.device("meta"):
        model = kind(config, media)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.initialise()
    return model


def _initialise(module: nn.Module) -> None:
    """Draws the parameters that `module` itself holds."""
    if isinstance(module, AudioEncoder):
        table = sinusoids(POSITIONS, module.positional_embedding.shape[1])
        module.positional_embedding.copy_(table)
    elif isinstance(module, Resampler):
        module.query.copy_(sincos_grid(len(module.query), module.query.shape[1], module.slice_side))
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                nn.init.normal_(parameter, std=STD)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                # The only vectors named `weight` are the gains of norms.
                parameter.fill_(1.0 if name == "weight" else 0.0)
