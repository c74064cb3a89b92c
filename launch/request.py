"""What a person asked of a pipeline: the words of its command line, sorted by whom they are for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from train.compose import ROOT, nearest

TAKEN = {
    "run": "every stage has a folder of its own. Use runs=FOLDER for all of them",
    "recipe": "the pipeline names the recipes. Use another pipeline",
    "stage": "the recipe names its stage. Use another pipeline",
}
"""Keys of a run that a pipeline sets itself, and what to say to those who set them."""

OWN = {
    "runs": "one folder holds all stages. Use runs=FOLDER",
    "init_from": "stages start from the one before. Use init_from=RUN for the first",
    "accelerate": "all stages are started alike. Use accelerate=NAME",
    "processes": "all stages are started alike. Use processes=N",
    "retries": "all stages are started again alike. Use retries=N",
}
"""Keys that are for the pipeline itself, and what to say to those who set them for a stage."""

FIRST_ONLY = ("model.weights", "model.parts.", "model.fresh", "model.ignore")
"""Beginnings of keys about released weights: only the first stage starts from them."""

ONE_PROCESS = "one"
"""The file of configs/accelerate/ that starts a single process, which needs no launcher."""


@dataclass(slots=True)
class Request:
    """A pipeline's command line. `words` are for every stage, `stage_words` for one of them.

    `num_processes` None leaves their number to the accelerate config; that is None where `train.py` is
    started without a launcher. `world_size` is the number of ranks that there will be. A stage may crash
    `retries` times in a row without a new checkpoint and is started again.
    """

    pipeline: Path
    runs: Path
    words: list[str] = field(default_factory=list)
    stage_words: dict[str, list[str]] = field(default_factory=dict)
    init_from: str | None = None
    accelerate: Path | None = None
    num_processes: int | None = None
    world_size: int = 1
    retries: int = 2


def read_request(pipeline: str, words: list[str]) -> Request:
    """Returns what the words of a command line ask for.

    Raises:
        ValueError: a word is none of ours, with every such mistake on a line of its own.
    """
    own: dict[str, str] = {}
    request = Request(Path(pipeline), Path("runs") / Path(pipeline).stem)
    found: list[str] = []
    for word in words:
        stage, text = _split_stage(word)
        key, equals, value = text.partition("=")
        refused = refuse_key(key, TAKEN | OWN if stage else TAKEN)
        if not equals and not key.startswith("~"):
            found.append(f"{word}: is no key=value. Write it as train.steps=100, for example.")
        elif refused:
            found.append(f"{word}: {refused}.")
        elif key in OWN and not stage:
            own[key] = value
        else:
            (request.stage_words.setdefault(stage, []) if stage else request.words).append(text)
    for take in (_take_pipeline, _take_processes, _take_retries, _take_accelerate):
        try:
            take(own, request)
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ValueError("\n".join(found))
    return request


def refuse_key(key: str, taken: dict[str, str]) -> str:
    """Returns what to say to those who set a key that the pipeline sets itself; nothing for others.

    Hydra's `+`, `++` and `~` before a key change nothing of that.
    """
    return taken.get(key.lstrip("+~"), "")


def _split_stage(word: str) -> tuple[str, str]:
    """Returns the stage that `STAGE:key=value` is for, or nothing, and the rest."""
    parts = re.fullmatch(r"(\w+):(.+)", word)
    return (parts.group(1), parts.group(2)) if parts else ("", word)


def _take_pipeline(own: dict[str, str], request: Request) -> None:
    request.runs = Path(own.get("runs", request.runs))
    request.init_from = own.get("init_from")
    request.pipeline = find_file("pipeline", str(request.pipeline), ROOT / "recipes" / "pipelines")


def _take_processes(own: dict[str, str], request: Request) -> None:
    text = own.get("processes", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"processes={text}: must be a whole number above 0. Use 1.")
    request.num_processes = int(text) if "processes" in own else None


def _take_retries(own: dict[str, str], request: Request) -> None:
    text = own.get("retries", str(request.retries))
    if not text.isdecimal():
        raise ValueError(f"retries={text}: must be a whole number. Use 2, or 0 for none.")
    request.retries = int(text)


def _take_accelerate(own: dict[str, str], request: Request) -> None:
    name = own.get("accelerate", ONE_PROCESS)
    file = find_file("accelerate", name, ROOT / "configs" / "accelerate")
    content = read_yaml(file)
    if content.get("num_machines", 1) != 1:
        raise ValueError(
            f"accelerate={name}: is for several machines. Start train.py on each of them, a stage at a time."
        )
    request.accelerate = None if name == ONE_PROCESS else file
    request.world_size = request.num_processes or content.get("num_processes", 1)
    if content.get("num_processes", 1) == 1 and request.world_size > 1:
        raise ValueError(
            f"processes={request.num_processes}: accelerate={name} starts one. "
            "Use accelerate=cpu2 or accelerate=gpus."
        )


def find_file(where: str, name: str, folder: Path) -> Path:
    """Returns the YAML file that is meant by a path, or by its name in `folder`.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    raise ValueError(
        f"{where}='{name}': there is none of that name.{nearest(name, known)} "
        f"Known: {', '.join(known)}; or name a .yaml file."
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the content of a YAML file that holds keys and values.

    Raises:
        ValueError: it is no such file.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: is no sound YAML ({' '.join(str(error).split())}). Mend it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no keys. Write key: value lines.")
    return {str(key): value for key, value in content.items()}
