"""All files of an exported folder beside its weights: configs, tokenizer, code. Imports no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from data.tokenizer import SPECIAL_TOKENS, TextTokenizer, load_tokenizer
from train.export.hub_code import auto_map, code_files
from train.export.origin import TOKENIZER, Source, settled_template
from train.release import ARCHITECTURE, CONFIG, OWN, read_json, release_config, sizes_of, template_of

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.index.json")
SOURCE_CARD = "README.release.md"
"""Where the release's own model card goes, as README.md is that of the export."""

TEMPLATE_FILE = Path(__file__).resolve().parents[1] / "hub" / "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_files(source: Source, folder: Path, dtype: str, *, with_code: bool) -> None:
    """Writes everything but weights and model card.

    What a release brought goes along unchanged, except where the code of the export takes its place
    or the run had other settings.

    Args:
        dtype: torch's name of what the weights are stored in.
        with_code: writes the code that makes the folder load in transformers.
    """
    if source.release is not None:
        _copy_release(source.release, folder, with_code)
    tokenizer = load_tokenizer(str(source.tokenizer))
    _write_tokenizer(source, folder, tokenizer)
    _write_config(source, folder, tokenizer, dtype, with_code)
    _write_missing(folder / "generation_config.json", _generation(tokenizer))
    _write_missing(folder / "preprocessor_config.json", _preprocessor(source))
    if with_code:
        processor = {"processor_class": "MegrezOProcessor", "auto_map": _only("AutoProcessor")}
        write_json(folder / "processor_config.json", processor)
        for name, text in code_files().items():
            (folder / name).write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_missing(path: Path, content: dict[str, Any]) -> None:
    if not path.is_file():
        write_json(path, content)


def _only(name: str) -> dict[str, str]:
    return {name: auto_map()[name]}


def _copy_release(release: Path, folder: Path, with_code: bool) -> None:
    code = ("*.py",) if with_code else ()
    ignored = shutil.ignore_patterns(".*", "__pycache__", *WEIGHT_FILES, *code)
    shutil.copytree(release, folder, ignore=ignored, dirs_exist_ok=True)
    if (folder / "README.md").is_file():
        (folder / "README.md").replace(folder / SOURCE_CARD)
    if with_code:
        for path in folder.glob("*.json"):
            _drop_foreign_code(path)


def _drop_foreign_code(path: Path) -> None:
    """Takes the names of the release's own code out of a config."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.pop("auto_map", None):
        content.pop("processor_class", None)
        if "tokenizer_class" in content:
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(path, content)


def _write_tokenizer(source: Source, folder: Path, tokenizer: TextTokenizer) -> None:
    if source.tokenizer != source.release:
        for name in (TOKENIZER, *TOKENIZER_FILES):
            (folder / name).unlink(missing_ok=True)  # a release's, of another tokenizer
            if (source.tokenizer / name).is_file():
                shutil.copyfile(source.tokenizer / name, folder / name)
    _write_missing(folder / "tokenizer_config.json", _tokenizer_config(source, tokenizer))


def _tokenizer_config(source: Source, tokenizer: TextTokenizer) -> dict[str, Any]:
    template = TEMPLATE_FILE.read_text(encoding="utf-8").replace("SYSTEM", json.dumps(source.template.system))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|turn_end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if _has(tokenizer, name)],
        "model_max_length": source.model.llm.max_positions,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }


def _has(tokenizer: TextTokenizer, name: str) -> bool:
    try:
        return tokenizer.special(name) >= 0
    except ValueError:
        return False


def _write_config(
    source: Source, folder: Path, tokenizer: TextTokenizer, dtype: str, with_code: bool
) -> None:
    ours = release_config(
        source.model,
        source.media,
        source.template,
        eos_token_id=tokenizer.special("<|turn_end|>"),
        pad_token_id=tokenizer.special("<|pad|>"),
        dtype=dtype,
    )
    path = folder / CONFIG
    if source.release is None:
        content = ours
    else:
        content = _merged(source.release, ours)
        if content is None and not with_code:
            return  # the copy says all
        content = content or read_json(source.release)
    if with_code:
        content[OWN] = ours[OWN]  # the code does not read the template of a tokenizer
        content |= {"architectures": [ARCHITECTURE], "auto_map": auto_map(), "torch_dtype": dtype}
        content.pop("dtype", None)
    write_json(path, content)


def _merged(release: Path, ours: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a release's config with the settings of a run in it, or None where they are the same."""
    theirs = read_json(release)
    template = settled_template(template_of(theirs), release)
    was = release_config(*sizes_of(theirs), template, eos_token_id=None, pad_token_id=None, dtype="")
    changed = {key: ours[key] for key in was if ours[key] != was[key]}
    for key in ("eos_token_id", "pad_token_id", "torch_dtype"):
        changed.pop(key, None)
    if OWN in changed and changed[OWN] | {"name": was[OWN]["name"]} == was[OWN]:
        del changed[OWN]  # another name alone is no other model
    for key in ("vision_config", "audio_config"):
        if key in changed:
            changed[key] = theirs[key] | changed[key]
    return theirs | changed if changed else None


def _generation(tokenizer: TextTokenizer) -> dict[str, Any]:
    return {
        "do_sample": False,
        "eos_token_id": [tokenizer.special("<|turn_end|>"), tokenizer.special("<|eos|>")],
        "pad_token_id": tokenizer.special("<|pad|>"),
    }


def _preprocessor(source: Source) -> dict[str, Any]:
    """Returns what the media become, for readers; the code of the export has it from config.json."""
    image, audio = source.media.image, source.media.audio
    return {
        "max_slice_nums": image.max_slices,
        "scale_resolution": image.slice_pixels,
        "patch_size": image.patch_pixels,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "feature_size": audio.mel_bins,
        "sampling_rate": audio.sample_rate_hz,
        "chunk_length": audio.window_seconds,
        "hop_length": 160,
        "n_fft": 400,
    }
