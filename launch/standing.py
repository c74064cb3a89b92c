"""What is there already, and whether it still is what would be run now: nothing is ever trained again
or left as it is in silence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from data.config import SourceConfig
from data.index import load_folder
from launch.history import History, Origin
from launch.mistakes import gather
from launch.stages import Stage
from train.compose import refuse_metrics, refuse_world, to_plain
from train.first_weights import is_random, open_first_weights
from train.parent import refuse_model, refuse_random, refuse_stage, tokenizer_digest


@dataclass(slots=True)
class Indexes:
    """Digests of the indexes of folders of shards, each read once."""

    found: dict[str, str | ValueError] = field(default_factory=dict)

    def digest(self, where: str, source: SourceConfig) -> str:
        """Returns the digest of a source's index.

        Raises:
            ValueError: the folder cannot be used.
        """
        if source.path not in self.found:
            try:
                self.found[source.path] = load_folder(source.path).digest
            except ValueError as error:
                self.found[source.path] = error
        known = self.found[source.path]
        if isinstance(known, ValueError):
            raise ValueError(f"{where}.path={source.path}: {str(known).removeprefix(f'{source.path}: ')}")
        return known


def check_stages(stages: list[Stage], history: History, world_size: int) -> dict[str, dict[str, str]]:
    """Checks every stage's parent, data and what its folder holds; returns the digests of its data.

    `world_size` is the number of ranks that will run what is not complete.

    Raises:
        ValueError: with what differs, for all stages together.
    """
    indexes = Indexes()
    previous = [None, *stages[:-1]]

    def check(stage: Stage, before: Stage | None) -> dict[str, str]:
        digests, found = _digests(stage, indexes)
        found += _refusals_of_config(stage, world_size) + _refusals_of_folder(stage)
        found += _refusals_of_origin(stage, digests, history) + _refusals_of_parent(stage, before)
        if found:
            raise ValueError("\n".join(found))
        return digests

    digests = gather(
        [
            (stage.name, lambda stage=stage, before=before: check(stage, before))
            for stage, before in zip(stages, previous)
        ]
    )
    return {stage.name: digest for stage, digest in zip(stages, digests)}


def check_stage(stage: Stage, world_size: int) -> None:
    """Checks one stage that is not complete as `train.py` and its ranks will, without torch.

    Raises:
        ValueError: with all that is wrong.
    """
    _, found = _digests(stage, Indexes())
    found += _refusals_of_config(stage, world_size) + _refusals_of_folder(stage)
    found += _caught(lambda: open_first_weights(stage.config))
    if found:
        raise ValueError("\n".join(found))


def _refusals_of_config(stage: Stage, world_size: int) -> list[str]:
    """Returns what the config alone tells of what would stop the stage later."""
    config = stage.config
    found = _caught(lambda: tokenizer_digest(config))
    if stage.folder.is_complete:
        return found
    shares = config.data.sources if config.data.holdout else {}
    return found + refuse_world(config, world_size) + refuse_metrics(config, [*shares, *config.data.held_out])


def _refusals_of_origin(stage: Stage, digests: dict[str, str], history: History) -> list[str]:
    origin = _origin(stage, history)
    return _refusals_of_data(stage, digests, origin) + _refusals_of_weights(stage, origin)


def _refusals_of_parent(stage: Stage, before: Stage | None) -> list[str]:
    """Returns why the stage cannot start from the one before it, or from what the first one starts from."""
    found = _refusals_of_fit(stage, before) if before else []
    if before is None and is_random(stage.config):
        return refuse_random(stage.config)
    if before is None or before.folder.is_complete:
        found += _caught(lambda: open_first_weights(stage.config))
    return found


def _origin(stage: Stage, history: History) -> Origin | None:
    """Returns what a stage was made from; None where nothing is there that would be kept."""
    if stage.folder.is_complete:
        facts = json.loads(stage.folder.stage_file.read_text())
        return Origin(facts.get("data_index_digests", {}), (facts["parent"] or {}).get("weights_digest"))
    begun = any(stage.folder.checkpoints.glob("step-*/manifest.json"))
    return history.origin(stage.name) if begun else None


def _caught(check) -> list[str]:
    try:
        check()
    except ValueError as error:
        return [str(error)]
    return []


def _refusals_of_folder(stage: Stage) -> list[str]:
    return _caught(lambda: stage.folder.check(stage.config))


def _refusals_of_fit(stage: Stage, before: Stage) -> list[str]:
    """Returns why the stage could not start from the one before it, before either has run."""
    where = f"init_from={before.config.run}"
    found = refuse_stage(stage.config, before.config.stage, where)
    found += refuse_model(stage.config, to_plain(before.config), where)
    mine, other = stage.config.data.tokenizer, before.config.data.tokenizer
    if mine != other:
        found.append(f"data.tokenizer={mine}: the stage before has {other}. Use one for all stages.")
    return found


def _digests(stage: Stage, indexes: Indexes) -> tuple[dict[str, str], list[str]]:
    """Returns the digests of a stage's sources by config path, and what is wrong with any."""
    data = stage.config.data
    sources = {f"data.sources.{name}": source for name, source in data.sources.items()}
    sources |= {f"data.held_out.{name}": source for name, source in data.held_out.items()}
    digests, found = {}, []
    for where, source in sources.items():
        try:
            digests[where] = indexes.digest(where, source)
        except ValueError as error:
            found.append(str(error))
    return digests, found


def _refusals_of_data(stage: Stage, now: dict[str, str], origin: Origin | None) -> list[str]:
    then = origin.data_index_digests if origin else {}
    return [
        f"{where}: is other data than {stage.config.run} was made with: "
        f"index {then[where][:12]} then, {now[where][:12]} now. {_remedy(stage, 'data')}"
        for where in now
        if then.get(where, now[where]) != now[where]
    ]


def _refusals_of_weights(stage: Stage, origin: Origin | None) -> list[str]:
    """Returns why what a stage has become cannot be joined to the weights it starts from."""
    run = stage.config.init_from or "model.weights or model.parts"
    if origin is None or is_random(stage.config):
        return []
    now = parent_weights_digest(stage)
    if now is None:
        return [
            f"{stage.config.run}: has begun, but {run}, which it starts from, is not complete. "
            f"{_remedy(stage, 'stage before')}"
        ]
    then = origin.parent_weights_digest
    if then in (None, now):
        return []
    return [
        f"{stage.config.run}: started from other weights of {run} than are there now: "
        f"{then[:12]} then, {now[:12]} now. {_remedy(stage, 'weights')}"
    ]


def parent_weights_digest(stage: Stage) -> str | None:
    """Returns the digest of the weights that a stage starts from; None where there are none yet."""
    if stage.config.init_from is None:
        return open_first_weights(stage.config).digest
    file = Path(stage.config.init_from) / "final" / "stage.json"
    return json.loads(file.read_text())["weights_digest"] if file.is_file() else None


def _remedy(stage: Stage, what: str) -> str:
    return f"Put the {what} back, or remove {stage.config.run} and the stages after it to train them again."
