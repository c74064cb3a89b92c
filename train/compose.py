"""From YAML and command-line words to a checked `RunConfig`. Imports no torch, so that a bad recipe
is refused at once."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import Objective, RunConfig, all_problems

ROOT = Path(__file__).resolve().parent.parent
PASSING = (errno.EIO, errno.ESTALE)
"""What a network file system says in passing: another start may find it well again."""

QUIET_SECONDS = 10.0
"""How long a rank that leaves a mistake for the first to tell waits with its end, for which a launcher ends
all others: the first may be slower."""


def register() -> None:
    """Stores the schema and every recipe in Hydra's ConfigStore. Call before `@hydra.main`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        store.store(name=path.stem, group="recipe", node=OmegaConf.load(path), package="_global_")


def compose_words(words: list[str]) -> RunConfig:
    """Returns the config that `train.py` would run with these words of a command line.

    Raises:
        ValueError: with every mistake on a line of its own.
    """
    try:
        return to_run_config(compose_parts(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(reword(error)) from error


def compose_parts(words: list[str]) -> DictConfig:
    """Returns the composed config behind `compose_words`, its values not checked yet."""
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("run", words)


def to_run_config(composed: DictConfig) -> RunConfig:
    """Returns the dataclasses behind a composed config.

    Raises:
        ValueError: with every mistake on a line of its own that starts with its config path.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError("\n".join(_unset(key) for key in missing))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    found = all_problems(config)
    if found:
        raise ValueError("\n".join(found))
    return config


def refuse_world(config: RunConfig, world_size: int) -> list[str]:
    """Returns why the packs of a step cannot be shared among so many ranks."""
    packs = world_size * config.train.micro_batch_packs
    if config.train.packs_per_step % packs == 0:
        return []
    near = max(1, round(config.train.packs_per_step / packs)) * packs
    return [
        f"train.packs_per_step={config.train.packs_per_step}: not divisible among {world_size} ranks of "
        f"train.micro_batch_packs={config.train.micro_batch_packs}. Use {near}."
    ]


def refuse_metrics(config: RunConfig, held_out: list[str]) -> list[str]:
    """Returns which of `eval.metrics` are on none of the held-out sources, if there are any."""
    if not held_out or (config.objective is not Objective.next_token and not config.eval.samples):
        return []
    return [
        f"eval.metrics.{name}={place!r}: {source!r} is not a held-out source."
        f"{nearest(source, held_out)} Known: {', '.join(held_out)}."
        for name, place in config.eval.metrics.items()
        if (source := place.rpartition(".")[0]) not in held_out
    ]


def to_yaml(config: RunConfig) -> str:
    """Returns the YAML that `RUN/config.yaml` keeps."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Returns nested dicts with the values that the YAML of `to_yaml` would be read back to."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value.name if isinstance(value, Enum) else value for name, value in items}

    return dataclasses.asdict(config, dict_factory=plain)


@contextmanager
def readable_errors(every_rank: bool = False) -> Iterator[None]:
    """Prints mistakes a person can mend without a traceback and exits with 2.

    A disk or network that failed in passing, where another start may get further, exits with 1.

    Until the ranks have met they all make the same mistakes, so only the first prints; later
    (`every_rank`) each speaks for itself.
    """
    rank = os.environ.get("RANK", "0")
    quiet = rank != "0" and not every_rank
    speaker = f"rank {rank}: " if every_rank and os.environ.get("WORLD_SIZE", "1") != "1" else ""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets exceptions through instead of printing them
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(reword(error), quiet)
    except ValueError as error:
        _refuse(speaker + str(error), quiet)
    except OSError as error:
        if error.errno is None:
            raise
        text = f"{speaker}{error.filename or 'file system'}: {error.strerror}. Mend it and start again."
        passing = isinstance(error, (ConnectionError, TimeoutError)) or error.errno in PASSING
        _refuse(text, quiet, status=1 if passing else 2)


def _refuse(text: str, quiet: bool, status: int = 2) -> None:
    if sys.flags.dev_mode:  # python -X dev shows the traceback
        raise
    if quiet:
        time.sleep(QUIET_SECONDS)
    else:
        print(text, file=sys.stderr, flush=True)
    sys.exit(status)


def reword(error: Exception) -> str:
    """Returns Hydra's or OmegaConf's message in the project's form, with the nearest known name."""
    text = str(error)
    cause = error.__cause__
    detail = str(cause) if cause is not None else text
    unset = re.search(r"Missing mandatory value: ([\w.]+)", text)
    unset = unset or re.search(r"interpolation '\$\{([\w.]+)\}': Incompatible value 'None'", text)
    if unset:
        return _unset(unset.group(1))
    missing_option = re.search(r"Could not find '([\w/]+)/([^'/]+)'", text)
    if missing_option:
        return _unknown_option(*missing_option.groups())
    key = re.search(r"full_key: ([\w.\[\]]+)", detail + "\n" + text)
    path = key.group(1) if key else ""
    if (
        "is not in struct" in detail
        or "not in 'RunConfig'" in detail
        or re.search(r"Key '.*' not in", detail)
    ):
        return _unknown_key(path or _override_in(text))
    reason = detail.splitlines()[0].rstrip(".")
    return f"{path or _override_in(text) or 'command line'}: {reason}. See --cfg job for what is allowed."


def _unset(path: str) -> str:
    return f"{path}: it is not set. Set it, as in {path}=..."


def _override_in(text: str) -> str:
    found = re.search(r"Could not override '([\w.]+)'", text)
    return found.group(1) if found else ""


def _unknown_option(group: str, name: str) -> str:
    group = group.removeprefix("configs/")
    if group == "recipe":
        known = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    else:
        known = sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))
    return f"{group}='{name}': there is none of that name.{nearest(name, known)} Known: {', '.join(known)}."


def _unknown_key(path: str) -> str:
    schema = OmegaConf.structured(RunConfig)
    known = sorted(_paths(schema))
    return f"{path}: not a known key.{nearest(path, known)} See every key with --cfg job."


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in node:
        yield prefix + str(name)
        child = node._get_node(str(name))
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _paths(child, f"{prefix}{name}.")


def nearest(name: str, known: list[str]) -> str:
    """Returns ` Did you mean '...'?` with the known name that is most like `name`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
