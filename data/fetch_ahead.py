"""Fetches remote shards before they are read, in a process beside the rank, and keeps what is needed.

Nothing depends on it but time: a worker that finds a shard missing fetches it itself.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any
from weakref import finalize

from data.download import say
from data.forkserver import worker_context
from data.index import FolderIndex
from data.shard_cache import NoRoom
from data.worker import start_worker

CONNECTIONS = 4
"""Shards that a rank fetches ahead at the same time."""

LOOK_SECONDS = 0.1
IDLE_SECONDS = 1.0
"""How often a process that keeps all that is wanted looks whether others need its room."""

REST_SECONDS = 10.0
"""When a shard that could not be fetched is tried again."""

Place = tuple[str, int]
"""Source and number of a shard."""


class FetchAhead:
    """A process that fetches what `want` names, the first first, and keeps that in the cache."""

    def __init__(self, folders: dict[str, FolderIndex]):
        self._folders = {name: folder for name, folder in folders.items() if folder.cache}
        self._last: list[Place] = []
        self._process: Any = None
        self._pipe: Any

    @property
    def sources(self) -> set[str]:
        """Names of the remote sources."""
        return set(self._folders)

    def want(self, shards: list[Place]) -> None:
        """Says which shards are read from now on, in order; all others may leave the cache."""
        if shards == self._last or not self._folders:
            return
        if self._process is None:
            self._start()
        self._last = shards
        try:
            self._pipe.send(shards)
        except OSError:
            say("The process that fetches shards ahead has died; workers fetch them when they need them.")

    def close(self) -> None:
        """Ends the process. `want` would start a new one."""
        if self._process is not None:
            _end(self._process)
            self._pipe.close()
        self._process, self._last = None, []

    def _start(self) -> None:
        context = worker_context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._folders, theirs), daemon=True)
        self._process.start()
        theirs.close()
        finalize(self, _end, self._process)


def _end(process: Any) -> None:
    if process.is_alive():
        process.kill()  # its locks go with it, and unfinished shards go on later
    process.join()


def _serve(folders: dict[str, FolderIndex], pipe: Connection) -> None:
    start_worker(0)
    fetcher = _Fetcher(folders)
    while True:
        busy = fetcher.step()
        if pipe.poll(LOOK_SECONDS if busy else IDLE_SECONDS):
            try:
                while pipe.poll():
                    fetcher.wanted = pipe.recv()
            except EOFError:
                os._exit(0)


class _Fetcher:
    """What is wanted, what is kept (a descriptor holds each shard in the cache), and what is on its way."""

    def __init__(self, folders: dict[str, FolderIndex]):
        self.folders = folders
        self.wanted: list[Place] = []
        self.kept: dict[Place, int] = {}
        self.jobs: dict[Place, Future[int | None]] = {}
        self.resting: dict[Place, float] = {}
        self.pool = ThreadPoolExecutor(CONNECTIONS)

    def step(self) -> bool:
        """Takes what came, lets go of what is not wanted, asks for more; returns whether any is missing."""
        for place in [place for place, job in self.jobs.items() if job.done()]:
            self._take(place, self.jobs.pop(place))
        for place in self.kept.keys() - set(self.wanted):
            os.close(self.kept.pop(place))
        if self._is_room_asked_for():
            # Ranks keep what comes next for each; only whoever reads may hold up the others.
            self._let_go_after(None)
            return True
        missing = [place for place in self.wanted if place not in self.kept]
        now = time.monotonic()
        ready = [place for place in missing if place not in self.jobs and self.resting.get(place, 0) <= now]
        for place in ready[: CONNECTIONS - len(self.jobs)]:
            self.jobs[place] = self.pool.submit(self._open, place)
        return bool(missing)

    def _open(self, place: Place) -> int | None:
        folder = self.folders[place[0]]
        assert folder.cache, "a folder that is not remote"
        return folder.cache.open_now(folder.shards[place[1]].cached)

    def _take(self, place: Place, job: Future[int | None]) -> None:
        try:
            number = job.result()
        except NoRoom:
            if not self._let_go_after(place):
                self.resting[place] = time.monotonic() + 1.0
            return
        except Exception as error:  # of any kind: only a worker that needs the shard ends the run
            say(str(error) or type(error).__name__)
            self.resting[place] = time.monotonic() + REST_SECONDS
            return
        if number is not None:  # else another process is fetching it
            self.kept[place] = number

    def _is_room_asked_for(self) -> bool:
        return any(folder.cache.is_room_asked_for() for folder in self.folders.values() if folder.cache)

    def _let_go_after(self, place: Place | None) -> bool:
        """Gives up the last kept shard that is wanted after `place`; the last of all where that is None."""
        order = {wanted: number for number, wanted in enumerate(self.wanted)}
        last = max(self.kept, key=lambda kept: order.get(kept, len(order)), default=None)
        if last is None or (place and order.get(last, len(order)) <= order.get(place, len(order))):
            return False
        os.close(self.kept.pop(last))
        return True
