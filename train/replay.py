"""Runs one step of a run again, in one process, and says what every sample of it does.

    python -m train.replay run=runs/omni_sft step=1234

This file only reads the request, so that a mistake in it is refused before torch is imported;
train/rerun.py does the work.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from train.compose import readable_errors
from train.config import Zero
from train.request import ModelRequest, read_model, take_words

EXAMPLE = "run=runs/omni_sft step=1234"


@dataclass(slots=True)
class Request:
    """The run and the step that is to be run again."""

    model: ModelRequest
    step: int


def read_request(words: list[str]) -> Request:
    """Returns what the words of a command line ask for.

    Raises:
        ValueError: there is no such run or step, or a word cannot be used.
    """
    chosen, rest = take_words(words, ("step", "weights", "zero"), EXAMPLE)
    if "weights" in chosen:
        raise ValueError(f"weights={chosen['weights']}: has no steps. Name a run, as in {EXAMPLE}.")
    text = chosen.get("step", "")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"step={text}: is no step. Use a number from 1 on, as in {EXAMPLE}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: a step is run again in one process. Start it without a launcher.")
    zero = [f"zero={chosen['zero']}"] if "zero" in chosen else []
    model = read_model([*rest, *zero], for_training=True)
    assert model.trained is not None
    if not zero:  # the arithmetic of the run; where its state lies makes no difference to it
        model.config.zero = Zero(model.trained.zero.value.removesuffix("_offload"))
    total = model.config.num_steps
    if total is not None and int(text) > total:
        raise ValueError(f"step={text}: {model.name} has {total} steps. Name one of them.")
    return Request(model, int(text))


def main(words: list[str] | None = None) -> None:
    """Runs a step again and prints its samples and numbers, as text or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m train.replay",
        description="Runs one step of a run again, in one process and without an update: the loss of every "
        "sample, whether it is finite, and the gradient norm of every module. The samples are those of "
        "RUN/spikes where that step is kept, else they are planned again. The weights are those of the "
        "newest checkpoint before the step, else those that the run began with.",
        epilog=f"Example: python -m train.replay {EXAMPLE}",
    )
    parser.add_argument("words", nargs="+", help="run=DIR, step=N, or any key=value of train.py")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_intermixed_args(words)
    with readable_errors():
        request = read_request(arguments.words)
        from train.rerun import rerun

        rerun(request.model, request.step, as_json=arguments.json)


if __name__ == "__main__":
    main()
