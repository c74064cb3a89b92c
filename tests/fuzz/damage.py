"""Seeded damage of bytes, tar headers, media headers and JSON."""

import copy
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

END = 1 << 62


@dataclass
class Damaged:
    """Bytes after damage. `touched` are ranges of the original; from `shifted` on, places moved."""

    data: bytes
    touched: list[tuple[int, int]]
    shifted: int = END
    way: str = ""


def _range(data: bytes, draw: Random, most: int = 4096) -> tuple[int, int]:
    size = min(draw.choice((1, 4, 64, 512, 1024, most)), len(data))
    start = draw.randrange(len(data) - size + 1)
    if draw.random() < 0.3:
        start = start // 512 * 512  # a header or a whole block of a tar
    return start, start + size


def flip(data: bytes, draw: Random) -> Damaged:
    changed, places = bytearray(data), [draw.randrange(len(data)) for _ in range(draw.choice((1, 2, 8, 40)))]
    if draw.random() < 0.4:  # where headers are
        places = [place % min(512, len(data)) for place in places]
    for place in places:
        changed[place] ^= 1 << draw.randrange(8)
    return Damaged(bytes(changed), [(place, place + 1) for place in places])


def zero(data: bytes, draw: Random) -> Damaged:
    start, stop = _range(data, draw)
    return Damaged(data[:start] + bytes(stop - start) + data[stop:], [(start, stop)])


def noise(data: bytes, draw: Random) -> Damaged:
    start, stop = _range(data, draw)
    return Damaged(data[:start] + draw.randbytes(stop - start) + data[stop:], [(start, stop)])


def swap(data: bytes, draw: Random) -> Damaged:
    size = min(draw.choice((1, 64, 512, 1024)), len(data) // 2)
    first = draw.randrange(len(data) - 2 * size + 1)
    second = draw.randrange(first + size, len(data) - size + 1)
    one, other = data[first : first + size], data[second : second + size]
    changed = data[:first] + other + data[first + size : second] + one + data[second + size :]
    return Damaged(changed, [(first, first + size), (second, second + size)])


def cut(data: bytes, draw: Random) -> Damaged:
    place = draw.randrange(len(data))
    return Damaged(data[:place], [(place, END)], place)


def remove(data: bytes, draw: Random) -> Damaged:
    start, stop = _range(data, draw)
    return Damaged(data[:start] + data[stop:], [(start, stop)], start)


def insert(data: bytes, draw: Random) -> Damaged:
    place = _range(data, draw)[0]
    start, stop = _range(data, draw)
    added = data[start:stop] if draw.random() < 0.5 else draw.randbytes(stop - start)
    return Damaged(data[:place] + added + data[place:], [(place - 1, place + 1)], place)


def append(data: bytes, draw: Random) -> Damaged:
    return Damaged(data + draw.randbytes(draw.choice((1, 512, 5000))), [], len(data))


SAME_SIZE = (flip, zero, noise, swap)
ANY_SIZE = (*SAME_SIZE, cut, remove, insert, append)


def damage(data: bytes, draw: Random, ways: tuple[Callable[[bytes, Random], Damaged], ...]) -> Damaged:
    """Returns the data damaged in one of the ways."""
    way = draw.choice(ways)
    damaged = way(data, draw)
    damaged.way = way.__name__
    return damaged


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """Returns a tar header with any size that a header can state."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    entry.size = max(size, 0)
    block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT if 0 <= size < 8**11 else tarfile.GNU_FORMAT)[:512])
    return seal(block, size) if not 0 <= size < 8**11 else bytes(block)


def seal(block: bytearray, size: int | None = None) -> bytes:
    """Returns a header with the size, and with the right checksum."""
    if size is not None and 0 <= size < 8**11:
        block[124:136] = b"%011o\0" % size
    elif size is not None:  # base 256
        block[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SIZES = (0, 1, 511, 4096, 10**6, 8**11 - 1, 2**40, 2**63, -1, -512, -(2**40))
NAMES = (
    b"../../x.jpg",
    b"/etc/passwd.txt",
    b"nothing",
    b"a.b/../c.json",
    b"\xff\xfe.jpg",
    b"x" * 99,
    b".json",
)
TYPES = b"1234567SLKxg\0Z"


def lie(data: bytes, place: int, draw: Random) -> Damaged:
    """Returns a tar whose header at `place` lies about its size, name, kind or checksum."""
    block = bytearray(data[place : place + 512])
    field = draw.choice(("size", "name", "kind", "checksum"))
    stop = place + 512
    if field == "size":
        real = int(bytes(block[124:135]), 8)
        size = draw.choice((*SIZES, real + draw.randrange(1, 4000), max(real - 1, 0)))
        changed, stop = seal(block, size), place + 1024 + abs(size)
    elif field == "name":
        block[:100] = draw.choice(NAMES).ljust(100, b"\0")
        changed = seal(block)
    elif field == "kind":
        block[156] = draw.choice(TYPES)
        changed = seal(block)
    else:
        block[148:156] = b"0000000\0"
        changed = bytes(block)
    return Damaged(data[:place] + changed + data[place + 512 :], [(place, stop)], place, f"lie about {field}")


def intrude(data: bytes, place: int, draw: Random) -> Damaged:
    """Returns a tar with hostile headers put in at `place`."""
    kinds: dict[str, Callable[[], bytes]] = {
        "chain": lambda: header("l", 10, b"L") + b"k.json".ljust(512, b"\0"),
        "long": lambda: header("l", draw.choice(SIZES), b"L"),
        "pax": lambda: header("p", draw.choice(SIZES), b"x"),
        "path": lambda: _pax(b"x", b"path", draw.choice(NAMES)),
        "size": lambda: _pax(b"x", b"size", str(draw.choice(SIZES)).encode()),
        "sparse": lambda: _pax(b"x", b"GNU.sparse.map", b"0,99999999999,1,1"),
        "global": lambda: _pax(b"g", b"path", b"all.json"),
        "links": lambda: header("k.json", 0, b"2") + header("k.jpg", 0, b"1") + header("k.wav", 0, b"3"),
        "members": lambda: b"".join(header(f"many.{n}.jpg", 0) for n in range(3000)),
        "outside": lambda: header("../../../tmp/x.json", 0) + header("/x.jpg", 0),
    }
    way = draw.choice(list(kinds))
    added = kinds[way]()
    if way == "chain":
        added *= 3000
    return Damaged(data[:place] + added + data[place:], [(place - 1, place + 1)], place, f"intrude {way}")


def _pax(kind: bytes, name: bytes, value: bytes) -> bytes:
    text = b" " + name + b"=" + value + b"\n"
    length = len(text) + 2
    length = len(text) + len(str(length))
    text = str(length).encode() + text
    return header("pax", len(text), kind) + text.ljust(512, b"\0")


def medium(data: bytes, other: bytes, draw: Random) -> Damaged:
    """Returns damaged bytes of a picture or clip; `other` is one of another format."""
    if draw.random() < 0.35 and (lied := _lie_in_medium(data, draw)) is not None:
        return lied
    if draw.random() < 0.15:
        foreign = {
            "empty": b"",
            "other": other,
            "both": data + other,
            "twice": data * 2,
            "html": b"<html>" * 50,
        }
        way = draw.choice(list(foreign))
        return Damaged(foreign[way], [(0, END)], 0, way)
    damaged = damage(data, draw, ANY_SIZE)
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        if damaged.data:
            damaged.data = damage(damaged.data, draw, SAME_SIZE).data
    return damaged


NUMBERS = (0, 1, 2, 255, 3000, 20_000, 65_535)


def _lie_in_medium(data: bytes, draw: Random) -> Damaged | None:
    """Returns a medium whose header states other sizes, lengths, rates or channels."""
    changed = bytearray(data)
    if data[:4] == b"\x89PNG":
        struct.pack_into(">II", changed, 16, draw.choice(NUMBERS), draw.choice((*NUMBERS, 2**31 - 1)))
        changed[24:29] = bytes((draw.choice((1, 8, 16)), draw.choice((0, 2, 3, 6)), 0, 0, draw.randrange(2)))
        struct.pack_into(">I", changed, 29, zlib.crc32(bytes(changed[12:29])))
    elif data[:3] == b"GIF":
        struct.pack_into("<HH", changed, 6, draw.choice(NUMBERS), draw.choice(NUMBERS))
    elif data[:2] == b"\xff\xd8" and (place := data.find(b"\xff\xc0")) >= 0:
        struct.pack_into(">HH", changed, place + 5, draw.choice(NUMBERS), draw.choice(NUMBERS))
    elif data[8:12] == b"WEBP":
        struct.pack_into("<I", changed, draw.choice((4, 16, 26)), draw.choice((0, 9, 2**14 - 1, 2**32 - 1)))
    elif data[:4] == b"RIFF":
        place, form = draw.choice(
            ((4, "<I"), (16, "<I"), (20, "<H"), (22, "<H"), (24, "<I"), (34, "<H"), (40, "<I"))
        )
        struct.pack_into(form, changed, place, draw.choice((0, 1, 3, 9, 250, 65_535)))
    elif data[:4] == b"fLaC":  # rate, channels, bits and number of samples in 8 bytes
        changed[18:26] = draw.randbytes(8)
    elif data[4:8] == b"ftyp":
        atoms = [b"mvhd", b"mdhd", b"stsz", b"stts", b"stco", b"stsc", b"moov", b"mdat", b"esds", b"stsd"]
        place = max(data.find(draw.choice(atoms)) + draw.choice((-4, 8, 12, 16)), 0)
        struct.pack_into(">I", changed, place, draw.choice((0, 1, 8, 10**6, 2**31 - 1, 2**32 - 1)))
    elif data[:4] == b"OggS":
        place = data.rfind(b"OggS") + draw.choice((5, 6, 26))
        changed[place : place + 8] = draw.randbytes(8)
    else:
        return None
    return Damaged(bytes(changed), [(0, END)], END if len(changed) == len(data) else 0, "lie in medium")


VALUES = (
    *(None, True, 0, -1, 1e308, float("nan"), 10**400, "", " ", "\0", "\ud800", "<image>", "<audio><image>"),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "https://example.org/a.jpg",
        "data:image/png;base64,AAAA",
        "data:,x",
    ),
    *([], {}, [[]], [None], {"a": 1}, ["0.jpg"] * 3, "x" * 300_000, "é" * 150_000, "MANY", "DEEP", "DIGITS"),
)
"""What any value in a record may become. Words in capitals are written out by `to_json`."""

NUM_PARTS = 100_000


def record(value: Any, draw: Random) -> tuple[bytes, str]:
    """Returns a record with one to three values replaced, removed, renamed or repeated, as JSON."""
    changed = copy.deepcopy(value)
    ways = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        changed, way = _mutate(changed, draw)
        ways.append(way)
    return to_json(changed), ", ".join(ways)


def _mutate(value: Any, draw: Random) -> tuple[Any, str]:
    places = list(_places(value))
    if not places or draw.random() < 0.03:
        return draw.choice(VALUES), "replace all"
    holder, name = draw.choice(places)
    way = draw.choice(("replace", "replace", "replace", "remove", "repeat", "rename"))
    if way == "replace":
        holder[name] = copy.deepcopy(draw.choice(VALUES))
    elif way == "remove":
        del holder[name]
    elif isinstance(holder, list):
        holder.extend([holder[name]] * draw.choice((1, 70, 2000)))
        way = "repeat"
    else:
        holder[draw.choice(("role", "from", "value", "content", "text", "zz"))] = holder.pop(name)
        way = "rename"
    return value, way


def _places(value: Any):
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in list(pairs):
        yield value, name
        yield from _places(inner)


def to_json(value: Any) -> bytes:
    """Returns JSON in one line; some words become what no Python value should be made for."""
    text = json.dumps(value)
    part = '{"type": "text", "text": "a"}'
    for word, meant in (
        ("MANY", lambda: "[" + ", ".join([part] * NUM_PARTS) + "]"),
        ("DEEP", lambda: "[" * 100_000 + "]" * 100_000),
        ("DIGITS", lambda: "9" * 6000),
    ):
        if f'"{word}"' in text:
            text = text.replace(f'"{word}"', meant(), 1)
    return text.encode()
