"""One corruption of a copy of a clean source, and what must become of each of its samples."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from data.remote import load_remote
from data.scan import build_index, index_path
from data.shard_cache import ShardCache
from tests.fuzz import damage
from tests.fuzz.damage import END, Damaged
from tests.fuzz.sources import FORMATS, LIMITS, Span, members_of, prepare_records, spans_of, tar_bytes


@dataclass
class Case:
    """A corrupted source. Keys in none of the sets are intact: delivered once, and equal.

    `touched`: delivered somehow, or in the ledger, by key. `exposed`: equal where delivered, else in
    the ledger, or behind a `shard_truncated`. `free`: no law, since the damage made another valid
    sample of it. `may_refuse`: the whole source may be refused. `rows`: how many the index must have.
    `strike` is done while the run goes on. `cache` is where the shards of a remote source go.
    """

    way: str
    source: str
    path: str
    touched: set[str] = field(default_factory=set)
    exposed: set[str] = field(default_factory=set)
    free: set[str] = field(default_factory=set)
    may_refuse: bool = False
    rows: int | None = None
    strike: Callable[[], object] | None = None
    cache: str | None = None


def make_case(kind: str, draw: Random, clean: dict[str, str], folder: Path) -> Case:
    """Returns a case of a kind, having written its corrupted source into `folder`."""
    return KINDS[kind](draw, clean, folder)


def _copied(draw: Random, clean: dict[str, str], folder: Path) -> tuple[Case, int, Path]:
    """Returns a case of a copied source, and the number and path of the shard that is to suffer."""
    source = draw.choice(list(FORMATS))
    path = folder / source
    shutil.copytree(clean[source], path)
    shards = sorted(path.glob("*.tar"))
    number = draw.randrange(len(shards))
    if draw.random() < 0.5:
        shutil.rmtree(path / ".counts", ignore_errors=True)
    return Case("", source, str(path)), number, shards[number]


def _index_again(case: Case, shard: Path) -> None:
    build_index(str(shard), FORMATS[case.source], LIMITS)


def shard_case(draw: Random, clean: dict[str, str], folder: Path) -> Case:
    """Damages a tar before it is indexed, behind the index, or while the run goes on."""
    case, number, shard = _copied(draw, clean, folder)
    spans, data = spans_of(case.path, number), shard.read_bytes()
    when = draw.choice(("before", "before", "before", "behind", "since", "during"))
    if when == "before":
        _damage_before(case, shard, spans, _damaged_tar(data, spans, draw))
        case.may_refuse = len(list(shard.parent.glob("*.tar"))) == 1
    elif when == "behind":
        damaged = damage.damage(data, draw, damage.SAME_SIZE)
        _write_silently(shard, damaged.data)
        _touch_members(case, spans, damaged)
    elif when == "since":
        damaged = damage.damage(data, draw, damage.ANY_SIZE)
        shard.write_bytes(damaged.data)
        os.utime(shard, ns=(1, 1))
        _touch_members(case, spans, damaged)
        case.may_refuse = True
    else:
        damaged = damage.damage(data, draw, (*damage.SAME_SIZE, damage.cut))
        vanishes = draw.random() < 0.3
        case.strike = shard.unlink if vanishes else lambda: _write_in_place(shard, damaged.data)
        case.touched = {span.key for span in spans}
        case.may_refuse = True
        damaged.way = "vanish" if vanishes else damaged.way
    case.way = f"{when}: {damaged.way}" if when != "before" else f"{when}: {case.way}"
    return case


def _damaged_tar(data: bytes, spans: list[Span], draw: Random) -> Damaged:
    way = draw.random()
    if way < 0.5:
        return damage.damage(data, draw, damage.ANY_SIZE)
    places = [offset - 512 for span in spans for _, offset, _ in span.members]
    place = draw.choice(places)
    return damage.lie(data, place, draw) if way < 0.75 else damage.intrude(data, place, draw)


def _damage_before(case: Case, shard: Path, spans: list[Span], damaged: Damaged) -> None:
    shard.write_bytes(damaged.data)
    case.way = damaged.way
    for span in spans:
        if any(start < span.stop and span.start < stop for start, stop in damaged.touched):
            whole = any(start <= span.start and span.stop <= stop for start, stop in damaged.touched)
            made = "lie" in damaged.way or "intrude" in damaged.way
            (case.free if whole or made else case.touched).add(span.key)
    # A bad header hides what is behind it, and a place that moves is one.
    first = min([start for start, _ in damaged.touched], default=END)
    case.exposed = {span.key for span in spans if span.start >= first} - case.touched - case.free
    if damaged.way in ("intrude global", "intrude path", "intrude size", "intrude pax"):
        case.free |= case.exposed
    following = [span.key for span in spans if span.start >= first]
    if "lie" in damaged.way or "intrude" in damaged.way:  # what a header says of the next member
        case.free |= set(following[:2])
    _index_again(case, shard)


def _touch_members(case: Case, spans: list[Span], damaged: Damaged) -> None:
    for span in spans:
        for _, offset, size in span.members:
            if (
                any(start < offset + size and offset < stop for start, stop in damaged.touched)
                or offset + size > damaged.shifted
            ):
                case.touched.add(span.key)


def _write_silently(path: Path, data: bytes) -> None:
    status = path.stat()
    _write_in_place(path, data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _write_in_place(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def media_case(draw: Random, clean: dict[str, str], folder: Path) -> Case:
    """Damages one medium, before its shard is indexed or behind the index."""
    case, number, shard = _copied(draw, clean, folder)
    spans, members = spans_of(case.path, number), members_of(shard)
    media = [place for place, (name, _) in enumerate(members) if not name.endswith((".json", ".txt"))]
    chosen, other = draw.choice(media), draw.choice(media)
    name, data = members[chosen]
    damaged = damage.medium(data, members[other][1], draw)
    behind = len(damaged.data) == len(data) and draw.random() < 0.4
    ending = name.rpartition(".")[2]
    case.way = f"{'behind' if behind else 'before'}: {ending} {damaged.way}"
    case.touched = {name.split(".")[0]}
    if behind:
        whole = shard.read_bytes()
        offset = next(
            offset for span in spans for part, offset, _ in span.members if f"{span.key}.{part}" == name
        )
        _write_silently(shard, whole[:offset] + damaged.data + whole[offset + len(data) :])
    else:
        members[chosen] = name, damaged.data
        shard.write_bytes(tar_bytes(members))
        _index_again(case, shard)
    return case


def record_case(draw: Random, clean: dict[str, str], folder: Path) -> Case:
    """Damages records: lines of a file that is prepared, or JSON members of a shard."""
    return (_member_case if draw.random() < 0.4 else _lines_case)(draw, clean, folder)


def _member_case(draw: Random, clean: dict[str, str], folder: Path) -> Case:
    case, _, shard = _copied(draw, {**clean, "captions": clean["speech"]}, folder)
    if case.source == "captions":
        case.source = "speech"
    members = members_of(shard)
    place = draw.choice([place for place, (name, _) in enumerate(members) if name.endswith(".json")])
    name, data = members[place]
    changed, case.way = _damaged_record(data, draw)
    members[place] = name, changed
    shard.write_bytes(tar_bytes(members))
    case.touched = {name.split(".")[0]}
    case.way = f"member: {case.way}"
    _index_again(case, shard)
    return case


def _damaged_record(data: bytes, draw: Random) -> tuple[bytes, str]:
    if draw.random() < 0.25:
        damaged = damage.damage(data, draw, damage.ANY_SIZE)
        return damaged.data, damaged.way
    return damage.record(json.loads(data), draw)


def _lines_case(draw: Random, clean: dict[str, str], folder: Path) -> Case:
    records = Path(clean["chat"]).parent / "records"
    shutil.copytree(records, folder / "records", copy_function=os.link)
    file = folder / "records/bad.jsonl"
    lines = (records / "chat.jsonl").read_bytes().splitlines()
    case = Case("", "chat", str(folder / "chat"))
    keys = [span.key for shard in (0, 1) for span in spans_of(clean["chat"], shard)]
    for place in draw.sample(range(len(lines)), draw.choice((1, 1, 3))):
        lines[place], way = _damaged_record(lines[place], draw)
        case.way = f"lines: {way}"
        case.free.add(keys[place])
    file.write_bytes(b"\n".join(lines) + b"\n")
    with file.open("rb") as written:
        case.rows = sum(bool(line.strip()) for line in written)
    if status := prepare_records(file, Path(case.path), "llava"):
        raise AssertionError(f"data.prepare ended with {status}")
    return case


def index_case(draw: Random, clean: dict[str, str], folder: Path) -> Case:
    """Damages a side index, its footer or its values, or the token counts beside it."""
    case, number, shard = _copied(draw, clean, folder)
    way = draw.choice((_damage_bytes, _damage_bytes, _damage_footer, _damage_values, _damage_counts))
    case.way = f"{way.__name__.removeprefix('_damage_')}: "
    case.may_refuse = way is not _damage_counts
    way(case, number, shard, clean, draw)
    return case


def _damage_bytes(case: Case, number: int, shard: Path, clean: dict[str, str], draw: Random) -> None:
    path = Path(index_path(str(shard)))
    damaged = damage.damage(path.read_bytes(), draw, damage.ANY_SIZE)
    case.exposed = {span.key for span in spans_of(case.path, number)}
    path.write_bytes(damaged.data)
    case.way += damaged.way


def _damage_footer(case: Case, number: int, shard: Path, clean: dict[str, str], draw: Random) -> None:
    path = index_path(str(shard))
    table = pq.read_table(path)
    footer = json.loads((table.schema.metadata or {})[b"shard"])
    text, case.way = damage.record(footer, draw)
    case.way = f"footer: {case.way}"
    case.exposed = {span.key for span in spans_of(case.path, number)}
    pq.write_table(table.replace_schema_metadata({"shard": text}), path)


NUMBERS = (0, -1, 1, 7, 513, 10**6, 2**31 - 1, 2**40, 2**62, -(2**62))
TEXTS = ("", "a", "../x", "/etc/passwd", "0.jpg", "json", "\0", "x" * 10**6)


def _damage_values(case: Case, number: int, shard: Path, clean: dict[str, str], draw: Random) -> None:
    path = index_path(str(shard))
    table = pq.read_table(path)
    rows, chosen = table.to_pylist(), draw.randrange(table.num_rows)
    case.free = {rows[chosen]["key"]}
    case.way += _lie_in_row(rows[chosen], rows, draw)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def _lie_in_row(row: dict, rows: list[dict], draw: Random) -> str:
    column = draw.choice(
        ("members", "members", "images", "audios", "key", "tags", "cause", "remove", "other")
    )
    if column in ("members", "images", "audios") and row[column]:
        item = draw.choice(row[column])
        name = draw.choice(list(item))
        item[name] = draw.choice((*TEXTS, None)) if name == "name" else _number(name, draw)
        return f"{column} {name}"
    if column == "other":
        row["members"] = draw.choice(rows)["members"]
    elif column == "remove":
        row[draw.choice(("members", "images", "audios", "tags"))] = draw.choice(([], None))
    elif column in ("key", "cause"):
        row[column] = draw.choice((*TEXTS, None))
    else:
        row["tags"] = draw.choice((["x"] * 5, [None], [], None))
    return column


def _number(name: str, draw: Random) -> int | None:
    numbers = [number for number in NUMBERS if name not in ("width", "height") or abs(number) < 2**31]
    return draw.choice((*numbers, None))


def _damage_counts(case: Case, number: int, shard: Path, clean: dict[str, str], draw: Random) -> None:
    if not (Path(case.path) / ".counts").exists():
        shutil.copytree(Path(clean[case.source]) / ".counts", Path(case.path) / ".counts")
    (path,) = (Path(case.path) / ".counts").rglob(f"{shard.name}.counts")
    damaged = damage.damage(path.read_bytes(), draw, damage.ANY_SIZE)
    path.write_bytes(damaged.data)
    case.way += damaged.way


def remote_case(draw: Random, clean: dict[str, str], folder: Path) -> Case:
    """Damages a shard in its store, or what lies of it in the cache: all of it, or the beginning."""
    case, number, shard = _copied(draw, clean, folder)
    spans, data = spans_of(case.path, number), shard.read_bytes()
    last = len(list(shard.parent.glob("*.tar"))) - 1
    case.path, case.cache = f"pipe:cat {case.path}/shard-{{000000..{last:06d}}}.tar", str(folder / "cache")
    cache = ShardCache(case.cache, 2**30)
    kept = load_remote(case.path, cache).shards[number].cached
    where = draw.choice(("store", "copy", "copy", "beginning"))
    if where == "store":
        # Of the same size: a store that sends less or more is asked again for minutes.
        damaged = damage.damage(data, draw, damage.SAME_SIZE)
        shard.write_bytes(damaged.data)
        _touch_members(case, spans, damaged)
        case.may_refuse = True
    elif where == "copy":
        os.close(cache.open(kept))
        damaged = damage.damage(data, draw, damage.ANY_SIZE)
        _write_silently(Path(kept.path), damaged.data)
        if len(damaged.data) == len(data):  # else it is no copy, and fetched anew
            _touch_members(case, spans, damaged)
    else:
        damaged = damage.damage(data, draw, damage.ANY_SIZE)
        Path(kept.partial).write_bytes(damaged.data[: draw.randrange(len(data))])
    case.way = f"{where}: {damaged.way}"
    return case


KINDS: dict[str, Callable[[Random, dict[str, str], Path], Case]] = {
    "shard": shard_case,
    "index": index_case,
    "media": media_case,
    "record": record_case,
    "remote": remote_case,
}
