"""The model card of an exported folder: what made these weights, and how to load them. Imports no torch."""

from __future__ import annotations

import json
from typing import Any

from data.tokenizer import load_tokenizer
from train.config import RunConfig
from train.export.origin import Source

LOADING = {
    "transformers": """\
```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).eval()
messages = [{"role": "user", "content": {"text": "What is in the picture?", "image": "cat.jpg"}}]
print(model.chat(messages, sampling=False, max_new_tokens=100))

processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
tokens = model.generate(**processor(messages), max_new_tokens=100)
```

`image` and `audio` are a path or a list of paths. It needs torch, transformers (4.49 or newer, 5 too),
safetensors and Pillow; recordings need av as well.
""",
    "megrez": """\
The folder has the layout of the Megrez-3B-Omni release: its tensor names, sharded safetensors with an
index, and its config.json. Code that reads the release reads it. `python -m train.export weights=FOLDER
out=OTHER format=transformers` turns it into a folder that transformers loads.
""",
}


def model_card(source: Source, form: str, dtype: str, step: int, digest: str) -> str:
    """Returns the text of README.md.

    Args:
        form: a key of `LOADING`.
        step: of the run; 0 for a released folder.
        digest: of the weights as written.
    """
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: any-to-any\n---",
        f"# {source.model.name}\n\nA text + image + audio language model of the Megrez-Omni type.",
        "## Loading\n\n" + LOADING[form].rstrip(),
        "## Origin\n\n" + _table(_origin(source, dtype, step, digest)),
    ]
    if digests := source.stage.get("data_index_digests"):
        sections.append("## Data\n\n" + _table(digests))
    if source.config is not None:
        sources = {name: item.path for name, item in source.config.data.sources.items()}
        sections.append("## Sources\n\n" + _table(sources))
    measured = {**source.stage.get("metrics", {}), **source.stage.get("evaluation", {})}
    if measured:
        sections.append(f"## Metrics\n\n```json\n{json.dumps(measured, indent=1, ensure_ascii=False)}\n```")
    return "\n\n".join(sections) + "\n"


def _origin(source: Source, dtype: str, step: int, digest: str) -> dict[str, Any]:
    stage, config = source.stage, source.config
    rows: dict[str, Any] = {"made from": source.folder}
    if config is not None:
        rows |= {
            "recipe": config.stage,
            "steps": step or None,  # a released folder does not say
            "complete": "yes" if stage else "no: the newest checkpoint",
            "tuned": ", ".join(name for name, on in config.tuned.items() if on),
            "frozen": ", ".join(name for name, on in config.tuned.items() if not on),
            "merged adapters": _adapters(config),
            "parent": _parent(source),
            "config digest": stage.get("config_digest"),
            "data digest": stage.get("data_digest"),
            "digest of the run's weights": stage.get("weights_digest"),
        }
    rows |= {
        "released folder": source.release,
        "tokenizer digest": load_tokenizer(str(source.tokenizer)).fingerprint,
        "stored in": dtype,
        "digest of these weights": digest,
    }
    return {name: value for name, value in rows.items() if value not in (None, "")}


def _adapters(config: RunConfig) -> str | None:
    lora = config.lora
    return f"of {', '.join(lora.adapted)}, rank {lora.rank}, alpha {lora.alpha:g}" if lora.rank else None


def _parent(source: Source) -> str | None:
    parent = source.stage.get("parent")
    if parent:
        parts = [f"{part} of {folder}" for part, folder in parent.get("parts", {}).items()]
        name = parent.get("run") or parent.get("weights") or ", ".join(parts)
        stage = f"{parent['stage']}, " if "stage" in parent else ""
        return f"{name} ({stage}weights {parent['weights_digest']})"
    return source.config.init_from if source.config else None


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)
