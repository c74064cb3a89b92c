"""What the path of a source may be besides a folder: URLs of shards, several of them by `{000000..000009}`.

A URL is of an object store (`s3://bucket/folder`, `gs://...`: shards are listed), of a web server
(`https://host/x/shard-{000000..000009}.tar`: shards are named), or a command that writes a shard
(`pipe:ssh store cat shards/shard-{000000..000009}.tar`).
"""

from __future__ import annotations

import os
import re
import shlex

INDEX_SUFFIX = ".index.parquet"
"""What the name of a shard's index ends with, in place of `.tar`."""

PIPE = "pipe:"

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FILE = re.compile(r"[^\s/'\"|&;=?]+\.(?:tar|index\.parquet|counts)(?![\w.])")
_TAR = re.compile(r"([^\s/'\"|&;=?]+)\.tar(?![\w.])")


def is_remote(path: str) -> bool:
    """Returns whether a source's path is a URL or a command, not a folder."""
    return path.startswith(PIPE) or _SCHEME.match(path) is not None


def is_web(path: str) -> bool:
    """Returns whether a URL is of a web server, which cannot list what it has."""
    return path.lower().startswith(("http://", "https://"))


def names_shards(path: str) -> bool:
    """Returns whether a path names shards themselves, not a folder of them."""
    return _TAR.search(path) is not None


def problem_of(path: str) -> str:
    """Returns what is wrong with a remote path, or nothing."""
    for first, last in _RANGE.findall(path):
        if int(first) > int(last):
            return f"{{{first}..{last}}} holds no number. Write the smaller number first."
    if not names_shards(path) and (is_web(path) or path.startswith(PIPE)):
        return (
            "does not name its shards, and they cannot be listed there. "
            "Write them as .../shard-{000000..000009}.tar."
        )
    return ""


def shown(url: str) -> str:
    """Returns a URL or command for people to read, without passwords, signatures, tokens and headers.

    The path of a folder stays as it is.
    """
    if not is_remote(url):
        return url
    if url.startswith(PIPE):
        kept = f"{PIPE}{_program(url[len(PIPE) :])} ..."
    else:
        kept, has_query, _ = re.sub(r"(?<=://)[^/?#]*@", "", url).partition("?")
        kept = f"{kept.partition('#')[0]}{'?...' if has_query else ''}"
    name = [found.group() for found in _FILE.finditer(url)][-1:]
    return kept if name and name[0] in kept else " ".join([kept, *name])


def _program(command: str) -> str:
    """Returns what a command runs first; words such as TOKEN=... before it are secrets."""
    try:
        words = [word for word in shlex.split(command) if "=" not in word]
    except ValueError:
        words = []
    program = os.path.basename(words[0]) if words else ""
    return program if re.fullmatch(r"[\w.+-]{1,40}", program) else "command"


def expand(text: str) -> list[str]:
    """Returns the text once for every number of its ranges: `x-{08..10}` is x-08, x-09, x-10."""
    found = _RANGE.search(text)
    if not found:
        return [text]
    first, last = found.groups()
    return [
        whole
        for number in range(int(first), int(last) + 1)
        for whole in expand(f"{text[: found.start()]}{number:0{len(first)}d}{text[found.end() :]}")
    ]


def shard_name(url: str) -> str:
    """Returns the file name of the shard of a URL or command."""
    return f"{_last_tar(url).group(1)}.tar"


def index_url(url: str) -> str:
    """Returns the URL or command that gives the index of a shard, which lies beside it."""
    found = _last_tar(url)
    return f"{url[: found.end(1)]}{INDEX_SUFFIX}{url[found.end() :]}"


def _last_tar(url: str) -> re.Match[str]:
    *_, last = _TAR.finditer(url)
    return last
