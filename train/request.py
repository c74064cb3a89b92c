"""The model that a command names: `run=DIR`, what train.py left behind, or `weights=DIR`, a released folder.

Imports no torch, so that a mistake is refused at once. Every other word changes the config, as for train.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.tokenizer import FILES, tokenizer_file
from train.compose import compose_parts, compose_words, reword, to_run_config
from train.config import Objective, Precision, RunConfig, Zero
from train.folder import RunFolder
from train.parent import tokenizer_folder
from train.release import CONFIG, read_json, sizes_of, template_of

MODEL_WORDS = ("run", "weights")
"""The two words that name a model; a command takes exactly one of them."""

DATA_KEYS = ("path", "sources", "held_out", "holdout", "tags")
"""What `data=NAME` takes from that file. Tokenizer, template and row length stay those of the run."""


@dataclass(slots=True)
class ModelRequest:
    """A model and the config to use it with.

    `weights` is the folder that holds them; None means those that the run `config.run` left. `trained` is
    the config as that run was made with, None for a released folder, of which nobody knows.
    """

    config: RunConfig
    weights: Path | None
    trained: RunConfig | None

    @property
    def name(self) -> str:
        """Returns the word that named the model."""
        return f"run={self.config.run}" if self.weights is None else f"weights={self.weights}"


def take_words(words: list[str], own: tuple[str, ...], example: str) -> tuple[dict[str, str], list[str]]:
    """Returns the values of the words named in `own`, the last of each, and all other words.

    Raises:
        ValueError: a word is not key=value.
    """
    plain = [word for word in words if "=" not in word]
    if plain:
        raise ValueError(f"{plain[0]}: is not KEY=VALUE. Use words such as {example}.")
    chosen = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in own)
    return chosen, [word for word in words if word.split("=", 1)[0] not in own]


def read_model(words: list[str], data: str | None = None, *, for_training: bool = False) -> ModelRequest:
    """Returns the model that `run=DIR` or `weights=DIR` names; the other words change its config.

    `data` names a file of configs/data, whose sources stand in the place of the run's. `for_training` takes
    a run that has saved nothing yet, and one of a stand-in task, too.

    Raises:
        ValueError: there is no such model, or a word cannot be used; every mistake on a line of its own.
    """
    chosen, changes = take_words(words, MODEL_WORDS, "run=DIR")
    if len(chosen) == 2:
        raise ValueError(f"weights={chosen['weights']}: run={chosen['run']} is set too. Set one of them.")
    try:
        if "run" in chosen:
            request = _read_run(Path(chosen["run"]), changes, data)
        elif "weights" in chosen:
            request = _read_weights(Path(chosen["weights"]), changes, data)
        else:
            raise ValueError(
                "run: it is not set. Set it, as in run=runs/omni_sft, or weights=DIR for a released folder."
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(reword(error)) from error
    if not for_training:
        _check_objective(request)
    _check_files(request, for_training)
    return request


def _read_run(folder: Path, changes: list[str], data: str | None) -> ModelRequest:
    kept = folder / "config.yaml"
    if not kept.is_file():
        raise ValueError(f"run={folder}: holds no config.yaml. {_advice(folder)}")
    made_with = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(kept))
    assert isinstance(made_with, DictConfig)
    trained = to_run_config(made_with)
    # One process needs nothing spread; several may, with zero=... among the words.
    made_with.merge_with({"run": str(folder), "zero": Zero.none})
    if (folder / "final" / FILES[0]).is_file():  # a finished run keeps its own, wherever it moved
        made_with.data.tokenizer = str(folder / "final")
    if data:
        _replace_data(made_with, data, changes)
    return ModelRequest(_changed(made_with, changes), None, trained)


def _advice(folder: Path) -> str:
    if (folder / CONFIG).is_file():
        return f"It is a released folder: use weights={folder}."
    return "Name the folder of a run of train.py."


def _read_weights(folder: Path, changes: list[str], data: str | None) -> ModelRequest:
    if not (folder / CONFIG).is_file():
        is_run = (folder / "config.yaml").is_file()
        advice = f"It is a run: use run={folder}." if is_run else "Name an exported or released folder."
        raise ValueError(f"weights={folder}: holds no {CONFIG}. {advice}")
    # Without data=NAME nothing reads the source, but a config has to have one.
    words = [f"data={data}"] if data else ["data=folder", f"data.path={folder}"]
    made = compose_parts([*words, *_of_data(changes)])
    made.merge_with(_released(folder, made.data.tokenizer, made.data.pack.length))
    return ModelRequest(_changed(made, changes), folder, None)


def _released(folder: Path, tokenizer: str | None, length: int) -> dict[str, Any]:
    """Returns what a released folder says of a config: sizes, template, tokenizer, precision."""
    content = read_json(folder)
    model, media = sizes_of(content, str(folder / CONFIG))
    whole = content.get("torch_dtype", content.get("dtype")) == "float32"
    return {
        "model": OmegaConf.structured(model),
        "media": OmegaConf.structured(media),
        "precision": Precision.fp32 if whole else Precision.bf16,
        "zero": Zero.none,
        "data": {
            "template": OmegaConf.structured(template_of(content, str(folder / CONFIG))),
            "tokenizer": tokenizer or str(folder),
            "pack": {"length": min(length, model.llm.max_positions // 64 * 64)},
        },
    }


def _of_data(changes: list[str]) -> list[str]:
    return [word for word in changes if word.lstrip("+").startswith("data.")]


def _changed(made: DictConfig, changes: list[str]) -> RunConfig:
    # A `+`, by which train.py adds a name that a file does not have, says nothing more here. Merged one
    # by one (`merge_with_dotlist`), words could add no source.
    made.merge_with(OmegaConf.from_dotlist([word.lstrip("+") for word in changes]))
    return to_run_config(made)


def _replace_data(config: DictConfig, name: str, changes: list[str]) -> None:
    """Puts the sources of configs/data/NAME.yaml, and the metrics on them, in the place of the run's."""
    words = [f"recipe={config.stage}", f"model={config.model.name}", f"data={name}", *_of_data(changes)]
    named = OmegaConf.structured(compose_words(words))
    for key in DATA_KEYS:
        config.data[key] = named.data[key]
    config.eval.metrics = named.eval.metrics


def _check_objective(request: ModelRequest) -> None:
    objective = request.config.objective
    if objective is not Objective.next_token:
        raise ValueError(
            f"{request.name}: its objective was {objective.value}, a stand-in task whose head is not kept. "
            "Name the run of a later stage."
        )


def _check_files(request: ModelRequest, for_training: bool) -> None:
    """Raises ValueError where opening the model would: that takes seconds of imports first."""
    tokenizer_file(tokenizer_folder(request.config))
    folder = request.weights
    if folder is not None:
        if not any(folder.glob("model*.safetensors")):
            raise ValueError(f"{request.name}: holds no model*.safetensors. Copy the whole folder.")
        return
    run = RunFolder(request.config)
    if not for_training and not run.is_complete and not any(run.checkpoints.glob("step-*/manifest.json")):
        raise ValueError(f"{request.name}: has no weights yet. Wait for its first checkpoint.")
