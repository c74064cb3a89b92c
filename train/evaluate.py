"""Evaluates a run on demand: loss, answers and metrics on held-out samples, with and without its media.

    python -m train.evaluate run=runs/omni_sft data=mine eval.samples=500

It works with the config that the run was made with, changed by the words given. This file only reads the
request, so that a mistake in it is refused before torch is imported; train/evaluation.py does the work.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig, trained_on
from train.compose import compose_words, readable_errors, reword, to_run_config
from train.config import Objective, RunConfig, Zero

SAMPLES = 200
"""Samples of every source that are answered where the run's own config asks for none."""

DATA_KEYS = ("path", "sources", "held_out", "holdout", "tags")
"""What `data=NAME` takes from that file. Tokenizer, template and row length stay those of the run."""


@dataclass(slots=True)
class Request:
    """What is to be evaluated, and the folder for its results."""

    config: RunConfig
    out: Path


def read_request(words: list[str]) -> Request:
    """Returns what the words of a command line ask for.

    Raises:
        ValueError: there is no such run, or a word cannot be used; every mistake on a line of its own.
    """
    plain = [word for word in words if "=" not in word]
    if plain:
        raise ValueError(f"{plain[0]}: is not KEY=VALUE. Use words such as run=DIR eval.samples=500.")
    chosen = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in ("run", "data", "out"))
    changes = [word for word in words if word.split("=", 1)[0] not in ("run", "data", "out")]
    if "run" not in chosen:
        raise ValueError("run: it is not set. Set it, as in run=runs/omni_sft.")
    _check_path(changes, chosen.get("data"))
    folder = Path(chosen["run"])
    config = _config_of(folder, changes, chosen.get("data"))
    _check(config)
    config.eval.samples = config.eval.samples or SAMPLES
    return Request(config, Path(chosen.get("out", folder / "evaluate")))


def _check_path(changes: list[str], data: str | None) -> None:
    for path in (word for word in changes if word.lstrip("+").startswith("data.path=")):
        if not data:
            raise ValueError(
                f"{path}: the run's sources have paths of their own, so it would change nothing. "
                "Add data=NAME, or set data.held_out.NAME.path."
            )


def _config_of(folder: Path, changes: list[str], data: str | None) -> RunConfig:
    kept = folder / "config.yaml"
    if not kept.is_file():
        raise ValueError(f"run={folder}: holds no config.yaml. Name the folder of a run of train.py.")
    try:
        made_with = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(kept))
        assert isinstance(made_with, DictConfig)
        trained = to_run_config(made_with)
        # One process needs nothing spread; several may, with zero=... among the words.
        made_with.merge_with({"run": str(folder), "zero": Zero.none})
        if data:
            _replace_data(made_with, data, [word for word in changes if word.lstrip("+").startswith("data.")])
        # A `+`, by which train.py adds a name that a file does not have, says nothing more here. Merged one
        # by one (`merge_with_dotlist`), words could add no source.
        made_with.merge_with(OmegaConf.from_dotlist([word.lstrip("+") for word in changes]))
        config = to_run_config(made_with)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(reword(error)) from error
    _check_unseen(config.data, trained.data)
    return config


def _check_unseen(data: DataConfig, trained: DataConfig) -> None:
    """Raises ValueError where samples that count as held out were trained on."""
    folders = {os.path.realpath(source.path) for source in trained.sources.values()}
    for name, source in data.sources.items():
        if data.holdout > trained.holdout and os.path.realpath(source.path) in folders:
            raise ValueError(
                f"data.holdout={data.holdout}: source {name!r} was trained on with "
                f"data.holdout={trained.holdout}, so this would evaluate on training samples. "
                "Use at most that."
            )
    if problems := trained_on(data.held_out, trained.sources):
        raise ValueError("\n".join(f"data.{problem}" for problem in problems))


def _replace_data(config, name: str, changes: list[str]) -> None:
    """Puts the sources of configs/data/NAME.yaml, and the metrics on them, in the place of the run's."""
    words = [f"recipe={config.stage}", f"model={config.model.name}", f"data={name}", *changes]
    named = OmegaConf.structured(compose_words(words))
    for key in DATA_KEYS:
        config.data[key] = named.data[key]
    config.eval.metrics = named.eval.metrics


def _check(config: RunConfig) -> None:
    if config.objective is not Objective.next_token:
        raise ValueError(
            f"run={config.run}: its objective was {config.objective.value}, a stand-in task whose head is "
            "not kept. Evaluate the run of a later stage."
        )
    if not config.data.held_out and not config.data.holdout:
        raise ValueError(
            "data.held_out: no sample is held out. Name a source there, or use data=NAME of a file that "
            "does (data.holdout would choose samples that this run was trained on)."
        )


def main(words: list[str] | None = None) -> None:
    """Evaluates a run, prints a table or JSON, and writes answers and result into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Evaluates a run on its held-out samples: loss, exact match, error rates, and the same "
        "with grey pictures and silent clips. Takes the weights of the finished stage, else of the newest "
        "checkpoint. Answers and result go to RUN/evaluate, or to out=DIR.",
        epilog="Example: python -m train.evaluate run=runs/omni_sft data=mine eval.samples=500",
    )
    parser.add_argument("words", nargs="+", help="run=DIR, data=NAME, out=DIR, or any key=value of train.py")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(words)
    with readable_errors():
        request = read_request(arguments.words)
        from train.evaluation import evaluate

        evaluate(request.config, request.out, as_json=arguments.json)


if __name__ == "__main__":
    main()
