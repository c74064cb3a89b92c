"""The code files of an exported folder: those of train/hub and all that they import of this project.

They are the project's own files; only their imports are rewritten, from `from data.mel import ...` to
`from .mel import ...`, which is what transformers' dynamic modules follow. Imports no torch.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = {
    "AutoConfig": "train.hub.configuration_megrezo.MegrezOConfig",
    "AutoModelForCausalLM": "train.hub.modeling_megrezo.MegrezO",
    "AutoProcessor": "train.hub.processing_megrezo.MegrezOProcessor",
}
RENAMED = {"data.config": "data_config", "train.model.config": "model_config"}
"""Two modules of one name, in a folder without folders."""

IMPORT = re.compile(r"^(\s*from )((?:data|train)(?:\.\w+)+)( import )", re.MULTILINE)


def auto_map() -> dict[str, str]:
    """Returns the entry of a config.json that tells transformers where its classes are."""
    return {auto: ".".join(name.split(".")[-2:]) for auto, name in ENTRIES.items()}


def code_files() -> dict[str, str]:
    """Returns the names and contents of all code files of an exported folder."""
    entries = [name.rpartition(".")[0] for name in ENTRIES.values()]
    needed = {module: _imported(module) for module in _closure(entries)}
    files = {f"{_flat(module)}.py": _rewritten(module) for module in needed}
    for entry in entries:
        # Transformers copies only what an entry names itself, not what that imports in its turn.
        missing = sorted({_flat(name) for name in _closure([entry])} - {_flat(entry)} - _named(needed[entry]))
        lines = [f"from .{name} import __name__ as _  # noqa: F401" for name in missing]
        note = "# Named here so that transformers copies them together with this file."
        files[f"{_flat(entry)}.py"] += "\n".join(["\n" + note, *lines, ""])
    return dict(sorted(files.items()))


def _named(modules: set[str]) -> set[str]:
    return {_flat(module) for module in modules}


def _flat(module: str) -> str:
    return RENAMED.get(module, module.rpartition(".")[2])


def _closure(modules: list[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _imported(module)
    return found


def _path(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def _imported(module: str) -> set[str]:
    tree = ast.parse(_path(module).read_text(encoding="utf-8"))
    froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name for name in froms if name.split(".")[0] in ("data", "train")}


def _rewritten(module: str) -> str:
    text = _path(module).read_text(encoding="utf-8")
    return IMPORT.sub(lambda found: f"{found[1]}.{_flat(found[2])}{found[3]}", text)
