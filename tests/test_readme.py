"""README.md and docs/ say what is so: their commands run, and the names in them exist.

Blocks marked `bash` in README.md are run, in order, in a copy of the repository with the records that the
README shows. Blocks marked `sh` need GPUs, several machines or a network: their options and settings are
parsed.
"""

import ast
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.distributed.run import get_args_parser

from data.config import SourceConfig
from data.formats import FORMATS, MediaSource, read_record
from data.sample import Part
from launch.pipeline import build_parser
from launch.request import read_request
from launch.slurm import read_order
from launch.stages import Stage, compose_stages
from tests.records import jpeg, wav
from tests.train.launching import Finished, environment
from train.compose import register, to_run_config
from train.config import MODULES, RunConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COPIED = ("train.py", "train", "data", "launch", "configs", "recipes")
MODULE_COMMANDS = (
    "data.prepare",
    "data.index",
    "data.show",
    "data.make_tokenizer",
    "data.demo",
    "launch.curves",
    "launch.pipeline",
    "launch.slurm",
    "train.chat",
    "train.evaluate",
    "train.export",
    "train.preflight",
    "train.replay",
)

OF_SLURM = {"--full", "--kill-on-bad-exit", "--requeue", "--signal", "--wait"}
"""Options of sbatch, srun and scancel that the pages name."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def table(text: str, heading: str) -> list[list[str]]:
    """Returns the rows of the table whose first heading this is."""
    lines = text[text.index(f"\n| {heading} |") + 1 :].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows][2:]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what runs, with the data and the config file that the README shows."""
    folder = tmp_path_factory.mktemp("readme")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (data := folder / "my_data").mkdir()
    (records,) = blocks(README, "jsonl")
    (data / "records.jsonl").write_text(records)
    rng = np.random.default_rng(0)
    for path in re.findall(r'"((?:images|audios)/[^"]+)"', records):
        (data / path).parent.mkdir(exist_ok=True)
        (data / path).write_bytes(jpeg(rng, 300, 400) if path.startswith("images") else wav(rng, 2.5))
    (mine,) = blocks(README, "yaml")
    (folder / "configs" / "data" / "mine.yaml").write_text(mine)
    return folder


def config_of(copy: Path, words: list[str]) -> RunConfig:
    register()
    with initialize_config_dir(str(copy / "configs"), version_base="1.3"):
        return to_run_config(compose("run", words))


@pytest.fixture(scope="module")
def ran(copy):
    """What the runnable blocks printed, with training cut to two steps."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = ""
    for block in blocks(README, "bash"):
        script = "set -euo pipefail\n" + re.sub(r"train\.steps=\d+", "train.steps=2", block)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=copy,
            env=environment() | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        # A run is judged by what it left: a launcher that stumbles after all work is done is no failure.
        runs = [copy / run / "final" / "stage.json" for run in re.findall(r"run=(\S+)", block)]
        complete = bool(runs) and all(stage.is_file() for stage in runs)
        assert done.returncode == 0 or complete, f"{block}\n{done.stdout[-4000:]}"
        printed += done.stdout
    return printed


def run_in(copy: Path, name: str) -> Finished:
    return Finished(copy / "runs" / name, 0, "")


def test_every_bash_block_runs_and_shows_what_the_readme_shows(ran):
    (shown,) = (block for block in blocks(README, "text") if "<|role_start|>" in block)
    assert shown.strip() in ran


def test_two_processes_of_zero_give_the_losses_of_one(ran, copy):
    assert run_in(copy, "two").losses == pytest.approx(run_in(copy, "first").losses, rel=1e-4)


def test_every_metric_is_explained(ran, copy):
    written = set().union(*run_in(copy, "first").records)
    rows = table(README[README.index("## Metrics") :], "key")
    optional = {"held_out", "nonfinite", "nonfinite_tokens"}
    assert {name for row in rows for name in quoted(row[0])} == written | optional


def test_every_file_of_a_run_folder_is_explained(ran, copy):
    layout = next(block for block in blocks(README, "text") if block.startswith("RUN/"))
    found = [path.relative_to(copy / "runs" / "first") for path in (copy / "runs" / "first").rglob("*")]
    for path in found:
        name = re.sub(r"step-\d{8}", "step-00000500", path.name)
        assert name in layout, path


def test_the_readmes_mistakes_are_refused_in_its_words(copy):
    example = next(block for block in blocks(README, "text") if "must be a multiple of 64" in block)
    with pytest.raises(ValueError) as error:
        config_of(copy, ["data.path=x", "optim.lr=-1", "data.pack.length=100"])
    assert sorted(str(error.value).splitlines()) == sorted(example.splitlines())


def test_the_readmes_data_file_is_a_sound_config(copy):
    config = config_of(copy, ["data=mine"])
    assert set(config.data.sources) == {"captions", "speech", "charts"} and config.data.held_out


def commands(text: str) -> list[list[str]]:
    """Returns the words of every command of the shell blocks: variables are 0, none is set before it."""
    found = []
    for block in blocks(text, "(?:ba)?sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$[A-Z_]+", "0", line), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_shell_command_of_a_page_is_accepted(page, copy):
    for words in commands(page.read_text()):
        if words[:2] == ["accelerate", "launch"]:
            parsed = launch_command_parser().parse_args(words[2:])
            assert parsed.training_script == "train.py"
            assert parsed.config_file is None or (ROOT / parsed.config_file).is_file()
            words = ["python", "train.py", *parsed.training_script_args]
        if words[:1] == ["torchrun"]:
            options = get_args_parser().parse_args(words[1:])
            words = ["python", *(["-m"] if options.module else []), options.training_script]
            words += options.training_script_args
        if words[:2] == ["python", "train.py"]:
            settings = [word for word in words[2:] if not word.startswith("--") and word != "job"]
            if not any(word.startswith("data") for word in settings):
                settings.append("data.path=somewhere")
            config_of(copy, settings)
        elif words[:3] == ["python", "-m", "launch.pipeline"]:
            assert compose_pipeline(words[3:])
        elif words[:3] == ["python", "-m", "launch.slurm"]:
            order = read_order([word for word in words[3:] if not word.startswith("-")])
            if order.pipeline:
                assert compose_pipeline([order.pipeline, *order.words])
            else:
                config_of(copy, order.words)
        elif words[:2] == ["python", "-m"]:
            assert words[2] in MODULE_COMMANDS


def compose_pipeline(words: list[str]) -> list[Stage]:
    """Returns the stages of a pipeline's command line; data=mine, which a reader writes, is the example."""
    options = build_parser().parse_intermixed_args(words)
    settings = [word.replace("data=mine", "data=example") for word in options.words]
    if not any(word.startswith("data") for word in settings):
        settings.append("data.path=somewhere")
    return compose_stages(read_request(options.pipeline, settings))


@pytest.fixture(scope="module")
def known_options(copy):
    """Every option of our commands, of the launchers, and those of Hydra and pytest that the pages name."""
    found = {"--cfg", "--resolve", "--help"} | {"--use_deepspeed"} | {"--write-tables"} | OF_SLURM
    for parser in (launch_command_parser(), get_args_parser()):
        for action in parser._actions:
            found.update(action.option_strings)
    for module in (*MODULE_COMMANDS, "tests.soak", "tests.fuzz"):
        found.update(re.findall(r"--[a-z][a-z-]*", help_of(module)))
    return found


@functools.cache
def help_of(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_of_a_page_exists(page, known_options):
    text = re.sub(r"^\|[-|]+$", "", page.read_text(), flags=re.M)
    used = set(re.findall(r"(?<![\w|-])--[a-z][a-z_-]+", text))
    assert used <= known_options, used - known_options


def test_every_command_stands_in_the_readme_and_has_an_example():
    listed = {quoted(row[0])[0].removeprefix("python -m ") for row in table(README, "command")}
    runnable = {
        f"{folder}.{path.stem}"
        for folder in ("data", "train", "launch")
        for path in (ROOT / folder).glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    } | {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in ("data", "train", "launch")
        for path in (ROOT / folder).glob("*/__main__.py")
    }
    assert runnable == set(MODULE_COMMANDS) == listed - {"python train.py"}
    for module in MODULE_COMMANDS:
        assert "example: python -m " + module in help_of(module).lower(), module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_file_leads_to_it(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith("https://"):
            assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_and_test_that_a_page_names_exists(page):
    folders = ("train", "data", "launch", "configs", "recipes", "tests", "docs")
    for word in quoted(page.read_text()):
        path, _, test = word.partition("::")
        if not re.fullmatch(rf"({'|'.join(folders)})/[\w./-]*", path) or path == "configs/data/mine.yaml":
            continue
        assert (ROOT / path).exists(), word
        if test:
            functions = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(n, "name")}
            assert test in functions, word


def config_keys() -> set[str]:
    """Returns every key of a run and every node above it; names of sources are written NAME."""
    source = OmegaConf.to_container(OmegaConf.structured(SourceConfig))
    tree = OmegaConf.to_container(OmegaConf.structured(RunConfig))
    tree["data"] |= {"sources": {"NAME": source}, "held_out": {"NAME": source}}

    def walk(node, prefix=""):
        for name, value in node.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return set(walk(tree))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_config_path_that_a_page_names_is_a_key(page):
    keys = config_keys()
    for word in quoted(page.read_text()):
        key = re.split(r"[=:\s]", word)[0].removesuffix(".*").replace("MODULE", MODULES[0])
        if not re.fullmatch(r"(data|train|optim|model|media|eval|checkpoint|log)(\.\w+)+", key):
            continue
        is_file = (ROOT / key).exists() or (ROOT / (key.replace(".", "/") + ".py")).exists()
        assert key in keys or is_file or (ROOT / key.replace(".", "/")).is_dir(), word


def test_the_settings_of_the_readme_are_keys():
    rows = table(README[README.index("## Settings") :], "key")
    words = [word.rstrip("=").replace("MODULE", MODULES[0]) for row in rows for word in quoted(row[0])]
    assert len(words) > 20 and set(words) <= config_keys() | {"recipe"}


def test_the_recipes_table_says_what_the_recipes_say():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")}
    rows = {quoted(row[0])[0]: row for row in table(README, "recipe")}
    assert set(rows) == set(recipes)
    for name, recipe in recipes.items():
        _, trains, tags, parents = rows[name]
        tuned = {module for module in MODULES if recipe.get(f"tune_{module}")}
        assert tuned == (set(MODULES) if trains == "everything" else set(quoted(trains))), name
        assert recipe.get("data", {}).get("tags", []) == ([] if tags == "all" else tags.split(", ")), name
        assert set(quoted(parents)) == {parent for parent in recipe["parents"] if parent in recipes}, name


def test_the_sizes_table_says_what_the_sizes_say(copy):
    rows = {quoted(row[0])[0]: row for row in table(README, "size")}
    assert set(rows) == {f"model={path.stem}" for path in (ROOT / "configs/model").glob("*.yaml")}
    for word, row in rows.items():
        rates = config_of(copy, [word, "data.path=x"]).model.stage_lr
        assert [float(rate) for rate in row[2].split(", ")] == [rates.connector, rates.encoder, rates.omni]


class AnyMedia(MediaSource):
    """Has every picture and clip that a record names."""

    def part(self, kind, reference):
        return Part(kind, media=reference)


def test_there_is_a_valid_example_of_every_format():
    page = (ROOT / "docs" / "data.md").read_text()
    examples = re.findall(r"^`(\w+)`: (?:[^`]|`[^`\n]+`)*?\n```json\n(.*?)^```", page, re.M | re.S)
    assert {name for name, _ in examples} == set(FORMATS)
    assert {quoted(row[0])[0] for row in table(README, "`--format`")} == set(FORMATS)
    for name, example in examples:
        assert read_record(name, json.loads(example), AnyMedia())


def test_the_table_of_causes_is_complete():
    patterns = (r'cause="(\w+)"', r'refuse\(\s*"(\w+)"', r'(?:cause|row\["cause"\]), \S+ = "(\w+)"')
    source = "".join(path.read_text() for path in sorted((ROOT / "data").glob("*.py")))
    raised = {cause for pattern in patterns for cause in re.findall(pattern, source)}
    listed = [
        cause for row in table((ROOT / "docs/data.md").read_text(), "cause") for cause in quoted(row[0])
    ]
    assert set(listed) == raised and len(listed) == len(raised)


# In pieces, so that this file does not hold what it looks for.
HOSTS = [
    a + b for a, b in (("py", "pi.org"), ("python", "hosted.org"), ("arti", "factory"), ("index", "-url"))
]
MACHINE_PATH = re.compile(r"(?<![\w.}$])/(?:" + "|".join(["work", "home", "root", "Users", "tmp"]) + r")/\w")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".cfg", ""}


def text_files() -> list[Path]:
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").open()} | {".git"}
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in ignored and not name.endswith(".egg-info")]
        found += [Path(folder, name) for name in files if Path(name).suffix in TEXT]
    return found


def test_no_file_names_a_machines_folders_or_a_package_registry():
    files = text_files()
    assert ROOT / "README.md" in files and ROOT / "pyproject.toml" in files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not MACHINE_PATH.search(text), f"{name_of(path)}: {MACHINE_PATH.search(text)}"
        assert not [host for host in HOSTS if host in text], name_of(path)
