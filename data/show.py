"""Prints a sample as the model will see it, its loss mask included.

    python -m data.show recipe=omni_sft model=tiny data.path=DIR key=000012

Supervised text is coloured on a terminal and stands in [[ ]] elsewhere. Without key= it lists keys.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.chat_template import adopt_template
from data.config import DataConfig
from data.encode import Encoder, Layout
from data.geometry import MediaConfig
from data.index import FolderIndex
from data.remote import load_source
from data.sample import IGNORE, MediaSize, Sample, SampleError
from data.shards import ShardReader
from data.template import MediaSpan
from data.tokenizer import choose_folder, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LISTED_KEYS = 5
GREEN, PLAIN = "\033[32m", "\033[0m"


def load_configs(overrides: list[str]) -> tuple[DataConfig, MediaConfig]:
    """Returns the nodes `data` and `media` that `train.py` would run with under `overrides`.

    Raises:
        ValueError: train.py refuses the overrides, or a path is not set.
    """
    command = [sys.executable, "train.py", *overrides, "--cfg", "job", "--resolve"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(result.stderr.strip())
    composed = OmegaConf.create(result.stdout)
    missing = sorted(key for key in OmegaConf.missing_keys(composed) if key.startswith("data."))
    if missing:
        raise ValueError(f"{missing[0]}: it is not set. Set it, as in {missing[0]}=...")
    data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), composed.data))
    media = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MediaConfig), composed.media))
    assert isinstance(data, DataConfig) and isinstance(media, MediaConfig)
    begins = composed.model
    data.tokenizer = choose_folder(data.tokenizer, composed.init_from, begins.weights, begins.parts.llm)
    return data, media


def load_sources(config: DataConfig) -> dict[str, FolderIndex]:
    """Returns the index of every source, those for training first."""
    sources = config.sources | config.held_out
    return {name: load_source(source.path, config) for name, source in sources.items()}


def first_keys(folders: dict[str, FolderIndex]) -> dict[str, list[str]]:
    """Returns the first keys of every source."""
    found: dict[str, list[str]] = {}
    for source, folder in folders.items():
        found[source] = []
        for shard in folder.shards:
            found[source] += shard.keys[: LISTED_KEYS - len(found[source])]
            if len(found[source]) == LISTED_KEYS:
                break
    return found


def find_sample(folders: dict[str, FolderIndex], wanted: str) -> tuple[str, Sample, dict[str, MediaSize]]:
    """Returns the source, the sample and its media sizes. `wanted` is a key or `source/shard/key`.

    Raises:
        ValueError: no source has it.
    """
    for source, folder in folders.items():
        for number, shard in enumerate(folder.shards):
            place = f"{source}/{shard.name}/"
            key = wanted.removeprefix(place)
            if key in shard.keys:
                row = shard.keys.index(key)
                return source, ShardReader(folder, source).read(number, row, media=False), shard.sizes(row)
    raise ValueError(f"key={wanted}: no source has it. Leave key= out to see the first keys of every source.")


def pieces(layout: Layout, encoder: Encoder, sizes: dict[str, MediaSize]) -> Iterator[tuple[str, bool]]:
    """Yields the sample piece by piece: text, and whether it is supervised; media are one line each."""
    rendered, place = layout.rendered, 0
    for span in rendered.spans:
        yield from _text_pieces(layout, encoder, place, span.start)
        yield describe(span, layout, sizes[span.media], encoder.media.image.queries), False
        place = span.stop
    yield from _text_pieces(layout, encoder, place, len(rendered.input_ids))


def _text_pieces(layout: Layout, encoder: Encoder, start: int, stop: int) -> Iterator[tuple[str, bool]]:
    ids, labels = layout.rendered.input_ids, layout.rendered.labels
    for supervised, run in groupby(range(start, stop), key=lambda place: bool(labels[place] != IGNORE)):
        yield encoder.tokenizer.decode([int(ids[place]) for place in run]), supervised


def describe(span: MediaSpan, layout: Layout, size: MediaSize, queries: int) -> str:
    """Returns a media span as one line, such as `<image 640x480: 3 slices, 192 tokens>`."""
    if span.kind == "image":
        noun, what, tokens = "slice", f"{size.width}x{size.height}", span.items * queries
    else:
        noun, what = "clip", f"{size.num_samples / 16000:.2f} s"
        tokens = sum(clip.span for clip in layout.clips[span.media])
    return f"<{span.kind} {what}: {span.items} {noun}{'s' * (span.items != 1)}, {tokens} tokens>"


def describe_spans(layout: Layout) -> list[dict[str, Any]]:
    """Returns a row per media span: where it stands and how it is cut."""
    rows = []
    for span in layout.rendered.spans:
        if span.kind == "image":
            slicing = layout.slicings[span.media]
            cut = ", ".join(f"{rows}x{columns}" for rows, columns in slicing.patch_grids) + " patches"
        else:
            cut = ", ".join(f"{clip.frames}" for clip in layout.clips[span.media]) + " frames"
        rows.append({**asdict(span), "cut": cut})
    return rows


def show(source: str, sample: Sample, sizes: dict[str, MediaSize], encoder: Encoder) -> dict[str, Any]:
    """Returns what there is to see of a sample: its pieces, media spans and counts."""
    layout = encoder.lay_out(sample, sizes)
    return {
        "key": sample.key,
        "source": source,
        "tags": list(sample.tags),
        "origin": sample.origin,
        "pieces": [
            {"text": text, "supervised": supervised} for text, supervised in pieces(layout, encoder, sizes)
        ],
        "spans": describe_spans(layout),
        "counts": asdict(layout.counts),
    }


def format_text(shown: dict[str, Any], colour: bool) -> str:
    """Returns the sample's text with its supervised parts in green, or in [[ ]] without `colour`."""
    before, after = (GREEN, PLAIN) if colour else ("[[", "]]")
    marked = (
        f"{before}{piece['text']}{after}" if piece["supervised"] else piece["text"]
        for piece in shown["pieces"]
    )
    return "".join(marked)


def print_shown(shown: dict[str, Any], colour: bool) -> None:
    """Prints what `show` returned, for people."""
    print(f"{shown['source']}/{shown['key']}  tags: {', '.join(shown['tags']) or '-'}\n")
    print(format_text(shown, colour))
    print(f"\n{'media':24} {'tokens':>15} {'items':>5}  cut into")
    for span in shown["spans"]:
        place = f"[{span['start']}, {span['stop']})"
        print(f"{span['media']:24} {place:>15} {span['items']:>5}  {span['cut']}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in shown["counts"].items()))


def main(words: list[str] | None = None) -> None:
    """Prints a sample, or the first keys of every source."""
    parser = argparse.ArgumentParser(
        description="Prints a sample as the model will see it, its loss mask included.",
        epilog="Example: python -m data.show recipe=omni_sft model=tiny data.path=DIR key=000012",
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py, and key=KEY or key=SOURCE/SHARD/KEY")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    keys = [word[len("key=") :] for word in arguments.overrides if word.startswith("key=")]
    try:
        data, media = load_configs([word for word in arguments.overrides if not word.startswith("key=")])
        folders = load_sources(data)
        if not keys:
            list_keys(folders, arguments.json)
            return
        encoder = build_encoder(data, media)
        for key in keys:
            shown = show(*find_sample(folders, key), encoder)
            if arguments.json:
                print(json.dumps(shown, ensure_ascii=False))
            else:
                print_shown(shown, sys.stdout.isatty())
    except SampleError as error:
        parser.exit(1, f"{', '.join(keys)}: {error} (cause: {error.cause})\n")
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def build_encoder(data: DataConfig, media: MediaConfig) -> Encoder:
    """Returns the encoder that `train.py` would use."""
    tokenizer = load_tokenizer(data.tokenizer)
    folder = Path(data.tokenizer) if data.tokenizer else None
    data.template = adopt_template(data.template, folder, tokenizer)
    return Encoder(data, media, tokenizer)


def list_keys(folders: dict[str, FolderIndex], as_json: bool) -> None:
    """Prints the first keys of every source."""
    found = first_keys(folders)
    if as_json:
        print(json.dumps(found))
        return
    for source, keys in found.items():
        print(f"{source}: {', '.join(keys)}, ...")
    print("Show one with key=KEY.")


if __name__ == "__main__":
    main()
