"""Text + image + audio language model: towers, connectors and LLM under the names of the release.

Source: Megrez-Omni (arXiv 2502.15803). Parameters are the whole state: the model has no buffers,
so it can be built on the meta device and filled from a checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.geometry import MediaConfig
from data.sample import Batch
from train.model.audio import Audio
from train.model.config import ModelConfig
from train.model.llm import build_llm
from train.model.placement import place_media
from train.model.shapes import ADAPTER
from train.model.vision import Vision

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


def is_trained(name: str, flags: Mapping[str, bool], adapted: Collection[str] = ()) -> bool:
    """Returns whether a weight trains: its module has a true flag, and it is an adapter in `adapted` ones."""
    module = module_of(name)
    return flags[module] and name not in NEVER_TUNED and (module not in adapted or ADAPTER in name)


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

    def set_tuned(self, flags: Mapping[str, bool], adapted: Collection[str] = ()) -> None:
        """Makes exactly the modules with a true flag trainable, and of those in `adapted` only the adapters.

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
            parameter.requires_grad_(is_trained(name, flags, adapted))

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


def meta_model(config: ModelConfig, media: MediaConfig, kind: type[MegrezOmni] = MegrezOmni) -> MegrezOmni:
    """Returns a model without any memory for its weights; an engine makes what its ranks need of it."""
    with torch.device("meta"):
        return kind(config, media)
