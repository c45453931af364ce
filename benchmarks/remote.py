"""Times training's input pipeline on shards in a slow and unreliable bucket (`input.py --remote`).

The bucket is served by a process of this machine, which delays each request by 20 ms and fails one
in twenty. It speaks as much of S3's protocol as is needed, and its files are sent by the kernel
(sendfile), because its CPU time counts against the pipeline; that of a real bucket does not.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from disco_jax.config import default
from disco_jax.data.batches import Batch
from disco_jax.data.block_order import BlockOrder, Window
from disco_jax.data.load import Load
from disco_jax.data.order import make_order
from disco_jax.data.pipeline import Collate, train_batches
from disco_jax.data.sources import open_source
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.data.train_data import fetching_of
from disco_jax.storage import stores

T = TypeVar("T")

DELAY = 0.02  # seconds before each answer
FAILING = 0.05  # share of the requests that fail, half of them with a 503, half with a reset
# Small blocks, so that a small set has many. Each is a request of about 1.5 MB; with the defaults,
# requests have up to 8 MiB, so that there are fewer of them per image.
BLOCKS = {"order": "blocks", "block_size": 32, "window": 4, "lanes": 8}
BATCH = 128
SINGLE = 3  # batches that are read sample by sample
BUCKET = "s3://shards"
FAULTS = ("", "503", "reset")


class Bucket(ThreadingHTTPServer):
    """Serves a folder as a bucket.

    Args:
      folder: its objects.
      failing: the share of requests that fail, a shared value.
      delivered: the bytes of shards that have been sent, a shared value.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, failing: Any, delivered: Any):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.failing, self.delivered = folder, failing, delivered
        self._random, self._lock = random.Random(0), threading.Lock()

    def fault(self) -> tuple[str, float]:
        """Draws what is wrong with an answer, and the part of it that is sent before a reset."""
        bad = self.failing.value / 2
        with self._lock:
            (kind,) = self._random.choices(FAULTS, (1 - 2 * bad, bad, bad))
            return kind, self._random.random()

    def handle_error(self, *_: Any) -> None:
        """Says nothing of connections that clients have left."""


class _Answer(BaseHTTPRequestHandler):
    """Answers GET, with ranges and listings, HEAD and PUT."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Bucket

    def do_GET(self) -> None:
        time.sleep(DELAY)
        kind, part = self.server.fault()
        url = urlsplit(self.path)
        if kind == "503":
            self._send(503, b"<Error><Code>SlowDown</Code></Error>")
        elif "list-type" in url.query:
            self._send(200, self._listing(parse_qs(url.query)["prefix"][0]))
        else:
            with contextlib.ExitStack() as stack:
                try:
                    file = stack.enter_context(self._object.open("rb"))
                except OSError:
                    self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
                else:
                    self._send_file(file.fileno(), part if kind == "reset" else 1)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self._object.parent.mkdir(parents=True, exist_ok=True)
        self._object.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(200, b"", {"ETag": _etag(self._object.stat())})

    @property
    def _object(self) -> Path:
        """The file that the request is about."""
        return self.server.folder / unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    def _send_file(self, file: int, part: float) -> None:
        """Sends what was asked for of a file or, if it is less than all, a part and a reset."""
        stat = os.fstat(file)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, stat.st_size)
        stop = min(last + 1, stat.st_size)
        headers = {"ETag": _etag(stat), "Content-Length": str(stop - start)}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stat.st_size}"
        self._send(206 if wanted else 200, b"", headers)
        end = start + int(part * (stop - start)) if self.command == "GET" else start
        while start < end:
            sent = os.sendfile(self.connection.fileno(), file, start, end - start)
            start += sent
            if self.path.endswith(".tar"):
                with self.server.delivered.get_lock():
                    self.server.delivered.value += sent
        if part < 1:
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.close_connection = True
            self.connection.close()

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        modified = "Thu, 01 Jan 2026 00:00:00 GMT"
        told = {"Content-Length": str(len(content)), "Last-Modified": modified} | (headers or {})
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _listing(self, prefix: str) -> bytes:
        """Returns the objects that are in a folder itself."""
        found = [
            f"<Contents><Key>{escape(prefix + path.name)}</Key><Size>{path.stat().st_size}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(_etag(path.stat()))}</ETag></Contents>"
            for path in sorted((self.server.folder / prefix).glob("*"))
        ]
        return (
            f"<ListBucketResult><KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
            f"{''.join(found)}</ListBucketResult>"
        ).encode()

    def log_message(self, *_: Any) -> None:
        pass


def _etag(stat: os.stat_result) -> str:
    return f'"{stat.st_size:x}-{stat.st_mtime_ns:x}"'


def _serve(pipe: Any, *args: Any) -> None:
    server = Bucket(*args)
    pipe.send(server.server_port)
    server.serve_forever()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Serves a folder to this process and those it starts; yields `failing` and `delivered`."""
    context = multiprocessing.get_context("spawn")
    shared = context.Value("d", 0.0), context.Value("q", 0)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, folder, *shared), daemon=True)
    process.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}",
        "AWS_SKIP_SIGNATURE": "true",
        "NO_PROXY": "127.0.0.1",
        "JAX_PLATFORMS": "cpu",
    }
    try:
        yield shared
    finally:
        process.kill()
        process.join()


class OneEpoch(BlockOrder):
    """Fetches nothing for a second epoch."""

    def windows(self, place: int, lanes: Any = None) -> Iterator[Window]:
        """As in `BlockOrder`, for the first epoch only."""
        return itertools.takewhile(lambda window: not window.epoch, super().windows(place, lanes))


def _batches(config: ConfigDict, once: bool = False) -> Iterator[Batch]:
    """Yields batches as training does."""
    source = open_source(config.data, config.data.name, "")
    order = make_order(config.data, config.seed, source)
    if once:
        assert isinstance(order, BlockOrder)
        order = OneEpoch(**vars(order))
    fetching = fetching_of(config, source, order, 0, np.arange(BATCH))
    batches = train_batches(
        order,
        Load(source, config.data, 224),
        Collate(CLIPTokenizer()),
        batch_size=BATCH,
        start=0,
        num_workers=config.data.num_workers,
        fetching=fetching,
    )
    try:
        for step, batch in enumerate(batches, 1):
            yield batch
            if fetching is not None:
                fetching.consumed(step * BATCH)
    finally:
        if fetching is not None:
            fetching.close()
        batches.close()


def _rate(config: ConfigDict, count: int) -> float:
    """Returns images/s of `count` batches after the first."""
    batches = _batches(config)
    next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return count * BATCH / seconds


def _read_once(config: ConfigDict, count: int) -> None:
    """Reads an epoch of `count` batches."""
    batches = itertools.islice(_batches(config, once=True), count)
    if len({key for batch in batches for key in batch.keys}) != count * BATCH:
        raise SystemExit("samples of the epoch are missing")


def _alone(function: Callable[..., T], *args: Any) -> T:
    """Returns what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _config(name: str, workers: int, **fields: Any) -> ConfigDict:
    config = default()
    config.batch_size = BATCH
    config.data.update({"name": name, "caption_key": "txt", "num_workers": workers} | fields)
    return config


def measure_remote(
    arguments: argparse.Namespace, write_shards: Callable[..., str]
) -> dict[str, float]:
    """Returns images/s of `local`, `blocks_remote` and `global_remote`, and `bytes_ratio`."""
    batches = arguments.images // BATCH
    if batches < 2:
        raise SystemExit(f"--images is {arguments.images}; it must hold two batches of {BATCH}")
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as served:
        pattern = write_shards(Path(made), batches * BATCH, arguments.side)
        shards = sorted(Path(made).glob("*.tar"))
        size = sum(shard.stat().st_size for shard in shards)
        in_use = (BLOCKS["window"] + 1) * BLOCKS["lanes"] * BLOCKS["block_size"]
        cache = {"cache": f"{served}/cache", "cache_bytes": in_use * size // (batches * BATCH) + 1}
        with serving(Path(served) / "objects") as (failing, delivered):
            for shard in shards:
                stores.write(f"{BUCKET}/{shard.name}", shard.read_bytes())
            remote = f"{BUCKET}/{Path(pattern).name}"
            subprocess.run([sys.executable, "-m", "disco_jax.data.index", remote], check=True)
            failing.value = FAILING
            workers = arguments.workers
            contenders = {
                "local": (_config(pattern, workers, order="global"), batches - 1),
                "blocks_remote": (_config(remote, workers, **BLOCKS, **cache), batches - 1),
                "global_remote": (_config(remote, workers, order="global"), SINGLE),
            }
            rates: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(arguments.repeats):
                for name, run in contenders.items():
                    rates[name].append(_alone(_rate, *run))
                    print(f"{name}: {rates[name][-1]:.1f} images/s", flush=True)
            delivered.value = 0
            _alone(_read_once, contenders["blocks_remote"][0], batches)
            return {name: max(found) for name, found in rates.items()} | {
                "bytes_ratio": delivered.value / size
            }


def show_remote(result: dict[str, float], workers: int) -> None:
    table = Table(title=f"from a bucket with {1000 * DELAY:.0f} ms per request, {workers} workers")
    for column in ("order and place", "images/s", "relative to local"):
        table.add_column(column, justify="left" if column == "order and place" else "right")
    for name in ("local", "blocks_remote", "global_remote"):
        rate = result[name]
        table.add_row(name, f"{rate:.1f}", f"{rate / result['local']:.2f}")
    Console(width=100).print(table)
    print(f"bytes fetched in an epoch / bytes of the shards: {result['bytes_ratio']:.3f}")
