"""Real stores on loopback: a web server that can misbehave on purpose, and an S3 server (moto)."""

import collections
import contextlib
import http.server
import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from tests.train.launching import free_port


class WebStore(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges and ETags; `faults` are taken one per request of a file's name.

    `stall` sends half and then nothing, `cut` sends half and hangs up, `error` says 500, `short` and `long`
    claim and send another length, `whole` ignores the range.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.faults = collections.defaultdict(list)
        self.requests = []
        self.busy = collections.Counter()
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, name: str) -> list[int]:
        """Returns from which byte a file was asked for, each time."""
        return [start for asked, start in self.requests if asked == name]

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what is tested


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def name(self):
        return self.path.partition("?")[0].lstrip("/")

    def do_HEAD(self):
        self._answer(send=False)

    def do_GET(self):
        name = self.name
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].rstrip("-"))
        with self.server.lock:
            self.server.requests.append((name, start))
            self.server.busy[name] += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.busy[name])
            fault = self.server.faults[name].pop(0) if self.server.faults[name] else ""
        try:
            self._answer(start, fault)
        finally:
            with self.server.lock:
                self.server.busy[name] -= 1

    def _answer(self, start=0, fault="", send=True):
        path = self.server.folder / self.name
        if fault == "error" or not path.is_file():
            self.send_error(500 if fault else 404)
            return
        data = path.read_bytes()
        if start and start >= len(data) and fault != "whole":
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if start and fault != "whole":
            data = data[start:]
            self.send_response(206)
        else:
            self.send_response(200)
        data = {"short": data[:-100], "long": data + bytes(100)}.get(fault, data)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if send:
            self.wfile.write(data[: len(data) // 2] if fault in ("stall", "cut") else data)
            self.wfile.flush()
        if fault == "stall":
            self.server.stalled.wait(20)
        if fault in ("stall", "cut"):
            self.close_connection = True

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def web_store(folder):
    """Gives a running `WebStore`."""
    store = WebStore(folder)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        store.stalled.set()
        store.shutdown()
        store.server_close()


class FaultyWay(socketserver.ThreadingTCPServer):
    """Passes connections on to a server; `faults` are taken one per answer of some length, or per request.

    `stall` sends half of what came and then nothing, `cut` sends half and hangs up, `error` says 500.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port, faults):
        super().__init__(("127.0.0.1", 0), _Passing)
        self.port = port
        self.faults = list(faults)
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def take(self, *wanted) -> str:
        """Returns the next fault if it is one of these."""
        with self.lock:
            return self.faults.pop(0) if self.faults and self.faults[0] in wanted else ""

    def handle_error(self, request, client_address):
        pass


class _Passing(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.port)) as server:
            while True:
                for ready in select.select([self.request, server], [], [])[0]:
                    if not (data := ready.recv(2**16)):
                        return
                    if ready is self.request:
                        if data.startswith(b"GET /data/shards/") and self.server.take("error"):
                            self.request.sendall(
                                b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                            )
                            return
                        server.sendall(data)
                    elif len(data) > 5000 and (fault := self.server.take("cut", "stall")):
                        self.request.sendall(data[: len(data) // 2])
                        if fault == "stall":
                            self.server.ended.wait(30)
                        return
                    else:
                        self.request.sendall(data)


@contextlib.contextmanager
def s3_store(folder, faults=()):
    """Gives the environment for an S3 server whose bucket `data` holds the files of a folder as shards/..."""
    import boto3

    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    env = {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        _wait_for(url, process)
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="someone",
            aws_secret_access_key="something",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="data")
        for path in sorted(Path(folder).iterdir()):
            if path.is_file():
                client.upload_file(str(path), "data", f"shards/{path.name}")
        way = FaultyWay(port, faults)
        threading.Thread(target=way.serve_forever, daemon=True).start()
        yield env | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{way.server_address[1]}"}
        way.ended.set()
        way.shutdown()
        assert not way.faults, f"faults that never came about: {way.faults}"
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError("the S3 server does not answer")


def size_of(folder) -> int:
    """Returns the bytes of all shards in a cache, whole and unfinished ones."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".tar", ".partial")):
                with contextlib.suppress(FileNotFoundError):
                    total += os.path.getsize(os.path.join(root, name))
    return total
