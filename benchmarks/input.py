"""Times our input pipeline and OpenCLIP's, each in its own process.

    python benchmarks/input.py [--images=2000] [--side=512] [--peer openclip] [--json]
    python benchmarks/input.py --remote [--workers=2]
    python benchmarks/input.py --index=1000 --entries=10000
    python benchmarks/input.py --order=400000000

JPEG shards are written to a temporary folder; images are decoded and randomly cropped to 224
pixels, captions are tokenized. CPU seconds are summed over all threads. `--remote` instead compares
shards on disk and in a slow bucket (remote.py); `--index=N` times building and opening the index of
N shards, in one file and in one per shard; `--order=N`, finding places in the orders of N samples.
"""

import argparse
import io
import json
import multiprocessing
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from disco_jax.config import default
from disco_jax.data.block_order import BlockOrder
from disco_jax.data.index import index
from disco_jax.data.load import Load
from disco_jax.data.order import GlobalOrder, Order, by_lane, make_order
from disco_jax.data.pipeline import Collate, train_batches
from disco_jax.data.sources import open_source
from disco_jax.data.tokenizer import CLIPTokenizer

SHARD = 250  # samples
SIDECARS = ("sidecars", "catalog")
CAPTION = "a photo of a harbour with boats, number {} of the set, taken in the evening light"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="default: 2,000, and 8,192 with --remote")
    parser.add_argument("--side", type=int, default=512, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument(
        "--workers", type=int, help="data worker processes; default: 0, and 2 with --remote"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peer", choices=("openclip",), help="also time OpenCLIP, which must be installed"
    )
    parser.add_argument("--remote", action="store_true", help="compare local and remote shards")
    parser.add_argument("--index", type=int, help="time the index of this many shards instead")
    parser.add_argument("--entries", type=int, default=10_000, help="samples per indexed shard")
    parser.add_argument("--order", type=int, help="time the orders of this many samples instead")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line"
    )
    arguments = parser.parse_args()
    arguments.images = arguments.images or (8_192 if arguments.remote else 2_000)
    if arguments.workers is None:
        arguments.workers = 2 if arguments.remote else 0
    if arguments.images < 2 * arguments.batch:
        parser.error(f"--images is {arguments.images}; it must hold two batches, one to warm up")
    return arguments


def photo(rng: np.random.Generator, side: int) -> bytes:
    """Returns a JPEG with structure at all scales, sized like a photo: about 1.5 bits per pixel."""
    total = np.zeros((side, side, 3))
    for cells in (2, 5, 13, 40, side // 4):
        noise = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        grown = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        total += np.asarray(grown, float) * cells**-0.5
    total = (total - total.min()) / (total.max() - total.min())
    encoded = io.BytesIO()
    Image.fromarray((255 * total).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def write_shards(folder: Path, images: int, side: int) -> str:
    rng = np.random.default_rng(0)
    pictures = [photo(rng, side) for _ in range(50)]
    print(f"{side}-pixel JPEGs of {np.mean([len(p) for p in pictures]) / 1000:.0f} kB")
    for start in range(0, images, SHARD):
        with tarfile.open(folder / f"{start // SHARD:05}.tar", "w") as tar:
            for key in range(start, min(start + SHARD, images)):
                caption = CAPTION.format(key).encode()
                for extension, content in (("jpg", pictures[key % 50]), ("txt", caption)):
                    member = tarfile.TarInfo(f"{key:09}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    last = -(-images // SHARD) - 1
    return f"{folder}/{{00000..{last:05}}}.tar"


def ours(pattern: str, batch: int, workers: int) -> Iterator[Any]:
    data = default().data
    data.caption_key = "txt"
    source = open_source(data, pattern, "")
    order, load = make_order(data, 0, source), Load(source, data, 224)
    collate = Collate(CLIPTokenizer())
    return train_batches(order, load, collate, batch_size=batch, start=0, num_workers=workers)


def openclip(pattern: str, batch: int, workers: int) -> Iterator[Any]:
    from peer_openclip import openclip_batches

    return openclip_batches(pattern, batch, workers)


def _time(make: Callable[..., Iterator[Any]], pipe: Any, *args: Any) -> None:
    images, rest = args[0], args[1:]
    batches = make(*rest)
    batch = rest[1]
    next(batches)
    before, start = _cpu(), time.perf_counter()
    for _ in range(images // batch - 1):
        next(batches)
    pipe.send((time.perf_counter() - start, _cpu() - before))


def _cpu() -> float:
    """Returns the CPU seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(arguments: argparse.Namespace, pattern: str) -> dict[str, dict[str, float]]:
    contenders = {"ours": ours} | ({"openclip": openclip} if arguments.peer else {})
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, make in contenders.items():
            here, there = context.Pipe()
            rest = (arguments.images, pattern, arguments.batch, arguments.workers)
            process = context.Process(target=_time, args=(make, there, *rest))
            process.start()
            there.close()
            times[name].append(here.recv())
            process.join()
    count = (arguments.images // arguments.batch - 1) * arguments.batch
    return {
        name: {
            "images_per_second": count / min(wall for wall, _ in measured),
            "cpu_seconds_per_image": min(cpu for _, cpu in measured) / count,
        }
        for name, measured in times.items()
    }


def measure_index(shards: int, entries: int) -> dict[str, float]:
    """Measures time and memory to index and to reopen shards, all hard links to one file."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        with tarfile.open(first, "w") as tar:
            for key in range(entries):
                for extension in ("jpg", "txt", "json"):
                    member = tarfile.TarInfo(f"{key:09}.{extension}")
                    member.size = 1
                    tar.addfile(member, io.BytesIO(b"?"))
        for i in range(shards):
            (Path(folder) / f"{i:05}.tar").hardlink_to(first)
        context = multiprocessing.get_context("spawn")
        result: dict[str, float] = {}
        for what in ("index", "open", "sidecars", "catalog"):
            here, there = context.Pipe()
            target = _write_sidecars if what == "sidecars" else _open
            process = context.Process(target=target, args=(there, f"{folder}/*.tar"))
            process.start()
            there.close()
            seconds, memory, samples = here.recv()
            process.join()
            result |= {f"{what}_seconds": seconds, f"{what}_bytes": memory, "samples": samples}
        return result


def _write_sidecars(pipe: Any, pattern: str) -> None:
    start = time.perf_counter()
    jobs = multiprocessing.cpu_count()
    index(argparse.Namespace(pattern=pattern, out="", part="1/1", jobs=jobs))
    seconds = time.perf_counter() - start
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0))


def _open(pipe: Any, pattern: str) -> None:
    data = default().data
    data.caption_key = "txt"
    start = time.perf_counter()
    source = open_source(data, pattern, "")
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(0)
    for number in rng.integers(0, len(source), 1_000).tolist():
        source[number]
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, len(source)))


def measure_orders(samples: int) -> dict[str, dict[str, float]]:
    """Measures both orders, each in its own process."""
    result = {}
    for name in ("global", "blocks"):
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_measure_order, args=(there, name, samples)
        )
        process.start()
        there.close()
        result[name] = here.recv()
        process.join()
    return result


def _measure_order(pipe: Any, name: str, samples: int) -> None:
    data = default().data
    sizes = {"block_size": data.block_size, "window": data.window, "lanes": data.lanes}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order: Order = BlockOrder(samples, 0, **sizes) if name == "blocks" else GlobalOrder(samples, 0)
    places = np.random.default_rng(0).integers(0, 1_000 * samples, 300)  # of as many epochs
    seek = _seconds(lambda i: order.indices(places[i : i + 1]), 300)
    batch = 32_768
    sort = _seconds(lambda i: by_lane(order, i * batch, batch), 30)
    rows = by_lane(order, samples // 2, batch)
    piece = _seconds(lambda i: order.indices(rows[64 * i : 64 * (i + 1)]), 100)
    found = {
        "seek_seconds": seek,
        "sort_batch_seconds": sort,
        "places_per_second": 64 / piece,
    }
    if name == "blocks":
        windows = order.windows(samples // 2)
        found["first_window_seconds"] = _seconds(lambda i: next(windows), 1)
        found["windows_per_second"] = 1 / _seconds(lambda i: next(windows), 1_000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(found | {"bytes": 1024 * (after - before)})


def _seconds(function: Callable[[int], Any], times: int) -> float:
    """Returns the mean seconds of a call with 0, 1, ..."""
    start = time.perf_counter()
    for i in range(times):
        function(i)
    return (time.perf_counter() - start) / times


def show_orders(result: dict[str, dict[str, float]], samples: int) -> None:
    table = Table(title=f"orders of {samples:,} samples, batches of 32,768")
    columns = ("order", "ms per seek", "places/s", "ms to sort a batch", "MiB", "windows/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "order" else "right")
    for name, row in result.items():
        windows = row.get("windows_per_second")
        table.add_row(
            name,
            f"{1000 * row['seek_seconds']:.2f}",
            f"{row['places_per_second']:,.0f}",
            f"{1000 * row['sort_batch_seconds']:.1f}",
            f"{row['bytes'] / 2**20:.1f}",
            f"{windows:,.0f}" if windows else "-",
        )
    Console(width=100).print(table)


def main() -> None:
    arguments = parse_arguments()
    if arguments.order:
        orders = measure_orders(arguments.order)
        show_orders(orders, arguments.order)
        if arguments.json:
            print(json.dumps(orders))
        return
    if arguments.remote:
        from remote import measure_remote, show_remote

        rates = measure_remote(arguments, write_shards)
        show_remote(rates, arguments.workers)
        if arguments.json:
            print(json.dumps(rates))
        return
    if arguments.index:
        result: dict[str, Any] = measure_index(arguments.index, arguments.entries)
        print(f"{result['samples']:,} samples in {arguments.index:,} shards, indexed and reopened:")
        for form, names in (("in one file", ("index", "open")), ("one each", SIDECARS)):
            seconds = " and ".join(f"{result[f'{name}_seconds']:.1f}" for name in names)
            memory = " and ".join(f"{result[f'{name}_bytes'] / 2**20:,.0f}" for name in names)
            print(f"{form}: {seconds} s; {memory} MiB peak memory of the process")
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(
                arguments, write_shards(Path(folder), arguments.images, arguments.side)
            )
        table = Table(
            title=f"{arguments.side}-pixel JPEGs to 224 pixels, {arguments.workers} workers"
        )
        for column in ("pipeline", "images/s", "CPU ms per image", "images per CPU second"):
            table.add_column(column, justify="left" if column == "pipeline" else "right")
        for name, row in result.items():
            cpu = row["cpu_seconds_per_image"]
            table.add_row(
                name, f"{row['images_per_second']:.0f}", f"{1000 * cpu:.2f}", f"{1 / cpu:.0f}"
            )
        Console(width=100).print(table)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
