"""Config node `model`: sizes of the language model, towers and connectors. Never imports torch.

Sizes that also decide how many tokens a picture or clip has (patch, queries, mel bins, ...) are
not here but in `media` (see data/geometry.py), so that they exist once.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class LLMConfig:
    """Llama-type language model."""

    width: int = 2560
    intermediate: int = 7168
    layers: int = 32
    heads: int = 40
    kv_heads: int = 10
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 5_000_000.0
    vocab: int = 122_880
    max_positions: int = 4096

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = _below_one(self, "width", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocab")
        if not found and self.heads % self.kv_heads:
            found.append(f"kv_heads={self.kv_heads}: must divide heads={self.heads}. Use {self.heads}.")
        return found


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """SigLIP-type encoder and the resampler behind it."""

    width: int = 1152
    intermediate: int = 4304
    layers: int = 27
    heads: int = 16
    resampler_heads: int = 20

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = _below_one(self, "width", "intermediate", "layers", "heads", "resampler_heads")
        if not found and self.width % self.heads:
            found.append(f"heads={self.heads}: must divide width={self.width}.")
        return found


@dataclass(kw_only=True, slots=True)
class AudioConfig:
    """Whisper-type encoder. The feed-forward layer is four times as wide."""

    width: int = 1280
    layers: int = 32
    heads: int = 20

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = _below_one(self, "width", "layers", "heads")
        if not found and self.width % self.heads:
            found.append(f"heads={self.heads}: must divide width={self.width}.")
        return found


@dataclass(kw_only=True, slots=True)
class RecomputeConfig:
    """Activation checkpointing per module: less memory for one more forward pass."""

    llm: bool = False
    vision_encoder: bool = False
    audio_encoder: bool = False

    def problems(self) -> list[str]:
        """Returns nothing: any combination works."""
        return []


@dataclass(kw_only=True, slots=True)
class StageLR:
    """Learning rates that suit this size; recipes refer to them."""

    connector: float = 1e-3
    encoder: float = 2e-5
    omni: float = 1e-5

    def problems(self) -> list[str]:
        """Returns nothing: `optim.lr` is checked where it is used."""
        return []


@dataclass(kw_only=True, slots=True)
class PartsConfig:
    """Folders, in transformers' own layouts, of the parts that a first stage starts from."""

    llm: str | None = None
    vision_encoder: str | None = None
    audio_encoder: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Folders by part, of the parts that have one."""
        parts = {"llm": self.llm, "vision_encoder": self.vision_encoder, "audio_encoder": self.audio_encoder}
        return {part: folder for part, folder in parts.items() if folder is not None}

    def problems(self) -> list[str]:
        """Returns nothing: folders are checked when they are opened (train/first_weights.py)."""
        return []


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The whole model, and the weights that a first stage starts from.

    `name` goes into stage.json and guards against a parent of another size. `weights` is a release
    folder; beginnings of names in `fresh` may be missing there and are drawn, those in `ignore` may be
    there and are left out.
    """

    name: str = "custom"
    weights: str | None = None
    parts: PartsConfig = field(default_factory=PartsConfig)
    fresh: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    llm: LLMConfig = field(default_factory=LLMConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    stage_lr: StageLR = field(default_factory=StageLR)

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = self._problems_of_weights()
        if found:
            return found
        heads = self.vision.resampler_heads
        if heads > 0 and self.llm.width % heads:
            return [f"vision.resampler_heads={heads}: must divide {self.llm.width}, the LLM's width."]
        if self.llm.width % 4:
            return [f"llm.width={self.llm.width}: must be a multiple of 4 for the 2-D sin-cos positions."]
        return []

    def _problems_of_weights(self) -> list[str]:
        found = [
            f"parts.{part}={folder}: model.weights={self.weights} is set too. Set one of them."
            for part, folder in self.parts.named.items()
            if self.weights is not None
        ]
        for name in ("fresh", "ignore"):
            if getattr(self, name) and self.weights is None and not self.parts.named:
                found.append(f"{name}: is about model.weights or model.parts, and neither is set. Remove it.")
        return found


def _below_one(config, *names: str) -> list[str]:
    return [
        f"{name}={getattr(config, name)}: must be at least 1. Use a positive whole number."
        for name in names
        if getattr(config, name) < 1
    ]
