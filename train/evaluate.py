"""Evaluates a model on demand: loss, answers and metrics on held-out samples, with and without their media.

    python -m train.evaluate run=runs/omni_sft data=mine eval.samples=500
    python -m train.evaluate weights=omni_release data=mine

It works with the config that the run was made with, changed by the words given. This file only reads the
request, so that a mistake in it is refused before torch is imported; train/evaluation.py does the work.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig, trained_on
from train.compose import readable_errors
from train.config import RunConfig
from train.request import ModelRequest, read_model, take_words

SAMPLES = 200
"""Samples of every source that are answered where the run's own config asks for none."""


@dataclass(slots=True)
class Request:
    """What is to be evaluated, and the folder for its results."""

    model: ModelRequest
    out: Path

    @property
    def config(self) -> RunConfig:
        """Returns the config to evaluate with."""
        return self.model.config


def read_request(words: list[str]) -> Request:
    """Returns what the words of a command line ask for.

    Raises:
        ValueError: there is no such model, or a word cannot be used; every mistake on a line of its own.
    """
    chosen, rest = take_words(words, ("data", "out"), "run=DIR eval.samples=500")
    data = chosen.get("data")
    if not data:
        _check_path(rest)
    model = read_model(rest, data)
    config = model.config
    if model.trained:
        _check_unseen(config.data, model.trained.data)
    elif not data:
        raise ValueError("data: it is not set. Name the file of the held-out samples, as in data=mine.")
    _check_held_out(config)
    config.eval.samples = config.eval.samples or SAMPLES
    return Request(model, Path(chosen.get("out", (model.weights or Path(config.run)) / "evaluate")))


def _check_path(changes: list[str]) -> None:
    for path in (word for word in changes if word.lstrip("+").startswith("data.path=")):
        raise ValueError(
            f"{path}: the run's sources have paths of their own, so it would change nothing. "
            "Add data=NAME, or set data.held_out.NAME.path."
        )


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


def _check_held_out(config: RunConfig) -> None:
    if not config.data.held_out and not config.data.holdout:
        raise ValueError(
            "data.held_out: no sample is held out. Name a source there, or use data=NAME of a file that "
            "does (data.holdout would choose samples that this run was trained on)."
        )


def main(words: list[str] | None = None) -> None:
    """Evaluates a model, prints a table or JSON, and writes answers and result into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Evaluates a model on held-out samples: loss, exact match, error rates, and the same "
        "with grey pictures and silent clips. Of a run it takes the weights of the finished stage, else of "
        "the newest checkpoint. Answers and result go to DIR/evaluate, or to out=DIR.",
        epilog="Example: python -m train.evaluate run=runs/omni_sft data=mine eval.samples=500",
    )
    parser.add_argument(
        "words", nargs="+", help="run=DIR or weights=DIR, data=NAME, out=DIR, or any key=value of train.py"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_intermixed_args(words)
    with readable_errors():
        request = read_request(arguments.words)
        from train.evaluation import evaluate

        evaluate(request.model, request.out, as_json=arguments.json)


if __name__ == "__main__":
    main()
