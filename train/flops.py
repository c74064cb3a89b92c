"""Necessary FLOPs of the model: what strict MFU and the planner's costs are made of.

Necessary means: causal attention by real segment, the head on supervised positions only, every
picture and clip at its real size; no padding, recomputation or embedding look-up, nor any gradient
that nobody uses. A multiply-add is 2 FLOPs. Neither torch nor the model is needed here.

The model is one literal list of `Term`s, each proportional to one count of `Work`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.geometry import MediaConfig
from train.lora import LAYERS, LoraConfig
from train.model.config import ModelConfig
from train.model.shapes import release_shapes

if TYPE_CHECKING:
    from data.sample import Batch

Flags = Mapping[str, bool]
"""Which of vision_encoder, vision_proj, llm, audio_encoder, audio_proj train."""

NO_LORA = LoraConfig()

VISION = ("vision_encoder", "vision_proj")
AUDIO = ("audio_encoder", "audio_proj")
EVERYTHING = (*VISION, "llm", *AUDIO)
ADAPTERS = {name: f"{name}_adapters" for name in LAYERS}
"""What trains of a module whose own weights stay frozen (train/lora.py), by module."""

BEHIND_VISION = (*VISION, ADAPTERS["vision_encoder"])
BEFORE_LLM = (*EVERYTHING, ADAPTERS["vision_encoder"], ADAPTERS["audio_encoder"])

# bf16 tensor cores without sparsity, FLOP/s, from the makers' data sheets. The first name that the
# device's name contains counts, so longer names stand before their beginnings.
PEAKS = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "H800": 989.5e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Returns the dense bf16 peak of a device by its CUDA name, in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Counts that FLOPs are proportional to: numbers, or arrays with one entry per sample.

    `pairs` are (query, key) pairs of the language model; `patch_pairs` and `frame_pairs` those of
    the towers, n^2 per slice and clip. `frames` are encoder frames, half the mel frames.
    `query_projections` is 1 with any picture: the resampler projects its queries once for all slices.
    """

    tokens: Any = 0
    pairs: Any = 0
    supervised: Any = 0
    query_projections: Any = 0
    slices: Any = 0
    patches: Any = 0
    patch_pairs: Any = 0
    frames: Any = 0
    frame_pairs: Any = 0
    audio_tokens: Any = 0


def measure(
    lengths: Sequence[int],
    supervised: int,
    patches: Sequence[int],
    frames: Sequence[int],
    media: MediaConfig,
    *,
    causal: bool = True,
) -> Work:
    """Returns the work of a micro-batch.

    Args:
        lengths: tokens of every segment, padding left out.
        supervised: positions that carry loss.
        patches: patches of every slice.
        frames: encoder frames of every clip.
        media: decides how many tokens a clip becomes.
        causal: False counts s * s pairs a segment, as a counter that sees dense attention does.
    """
    return Work(
        tokens=sum(lengths),
        pairs=sum(s * (s + 1) / 2 if causal else s * s for s in lengths),
        supervised=supervised,
        query_projections=1 if patches else 0,
        slices=len(patches),
        patches=sum(patches),
        patch_pairs=sum(n * n for n in patches),
        frames=sum(frames),
        frame_pairs=sum(f * f for f in frames),
        audio_tokens=sum(f // 2 if media.audio.pool else f for f in frames),
    )


def work_of(batch: Batch, media: MediaConfig) -> Work:
    """Returns the work of a micro-batch. Call it before the batch moves: later it would wait for the device.

    The blank picture and clip of a batch without media are not counted.
    """
    clips = batch.audio.cu_seqlens.diff().tolist() if batch.audio.bos_index.numel() else []
    grids = batch.vision.grids if batch.vision.index.numel() else []
    return measure(
        [info.tokens for info in batch.samples],
        batch.supervised.numel(),
        [rows * columns for rows, columns in grids],
        clips,
        media,
    )


@dataclass(frozen=True, slots=True)
class Term:
    """One product of the model: `flops` per unit of the count `per`.

    `owner` holds its weights (None: attention, which has none). `upstream` are the modules, or their
    adapters, that have trained parameters before its input, its owner included where that is so.
    """

    part: str
    per: str
    flops: float
    owner: str | None
    upstream: tuple[str, ...]

    def passes(self, trained: Collection[str]) -> int:
        """Returns how many times its forward FLOPs a training step needs, where `trained` is what trains."""
        data_gradient = any(name in trained for name in self.upstream)
        if self.owner is None:
            return 1 + 2 * data_gradient
        return 1 + data_gradient + (self.owner in trained)


def terms(config: ModelConfig, media: MediaConfig, lora: LoraConfig = NO_LORA) -> list[Term]:
    """Returns every product of the model, in the order in which data meets them, and those of adapters."""
    whole = [*_vision_terms(config, media), *_audio_terms(config, media), *_llm_terms(config)]
    return whole + [term for module in lora.adapted for term in _adapter_terms(module, config, media, lora)]


def _layers(
    part: str, per: str, owner: str, before: tuple[str, ...], layers: int, block: float, first: float
) -> list[Term]:
    """Returns the linear layers of transformer layers, `block` weights in each.

    The `first` weights of the first layer, its queries, keys and values, have no adapter before them.
    """
    upstream = (*before, owner)
    return [
        Term(part, per, 2 * first, owner, upstream),
        Term(part, per, 2 * (layers * block - first), owner, (*upstream, ADAPTERS[owner])),
    ]


def _vision_terms(config: ModelConfig, media: MediaConfig) -> list[Term]:
    tower, width, queries = config.vision, config.llm.width, media.image.queries
    pixels = 3 * media.image.patch_pixels**2
    block = 4 * tower.width**2 + 2 * tower.width * tower.intermediate
    encoder, proj = "vision_encoder", "vision_proj"
    before = (encoder, ADAPTERS[encoder])
    return [
        Term("vision_linear", "patches", 2 * pixels * tower.width, encoder, ()),
        *_layers("vision_linear", "patches", encoder, (), tower.layers, block, 3 * tower.width**2),
        Term("vision_attention", "patch_pairs", 4 * tower.layers * tower.width, None, before),
        Term("resampler", "patches", 2 * tower.width * width, proj, before),
        Term("resampler", "patches", 2 * 2 * width**2, proj, BEHIND_VISION),
        Term("resampler", "query_projections", 2 * queries * width**2, proj, (proj,)),
        Term("resampler", "patches", 4 * queries * width, None, BEHIND_VISION),
        Term("resampler", "slices", 2 * 2 * queries * width**2, proj, BEHIND_VISION),
    ]


def _audio_terms(config: ModelConfig, media: MediaConfig) -> list[Term]:
    tower, encoder = config.audio, "audio_encoder"
    kernel, mel_frames_per_frame = 3, 2
    first = mel_frames_per_frame * kernel * media.audio.mel_bins * tower.width
    square, before = tower.width**2, (encoder, ADAPTERS[encoder])
    return [
        Term("audio_conv", "frames", 2 * first, encoder, ()),
        Term("audio_conv", "frames", 2 * kernel * square, encoder, (encoder,)),
        *_layers("audio_linear", "frames", encoder, (), tower.layers, 12 * square, 3 * square),
        Term("audio_attention", "frame_pairs", 4 * tower.layers * tower.width, None, before),
        Term("audio_proj", "audio_tokens", 2 * tower.width * config.llm.width, "audio_proj", before),
    ]


def _llm_terms(config: ModelConfig) -> list[Term]:
    llm = config.llm
    inner, keys = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    first = llm.width * (inner + 2 * keys)
    block = first + llm.width * inner + 3 * llm.width * llm.intermediate
    before = (*BEFORE_LLM, ADAPTERS["llm"])
    return [
        *_layers("llm_linear", "tokens", "llm", BEFORE_LLM, llm.layers, block, first),
        Term("llm_attention", "pairs", 4 * llm.layers * inner, None, before),
        Term("head", "supervised", 2 * llm.width * llm.vocab, "llm", before),
    ]


def _adapter_terms(module: str, config: ModelConfig, media: MediaConfig, lora: LoraConfig) -> list[Term]:
    """Returns the products of a module's adapters: those of the first layer's input, and all others."""
    part, root = ADAPTERS[module], LAYERS[module]
    per = {"llm": "tokens", "vision_encoder": "patches", "audio_encoder": "frames"}[module]
    shapes = lora.weights(release_shapes(config, media))
    own = {name: shape for name, shape in shapes.items() if name.startswith(root)}
    entry = sum(shape[1] for name, shape in own.items() if name.startswith(f"{root}0.") and _is_entry(name))
    others = sum(sum(shape) for shape in own.values()) - entry
    before = BEFORE_LLM if module == "llm" else ()
    return [
        Term(part, per, 2 * lora.rank * entry, part, before),
        Term(part, per, 2 * lora.rank * others, part, (part,)),
    ]


def _is_entry(name: str) -> bool:
    return name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "query", "key", "value")


def what_trains(tuned: Flags, lora: LoraConfig) -> set[str]:
    """Returns the modules that train whole, and the adapters that train."""
    return {ADAPTERS[name] if name in lora.adapted else name for name, is_tuned in tuned.items() if is_tuned}


def forward_flops(work: Work, config: ModelConfig, media: MediaConfig) -> dict[str, Any]:
    """Returns the FLOPs of one forward pass by part of the model."""
    return training_flops(work, config, media, dict.fromkeys(EVERYTHING, False))


def training_flops(
    work: Work, config: ModelConfig, media: MediaConfig, tuned: Flags, lora: LoraConfig = NO_LORA
) -> dict[str, Any]:
    """Returns the FLOPs of forward and backward by part of the model.

    The stage rule: forward always; as much again for the data gradient if anything trained lies
    upstream; as much again for the weight gradient if the owner trains. Attention's backward is
    twice its forward. The owner of a layer with an adapter does not train, the adapter does.
    """
    parts: dict[str, Any] = {}
    trained = what_trains(tuned, lora)
    for term in terms(config, media, lora):
        flops = term.flops * getattr(work, term.per) * term.passes(trained)
        parts[term.part] = parts.get(term.part, 0.0) + flops
    return parts


TOWER_PARTS = {
    "vision_encoder": ("vision_linear", "vision_attention"),
    "audio_encoder": ("audio_conv", "audio_linear", "audio_attention"),
}
"""All that runs where a task trains one tower alone (train/model/stand_in.py)."""


def trains_anything(modality: str, tuned: Flags) -> bool:
    """Returns whether a sample of this modality gives any tuned module a gradient.

    A text-only sample gives none while the language model is frozen: leave it out of the mixture.
    """
    behind = {"image": VISION, "audio": AUDIO}
    met = [name for kind in modality.split("+") for name in behind.get(kind, ())]
    return tuned["llm"] or any(tuned[name] for name in met)


def sample_cost(
    config: ModelConfig, media: MediaConfig, tuned: Flags, lora: LoraConfig = NO_LORA
) -> Callable[..., np.ndarray]:
    """Returns a function (lengths, patches, frames) -> training cost of every sample, in TFLOP.

    The three are arrays of sums per sample, as an index has them. What it does not tell is taken
    as follows: slices have the usual area, clips fill their windows, and every text token carries loss.
    """
    slice_patches = (media.image.slice_pixels // media.image.patch_pixels) ** 2
    window = media.audio.window_samples // 320

    def cost(lengths, patches, frames) -> np.ndarray:
        lengths, patches, frames = (np.asarray(values, np.float64) for values in (lengths, patches, frames))
        slices = np.where(patches > 0, np.maximum(np.rint(patches / slice_patches), 1), 0)
        audio_tokens = frames / (2 if media.audio.pool else 1)
        work = Work(
            tokens=lengths,
            pairs=lengths * (lengths + 1) / 2,
            supervised=np.maximum(lengths - slices * media.image.queries - audio_tokens, 0),
            slices=slices,
            patches=patches,
            patch_pairs=patches**2 / np.maximum(slices, 1),
            frames=frames,
            frame_pairs=frames // window * window**2 + (frames % window) ** 2,
            audio_tokens=audio_tokens,
        )
        parts = training_flops(work, config, media, tuned, lora)
        return np.sum(list(parts.values()), axis=0) / 1e12

    return cost
