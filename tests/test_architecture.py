"""Laws of direction: which part may import which (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from train.export.hub_code import code_files

ROOT = Path(__file__).resolve().parent.parent
OURS = ("data", "train", "launch", "tests")
FILES = sorted(path for name in ("data", "train", "launch") for path in (ROOT / name).rglob("*.py"))
FILES.append(ROOT / "train.py")
BANNED_NAMES = {"utils", "common", "helpers", "misc", "base", "manager"}
ONLY_IN = {
    "accelerate": {"train/engine.py"},
    "deepspeed": {"train/engine.py"},
    "peft": {"train/adapters.py"},
    "wandb": {"train/wandb_sink.py"},
    "webdataset": {"data/shards.py"},
}
# Torch-free by law, so that a bad recipe is refused before seconds of imports.
TORCH_FREE = {
    "train/chat.py",
    "train/evaluate.py",
    "train/export/__main__.py",
    "train/export/files.py",
    "train/export/request.py",
    "train/export/origin.py",
    "train/compose.py",
    "train/first_weights.py",
    "train/folder.py",
    "train/export/hub_code.py",
    "train/export/model_card.py",
    "train/lora.py",
    "train/parent.py",
    "train/parts.py",
    "train/release.py",
    "train/replay.py",
    "train/request.py",
    "train/sampling.py",
    "train/sinks.py",
    "train/stopping.py",
    "train/stored.py",
    "train/tensor_files.py",
    "train/model/shapes.py",
}
# What the reader of an exported folder has installed; av is optional there.
FOR_EXPORTS = {
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "PIL",
    "av",
    "flash_attn",
    *sys.stdlib_module_names,
}
# What `launch` may know of a run: how it is composed and where it is kept, nothing that computes.
FOR_LAUNCH = (
    "data.config",
    "data.index",
    "train.config",
    "train.compose",
    "train.folder",
    "train.parent",
    "train.first_weights",
    "train.sinks",
    "train.stopping",
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in OURS}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_arrows(path):
    name = name_of(path)
    for imported in ours(path):
        root = imported.split(".")[0]
        if name.startswith("data/"):
            assert root == "data", f"{name} imports {imported}"
        if name.startswith("train/model/") and root == "data":
            assert imported.startswith(("data.sample", "data.geometry")) or imported == "data"
        if name.startswith("train/model/") and root == "train":
            assert imported.startswith("train.model")
        if name.startswith("train/hub/") and root == "train":
            assert imported.startswith(("train.model", "train.hub", "train.release"))
        assert root != "tests", f"{name} imports {imported}"
        assert root != "launch" or name.startswith("launch/"), f"{name} imports {imported}"
        if name.startswith("launch/") and root != "launch":
            assert imported.startswith(FOR_LAUNCH), f"{name} imports {imported}"
    roots = {imported.split(".")[0] for imported in imports(path)}
    for library, allowed in ONLY_IN.items():
        assert library not in roots or name in allowed, f"{name} imports {library}"
    if path.name == "config.py" or name.startswith("launch/") or name in TORCH_FREE:
        assert "torch" not in roots, f"{name} imports torch"


def test_pipelines_and_slurm_leave_torch_alone():
    code = "import sys, launch.pipeline, launch.slurm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_exported_folder_needs_little():
    found = {}
    for name, text in code_files().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0]: name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found[(node.module or "").split(".")[0]] = name
    assert set(found) <= FOR_EXPORTS, found


def test_there_is_no_import_cycle():
    graph = {}
    for path in FILES:
        module = name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if path == ROOT / "train.py":
            module = "the entry"  # it shares its name with the package
        graph[module] = ours(path)
    graph = {module: {name for name in names if name in graph} for module, names in graph.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for following in sorted(graph[module]):
                visit(following, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_has_a_name_that_says_nothing_or_hides_a_standard_module(path):
    # `data/` and `train/` are packages, so only the banned names and stdlib names are the danger.
    assert path.stem not in BANNED_NAMES
    assert path.stem not in sys.stdlib_module_names or path.stem == "__init__"


def test_the_wheel_holds_no_module():
    text = (ROOT / "pyproject.toml").read_text()
    assert "bypass-selection = true" in text and 'dev-mode-dirs = ["."]' in text
