"""One attempt to read a URL: over the web, from an object store through fsspec, or from a command.

Whatever the machine or the network fails at is an OSError; `Absent` means that asking again is useless.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.client import InvalidURL
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from data.urls import PIPE, is_web, shown

PIECE_BYTES = 8 * 2**20

FIRST_PIECE_BYTES = 2**20
"""What is asked for first of an object store, where a piece must come whole in time; fast ones give more."""

_WORTH_WAITING = (408, 425, 429)
"""Answers of a web server that blame the client and still are for now only."""

_BEHIND_THE_END = 416

_NO_ACCESS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError")
"""What the libraries of object stores raise where nobody has logged in."""


class Absent(ValueError):
    """There is no such file, or none for us."""


class WrongLength(OSError):
    """The file seems to be shorter or longer than it should be."""


def read_pieces(url: str, start: int, stop: int | None, stall_seconds: float) -> Iterator[bytes]:
    """Yields the bytes of a URL from `start` to `stop` (None: to its end) in order.

    A server that sends more is not stopped here.

    Raises:
        Absent: it does not exist or may not be read.
        WrongLength: it ends before `start`.
        OSError: it broke off, or nothing came for `stall_seconds`.
    """
    if url.startswith(PIPE):
        yield from _skip(_from_command(url[len(PIPE) :], stall_seconds), start)
    elif is_web(url):
        yield from _from_web(url, start, stall_seconds)
    else:
        yield from _from_store(url, start, stop, stall_seconds)


def describe_version(url: str, stall_seconds: float) -> str:
    """Returns what tells one version of a file from another, without reading it; "" if nothing does.

    Raises:
        Absent: it does not exist or may not be read.
        OSError: nobody answered.
    """
    if url.startswith(PIPE):
        return ""
    if not is_web(url):
        with _store_errors(url):
            store, path = open_store(url)
            return version_of(_ask_store(store, stall_seconds, store.info, path))
    with _web_errors(url), urlopen(Request(url, method="HEAD"), timeout=stall_seconds) as answer:
        stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        return f"{answer.headers.get('Content-Length')} {stamp}" if stamp else ""


def find_length(url: str, stall_seconds: float) -> int | None:
    """Returns how many bytes a file has; None where nobody tells.

    Raises:
        OSError: nobody answered.
    """
    if url.startswith(PIPE):
        return None
    with contextlib.suppress(Absent):  # who may read a file may not always ask about it
        if not is_web(url):
            with _store_errors(url):
                store, path = open_store(url)
                store.invalidate_cache()
                return int(_ask_store(store, stall_seconds, store.info, path)["size"])
        with _web_errors(url), urlopen(Request(url, method="HEAD"), timeout=stall_seconds) as answer:
            return int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
    return None


def list_store(url: str, stall_seconds: float) -> dict[str, str]:
    """Returns the versions of all files of a folder of an object store, by name.

    Raises:
        Absent: there is no such folder, or none for us.
        OSError: nobody answered.
    """
    with _store_errors(url):
        store, path = open_store(url)
        store.invalidate_cache()
        found = _ask_store(store, stall_seconds, store.ls, path, detail=True)
        return {entry["name"].rpartition("/")[2]: version_of(entry) for entry in found}


def open_store(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL and the path in it.

    Raises:
        Absent: what speaks its protocol is not installed, or the protocol is not known.
    """
    from fsspec.core import url_to_fs  # only where there is a remote source

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise Absent(f"{error}. Install what remote shards need: pip install -e '.[remote]'.") from error
    except ValueError as error:
        raise Absent(f"{error}. Use s3://, gs://, https://, or pipe: and a command.") from error


def version_of(entry: dict[str, Any]) -> str:
    """Returns size and tag or time of a listed file."""
    stamp = next((entry[name] for name in ("ETag", "etag", "LastModified", "mtime") if entry.get(name)), "")
    return f"{entry.get('size')} {stamp}" if stamp else ""


def _from_web(url: str, start: int, stall_seconds: float) -> Iterator[bytes]:
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with _web_errors(url), urlopen(request, timeout=stall_seconds) as answer:
        begins = start if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        missing = int(length) if length else 0

        def pieces() -> Iterator[bytes]:
            nonlocal missing
            while piece := answer.read1(PIECE_BYTES):
                missing -= len(piece)
                yield piece

        yield from _skip(pieces(), start - begins)
        if missing > 0:
            raise OSError(f"the connection ended {missing} bytes early")


@contextlib.contextmanager
def _web_errors(url: str) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        problem = f"the server says {error.code} {error.reason}"
        if error.code == _BEHIND_THE_END:
            raise WrongLength(problem) from error
        if 400 <= error.code < 500 and error.code not in _WORTH_WAITING:
            raise Absent(f"{shown(url)}: {problem}. Check the URL.") from error
        raise OSError(problem) from error
    except (InvalidURL, ValueError) as error:  # the text may hold all of the URL
        raise Absent(f"{shown(url)}: is no valid URL ({type(error).__name__}). Check it.") from error


def _from_store(url: str, start: int, stop: int | None, stall_seconds: float) -> Iterator[bytes]:
    with _store_errors(url):
        store, path = open_store(url)
        size = FIRST_PIECE_BYTES
        if stop is None:
            stop = int(_ask_store(store, stall_seconds, store.info, path)["size"])
        while start < stop:
            began = time.monotonic()
            end = min(start + size, stop)
            piece = _ask_store(store, stall_seconds, store.cat_file, path, start=start, end=end)
            if not piece:
                return
            if time.monotonic() - began < stall_seconds / 8:
                size = min(2 * size, PIECE_BYTES)
            yield piece
            start += len(piece)


def _ask_store(store: Any, stall_seconds: float, question: Callable[..., Any], *args, **options) -> Any:
    """Returns the answer of a store, if it comes in time. Those that know no timeout are left waiting."""
    if store.async_impl:
        return question(*args, **options, timeout=stall_seconds)
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(question(*args, **options))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(stall_seconds)


@contextlib.contextmanager
def _store_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise Absent(f"{shown(url)}: {_words(error, url)}. Check the URL and who may read it.") from error
    except Absent:
        raise
    except Exception as error:  # every store has errors of its own
        if type(error).__name__ in _NO_ACCESS:
            raise Absent(f"{shown(url)}: {_words(error, url)}. Give this machine access to it.") from error
        # The stores' libraries say it with these words or, s3fs, with EINVAL.
        is_behind = getattr(error, "errno", None) == errno.EINVAL or "not satisfiable" in str(error)
        raise (WrongLength if is_behind else OSError)(_words(error, url)) from error


def _words(error: Exception, url: str) -> str:
    return f"{type(error).__name__}: {error}".replace(url, shown(url)).rstrip(": ")


def _from_command(command: str, stall_seconds: float) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        )
        assert process.stdout is not None
        try:
            number = process.stdout.fileno()
            while _is_ready(number, stall_seconds) and (piece := os.read(number, PIECE_BYTES)):
                yield piece
            code = process.wait(stall_seconds)
        except subprocess.TimeoutExpired as error:
            raise OSError("the command does not end") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if code:
            said.seek(0)
            last = said.read()[-200:].decode(errors="replace").strip()
            raise OSError(f"the command ended with status {code}{f' ({last})' if last else ''}")


def _is_ready(number: int, stall_seconds: float) -> bool:
    waiting = select.poll()  # select() takes no descriptor above 1023
    waiting.register(number, select.POLLIN)
    if waiting.poll(stall_seconds * 1000):
        return True
    raise OSError(f"nothing came for {stall_seconds:g} s")


def _skip(pieces: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    for piece in pieces:
        if num_bytes < len(piece):
            yield piece[num_bytes:]
        num_bytes = max(0, num_bytes - len(piece))
