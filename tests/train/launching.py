"""Starts `train.py` as a person would, in one process or several, and reads back what it left."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import BUILT_IN
from train.release import CONFIG, release_config
from train.request import read_model
from train.weights import WeightReader

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model=tiny",
    "model.llm.width=64",
    "model.llm.intermediate=128",
    "model.llm.layers=2",
    "model.llm.heads=2",
    "model.llm.kv_heads=1",
    "model.vision.width=32",
    "model.vision.intermediate=64",
    "model.vision.layers=1",
    "model.vision.heads=2",
    "model.vision.resampler_heads=2",
    "model.audio.width=32",
    "model.audio.layers=1",
    "model.audio.heads=2",
    "media.image.slice_pixels=56",
    "media.image.queries=4",
    "media.audio.mel_bins=32",
    "data.pack.length=256",
    "data.holdout=0.0",
    "log.every=1",
)


@dataclass
class Finished:
    """A run that ended."""

    folder: Path
    code: int
    output: str

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    @property
    def grad_norms(self) -> list[float]:
        return [record["grad_norm"] for record in self.records]

    @property
    def stage(self) -> dict:
        return json.loads((self.folder / "final" / "stage.json").read_text())

    def weights(self) -> dict:
        reader = WeightReader(self.folder / "final")
        return {name: reader.read("weight", name, 0, 2**62) for name in reader.shapes}


def command(folder: Path, words: tuple[str, ...], processes: int) -> list[str]:
    """Returns the command line of a run in `folder`."""
    arguments = ["train.py", f"run={folder}", *words]
    if processes == 1:
        return [sys.executable, *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", "configs/accelerate/cpu2.yaml", "--num_processes", str(processes)]
    return [*launcher, *options, "--main_process_port", str(free_port()), *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Returns an environment without a launcher's leftovers."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    }
    return kept | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }


def launch(
    folder: Path,
    *words: str,
    processes: int = 1,
    code: int | None = 0,
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> Finished:
    """Runs `train.py` with `words` until it ends, and checks its exit status unless `code` is None.

    A run is judged by what it left: a launcher that stumbles after all work is done is no failure.
    """
    done = subprocess.run(
        command(folder, words, processes),
        cwd=ROOT,
        env=environment() | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    finished = Finished(folder, done.returncode, done.stdout)
    complete = (folder / "final" / "stage.json").is_file()
    if code is not None and done.returncode != code and not (code == 0 and complete):
        raise AssertionError(f"exit status {done.returncode}, expected {code}:\n{done.stdout[-4000:]}")
    return finished


def release(run: Path, out: Path) -> Path:
    """Returns `out`, made a released folder that holds the weights of a finished run, in fp32."""
    shutil.copytree(run / "final", out, ignore=shutil.ignore_patterns("config.yaml", "stage.json"))
    shutil.copy(BUILT_IN, out)
    config = read_model([f"run={run}"]).config
    content = release_config(
        config.model, config.media, config.data.template, eos_token_id=5, pad_token_id=2, dtype="float32"
    )
    (out / CONFIG).write_text(json.dumps(content))
    return out
