"""Writes an exported folder: weights, configs, tokenizer, code and model card."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.export.files import write_files
from train.export.model_card import model_card
from train.export.origin import Source
from train.export.request import Format, Request
from train.model.shapes import release_shapes
from train.model.stand_in import HEADS
from train.source import open_weights
from train.tensor_files import INDEX
from train.weights import sync, write_weights


def export(request: Request, *, as_json: bool = False) -> dict[str, Any]:
    """Returns what was written, and prints it. `request.out` appears whole or not at all.

    Raises:
        ValueError: the weights are not those of the model that the source's config describes.
        OSError: the file system refused.
    """
    reader, step = open_weights(request.source.request)
    check_weights(reader, request.source)
    stream = sys.stderr if as_json else sys.stdout
    partial = request.out.with_name(f".{request.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        digest = _write(request, reader, step, partial, stream)
        index = json.loads((partial / INDEX).read_text())
        os.replace(partial, request.out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(request.out.absolute().parent)
    return _announce(request, step, digest, index, as_json)


def check_weights(reader, source: Source) -> None:
    """Raises ValueError where names or shapes are not those of the source's model."""
    expected = release_shapes(source.model, source.media)
    found = {name: tuple(reader.shapes[name]) for name in reader.names() if not name.startswith(HEADS)}
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            have, want = found.get(name, "none"), expected.get(name, "none")
            raise ValueError(
                f"{source.folder}: weight {name} has shape {have}, but the model of its config {want}. "
                "Use a folder whose config and weights belong together."
            )


def _write(request: Request, reader, step: int, folder: Path, stream) -> str:
    source, form = request.source, request.form
    dtype = request.dtype.value
    write_files(source, folder, dtype, with_code=form is Format.transformers)
    digest = write_weights(
        reader,
        folder,
        leave_out=HEADS,
        dtype=getattr(torch, dtype),
        shard_bytes=request.shard_bytes,
        report=_reporter(stream),
    )
    (folder / "README.md").write_text(model_card(source, form.name, dtype, step, digest), encoding="utf-8")
    return digest


def _reporter(stream) -> Callable[[str, int, int], None]:
    def report(file: str, written: int, total: int) -> None:
        print(f"{file}: {written / 1e9:.3f} of {total / 1e9:.3f} GB written", file=stream, flush=True)

    return report


def _announce(request: Request, step: int, digest: str, index, as_json: bool) -> dict[str, Any]:
    found = {
        "out": str(request.out),
        "from": str(request.source.folder),
        "step": step,
        "format": request.form.name,
        "dtype": request.dtype.name,
        "tensors": len(index["weight_map"]),
        "bytes": index["metadata"]["total_size"],
        "shards": len(set(index["weight_map"].values())),
        "weights_digest": digest,
    }
    if as_json:
        print(json.dumps(found))
    else:
        print(
            f"{found['tensors']} tensors in {found['shards']} files, with config and tokenizer: {request.out}"
        )
    return found
