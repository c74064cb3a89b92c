"""The whole configuration of a run, as typed dataclasses. Never imports torch.

A config path, its attribute path here and the text of its errors are the same string:
`data.pack.length`. Every config reports its own mistakes with `problems()`; `all_problems` walks
the tree and collects them, so that a person sees all of them at once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from data.config import DataConfig
from data.geometry import MediaConfig
from train.lora import LoraConfig
from train.model.config import ModelConfig

MODULES = ("vision_encoder", "vision_proj", "llm", "audio_encoder", "audio_proj")
"""The five parts a person freezes, tunes and gives a learning rate."""


MEASURES = ("exact", "cer", "wer", "loss")
"""What `eval.metrics` may name of a held-out source."""


class Zero(Enum):
    """How weights, gradients and optimizer state are spread over the ranks."""

    none = "none"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    zero2_offload = "zero2_offload"
    zero3_offload = "zero3_offload"

    @property
    def stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 is plain DDP."""
        return 0 if self is Zero.none else int(self.value[4])

    @property
    def offload(self) -> bool:
        """Whether optimizer state lives in host memory."""
        return self.value.endswith("_offload")


class Precision(Enum):
    """Arithmetic of the forward and backward pass. Master weights and moments are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class Resume(Enum):
    """`auto` goes on from the newest complete checkpoint; `never` wants an empty run folder."""

    auto = "auto"
    never = "never"


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    constant = "constant"
    wsd = "wsd"


class OnSpikes(Enum):
    """After too many skipped steps in a row: `stop`, or take earlier weights and go on with later data."""

    stop = "stop"
    rollback = "rollback"


class LossNorm(Enum):
    """What every supervised token weighs: the same, 1/n of its sample's n tokens, or 1/sqrt(n)."""

    token = "token"
    sample = "sample"
    sqrt = "sqrt"


class Objective(Enum):
    """What is learnt: the next token, or a stand-in task that trains one tower alone.

    `patch_labels` names every patch of a picture, `ctc` transcribes a clip (train/model/stand_in.py).
    """

    next_token = "next_token"
    patch_labels = "patch_labels"
    ctc = "ctc"

    @property
    def tower(self) -> str | None:
        """The one module a stand-in task trains."""
        return {"patch_labels": "vision_encoder", "ctc": "audio_encoder"}.get(self.value)


class WandbMode(Enum):
    """Where Weights & Biases logs go."""

    off = "off"
    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class ModuleLR:
    """Learning rates that replace `optim.lr` for one module."""

    vision_encoder: float | None = None
    vision_proj: float | None = None
    llm: float | None = None
    audio_encoder: float | None = None
    audio_proj: float | None = None

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        return [
            f"{name}={value}: must be above 0. Freeze the module with tune_{name}=false instead."
            for name in MODULES
            if (value := getattr(self, name)) is not None and not _positive(value)
        ]


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule. `warmup` and `decay` are shares of all steps; `decay` is for wsd (0.1).

    A step whose gradient norm is above `spike_factor` times the median of the last applied ones is skipped.
    """

    lr: float = 1e-5
    module_lr: ModuleLR = field(default_factory=ModuleLR)
    schedule: Schedule = Schedule.cosine
    warmup: float = 0.03
    decay: float | None = None
    min_factor: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip: float = 1.0
    spike_factor: float | None = None

    @property
    def decay_share(self) -> float:
        """Share of all steps in which a wsd schedule falls."""
        return 0.1 if self.decay is None else self.decay

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = []
        if not _positive(self.lr):
            found.append(f"lr={self.lr}: must be above 0. Use 1e-5 for omni_sft, 1e-3 for a connector.")
        for name, low, high in (("warmup", 0, 1), ("min_factor", 0, 1), ("beta1", 0, 1), ("beta2", 0, 1)):
            value = getattr(self, name)
            if not low <= value < high:
                found.append(f"{name}={value}: must be at least {low} and below {high}.")
        if self.schedule is Schedule.wsd and not 0 < self.decay_share <= 1 - self.warmup:
            found.append(f"decay={self.decay}: must be above 0 and fit beside warmup={self.warmup}. Use 0.1.")
        if self.schedule is not Schedule.wsd and self.decay is not None:
            found.append(f"decay={self.decay}: is for optim.schedule=wsd only. Remove it, or use wsd.")
        if self.schedule is Schedule.constant and self.min_factor:
            found.append(f"min_factor={self.min_factor}: a constant schedule never falls. Set it to 0.0.")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            found.append(f"weight_decay={self.weight_decay}: must not be negative. Use 0.1.")
        for name, good in (("eps", 1e-8), ("clip", 1.0)):
            if not _positive(getattr(self, name)):
                found.append(f"{name}={getattr(self, name)}: must be above 0. Use {good}.")
        if self.spike_factor is not None and not self.spike_factor > 1:
            found.append(f"spike_factor={self.spike_factor}: must be above 1. Use 10, or null for none.")
        return found


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length and batch of a run. Without `steps` and `epochs` it is one epoch of the mixture.

    `stage_steps` are steps by stage, for a config that serves several; `steps` or `epochs` replace them.
    After `max_minutes`, counted from the start of the process, the run saves and ends, to go on later. A
    rank that makes no progress for `hang_seconds` says what it was at and ends (null: it may wait for ever).
    """

    steps: int | None = None
    epochs: float | None = None
    stage_steps: dict[str, int] = field(default_factory=dict)
    packs_per_step: int = 64
    micro_batch_packs: int = 1
    loss: LossNorm = LossNorm.token
    max_skipped_steps: int = 10
    on_spikes: OnSpikes = OnSpikes.stop
    max_minutes: float | None = None
    hang_seconds: float | None = 1800.0

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = []
        if self.steps is not None and self.epochs is not None:
            found.append(f"steps={self.steps}: train.epochs={self.epochs} is set too. Set one of them.")
        for name in (
            "steps",
            "epochs",
            "packs_per_step",
            "micro_batch_packs",
            "max_skipped_steps",
            "max_minutes",
            "hang_seconds",
        ):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                advice = " Use null for none." if name in ("max_minutes", "hang_seconds") else ""
                found.append(f"{name}={value}: must be above 0.{advice}")
        for stage, value in self.stage_steps.items():
            if value < 1:
                found.append(f"stage_steps.{stage}={value}: must be at least 1.")
        if not found and self.packs_per_step % self.micro_batch_packs:
            found.append(
                f"micro_batch_packs={self.micro_batch_packs}: must divide "
                f"train.packs_per_step={self.packs_per_step}. Use 1."
            )
        return found


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on held-out samples: every `every` steps (0: only at the end).

    The loss is over at most `max_packs` packs, handed out in whole steps of `train.packs_per_step`, so
    at least one step is made. The first `samples` samples of every held-out source are answered too,
    `batch` at once, with at most `max_new_tokens` tokens (0: none are); with `blank` all that is done
    again with the media blanked. `metrics` gives values names of their own: NAME: SOURCE.MEASURE.
    """

    every: int = 0
    max_packs: int = 256
    samples: int = 0
    max_new_tokens: int = 64
    batch: int = 32
    blank: bool = True
    metrics: dict[str, str] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = []
        if self.every < 0:
            found.append(f"every={self.every}: must not be negative. Use 0 for the end of the run only.")
        if self.max_packs < 1:
            found.append(f"max_packs={self.max_packs}: must be at least 1. Use 256.")
        if self.samples < 0:
            found.append(f"samples={self.samples}: must not be negative. Use 0 for the loss only.")
        for name, good in (("max_new_tokens", 64), ("batch", 32)):
            if getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)}: must be at least 1. Use {good}.")
        for name, place in self.metrics.items():
            source, _, measure = place.rpartition(".")
            if not source or measure not in MEASURES:
                found.append(
                    f"metrics.{name}={place!r}: is not SOURCE.MEASURE. "
                    f"Use a held-out source and one of {', '.join(MEASURES)}."
                )
        return found


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """How often to save, in steps, and what to keep: the last `keep`, and every one at a multiple of
    `keep_every`. `background` writes while training goes on, from a copy in host memory."""

    every: int = 500
    keep: int = 2
    keep_every: int | None = None
    background: bool = True

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = [
            f"{name}={getattr(self, name)}: must be at least 1."
            for name in ("every", "keep", "keep_every")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not found and self.keep_every and self.keep_every % self.every:
            found.append(
                f"keep_every={self.keep_every}: must be a multiple of checkpoint.every={self.every}. "
                f"Use {-(-self.keep_every // self.every) * self.every}."
            )
        return found


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What is shown. `peak_tflops` of one device is needed for MFU where it is not known by name;
    `samples` writes the keys of every step's samples into `samples.jsonl`."""

    every: int = 10
    samples: bool = False
    peak_tflops: float | None = None
    wandb: WandbMode = WandbMode.off
    wandb_project: str = "omni-trainer"

    def problems(self) -> list[str]:
        """Returns what is wrong, one line each."""
        found = []
        if self.every < 1:
            found.append(f"every={self.every}: must be at least 1. Use 10.")
        if self.peak_tflops is not None and not _positive(self.peak_tflops):
            found.append(f"peak_tflops={self.peak_tflops}: must be above 0. Use null.")
        return found


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One stage of training: what `--cfg job` prints and `RUN/config.yaml` keeps.

    `parents` are the recipes whose result `init_from` may name; `random` among them lets a pipeline
    begin here.
    """

    stage: str = "???"
    run: str = "runs/${stage}"
    resume: Resume = Resume.auto
    init_from: str | None = None
    parents: list[str] = field(default_factory=list)
    objective: Objective = Objective.next_token
    seed: int = 0
    tune_vision_encoder: bool = False
    tune_vision_proj: bool = False
    tune_llm: bool = False
    tune_audio_encoder: bool = False
    tune_audio_proj: bool = False
    zero: Zero = Zero.zero2
    precision: Precision = Precision.bf16
    lora: LoraConfig = field(default_factory=LoraConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def tuned(self) -> dict[str, bool]:
        """Which of the five modules train."""
        return {name: getattr(self, f"tune_{name}") for name in MODULES}

    @property
    def num_steps(self) -> int | None:
        """Steps of this run where the config says so; else epochs decide."""
        if self.train.steps is not None or self.train.epochs is not None:
            return self.train.steps
        return self.train.stage_steps.get(self.stage)

    @property
    def num_epochs(self) -> float | None:
        """Epochs of the mixture after which this run ends, where they decide and not steps."""
        return None if self.num_steps is not None else self.train.epochs or 1.0

    def learning_rate(self, module: str) -> float:
        """Returns the peak learning rate of one module."""
        own = getattr(self.optim.module_lr, module)
        return self.optim.lr if own is None else own

    def problems(self) -> list[str]:
        """Returns what is wrong between the parts, one line each."""
        found = []
        if not any(self.tuned.values()):
            found.append(
                "tune_llm=false: every module is frozen, so nothing would train. "
                f"Set one of {', '.join('tune_' + name for name in MODULES)} to true."
            )
        for name in MODULES:
            value = getattr(self.optim.module_lr, name)
            if value is not None and not self.tuned[name]:
                found.append(
                    f"optim.module_lr.{name}={value}: {name} is frozen. "
                    f"Set tune_{name}=true or remove the learning rate."
                )
            if getattr(self.model.recompute, name, False) and not self._has_activations(name):
                found.append(f"model.recompute.{name}=true: {name} keeps no activations. Set it to false.")
        if self.data.pack.length > self.model.llm.max_positions:
            found.append(
                f"data.pack.length={self.data.pack.length}: longer than "
                f"model.llm.max_positions={self.model.llm.max_positions}. Use at most that."
            )
        tower = self.objective.tower
        if tower and self.tuned != {name: name == tower for name in MODULES}:
            found.append(
                f"objective={self.objective.value}: trains the {tower} alone. "
                f"Set tune_{tower}=true and the other four to false."
            )
        found += self._problems_of_lora()
        for name, folder in {"weights": self.model.weights, **self.model.parts.named}.items():
            if self.init_from and folder:
                path = "model.weights" if name == "weights" else f"model.parts.{name}"
                found.append(f"{path}={folder}: init_from={self.init_from} is set too. Set one of them.")
        if self.init_from and not self.parents:
            found.append(
                f"init_from={self.init_from}: recipe {self.stage} accepts no parent. "
                "Name the stages it may start from in parents."
            )
        return found

    def _problems_of_lora(self) -> list[str]:
        if self.lora.adapted and self.objective.tower:
            return [
                f"lora.rank={self.lora.rank}: objective={self.objective.value} trains a tower whole. "
                "Use lora.rank=0."
            ]
        return [
            f"lora.modules: {name} is frozen. "
            f"Set tune_{name}=true, which trains its adapters, or take it out."
            for name in self.lora.adapted
            if not self.tuned.get(name, True)
        ]

    def _has_activations(self, module: str) -> bool:
        # The language model lies behind every connector, so its activations are kept whenever
        # anything trains; a frozen tower runs without gradients.
        return module == "llm" or self.tuned[module]


def _positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def all_problems(config: Any, path: str = "") -> list[str]:
    """Returns every mistake in a tree of configs, each line starting with its full config path."""
    prefix = f"{path}." if path else ""
    found = [prefix + line for line in config.problems()]
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            found += all_problems(value, prefix + entry.name)
        elif isinstance(value, dict):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    found += all_problems(item, f"{prefix}{entry.name}.{name}")
    return found
