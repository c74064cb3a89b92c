"""Small real data for tests: records with pictures and clips, prepared into shards."""

import io
import json
import os
import random
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from data.config import DataConfig, PackConfig, SourceConfig
from data.counts import Tables, build_tables
from data.encode import Encoder
from data.geometry import AudioGeometry, ImageGeometry, MediaConfig
from data.loader import Loader
from data.plan import Planner
from data.prepare import main as prepare
from data.tokenizer import load_tokenizer

MEDIA = MediaConfig(
    image=ImageGeometry(slice_pixels=56, max_slices=4, queries=4, table_side=16),
    audio=AudioGeometry(mel_bins=8, window_seconds=1),
)
TOKENIZER = load_tokenizer(None)
WORDS = ("a", "red", "bird", "sings", "over", "the", "quiet", "lake", "while", "boats", "drift", "past")


def image_bytes(width, height, kind="JPEG"):
    """Returns an encoded picture of smooth colours, different for every size."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 3 + y, y * 5 + width, x * y + height], axis=-1) % 256
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def wav_bytes(num_samples):
    """Returns a clip at 16 kHz."""
    tone = (8000 * np.sin(np.arange(num_samples) * 0.05)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16000, num_samples, "NONE", ""))
        writer.writeframes(tone.tobytes())
    return file.getvalue()


def write_media(folder, name, data):
    """Writes a media file below `folder` and returns its name."""
    (Path(folder) / name).write_bytes(data)
    return name


def record(number, question="What is this?", answer="A test.", image=None, audio=None):
    """Returns a LLaVA record; `number` makes it differ from all others."""
    marks = "<image>\n" * bool(image) + "<audio>\n" * bool(audio)
    turns = [
        {"from": "human", "value": f"{marks}{question} ({number})"},
        {"from": "gpt", "value": answer},
    ]
    return {
        "conversations": turns,
        **({"image": image} if image else {}),
        **({"audio": audio} if audio else {}),
    }


def mixed_records(folder, count, seed=0):
    """Returns `count` records in turn of text, picture, clip, and both, having written their media."""
    draw = random.Random(seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    images = [
        write_media(folder, f"{w}x{h}.{kind.lower()}", image_bytes(w, h, kind))
        for kind in ("JPEG", "PNG")
        for w, h in ((20, 30), (56, 56), (60, 90), (120, 50), (160, 160), (33, 200), (90, 41), (150, 70))
    ]
    clips = [write_media(folder, f"{n}.wav", wav_bytes(n)) for n in range(1600, 30000, 2100)]
    records = []
    for number in range(count):
        image = draw.choice(images) if number % 4 in (1, 3) else None
        audio = draw.choice(clips) if number % 4 in (2, 3) else None
        answer = " ".join(draw.choices(WORDS, k=draw.randint(2, 40)))
        records.append(record(number, answer=answer, image=image, audio=audio))
    return records


def prepare_folder(media_folder, records, out, *, tags="", samples_per_shard=400):
    """Writes the records as indexed shards into the folder `out` and returns its path."""
    path = Path(media_folder) / f"{Path(out).name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in records))
    command = [str(path), "--format", "llava", "--out", str(out), "--workers", "1", "--tags", tags]
    assert prepare([*command, "--samples-per-shard", str(samples_per_shard)]) == 0
    return str(out)


def overwrite_silently(path, offset, data):
    """Writes into a file and sets its time back: damage that neither its size nor its time tells."""
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def data_config(*paths, length=512, **options):
    """Returns a config whose sources are the folders at `paths`, named by their last part."""
    sources = {Path(path).name: SourceConfig(path=path) for path in paths}
    pack = options.pop("pack", None) or PackConfig(length=length)
    return DataConfig(**{"sources": sources, "pack": pack, "workers": 0, **options})


def tables_of(config, split="train", takes=lambda modality: True) -> Tables:
    """Returns the tables of a config, with tokens as cost."""
    encoder = Encoder(config, MEDIA, TOKENIZER)
    return build_tables(
        config,
        MEDIA,
        encoder,
        split=split,
        cost=lambda length, patches, frames: length + patches + frames,
        takes=takes,
    )


def planner_of(config, tables, packs_per_step=4, epochs=1.0, state=None):
    """Returns a planner over `tables`, restored if `state` is given."""
    planner = Planner(
        tables.tables,
        config.pack,
        packs_per_step,
        seed=1,
        shuffle_shards=config.shuffle_shards,
        epochs=epochs,
        fingerprint=tables.fingerprint,
    )
    if state is not None:
        planner.restore(state)
    return planner


def loader_of(config, tables, planner, *, rank=0, world_size=1, micro_batch_packs=1, encoder=None):
    """Returns a loader of one rank."""
    return Loader(
        planner,
        tables.folders,
        encoder or Encoder(config, MEDIA, TOKENIZER),
        config=config,
        media=MEDIA,
        pad_id=TOKENIZER.special("<|pad|>"),
        micro_batch_packs=micro_batch_packs,
        loss="token",
        rank=rank,
        world_size=world_size,
    )
