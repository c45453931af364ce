"""Indexes tar shards one by one.

  disco-jax index 's3://bucket/{00000..41407}.tar'
  disco-jax index '/data/*.tar' --out=/index --part=3/8

Shards in buckets or on web servers have to be indexed before they are trained from, and large sets
on disks may be. Each shard is read once, and its index is written beside it, or under --out. What
is there and current is kept, so the command can be interrupted and repeated. With --part=i/n, it
does the i-th of n parts, each on a host of its own. The last to finish writes the catalog.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

from disco_jax.data.building import workers
from disco_jax.data.patterns import expand
from disco_jax.data.sidecars import (
    Entry,
    find_entries,
    is_current,
    read_entry,
    sidecar_of,
    write_catalogs,
    write_sidecar,
)
from disco_jax.data.source import describe
from disco_jax.data.tar_index import progress
from disco_jax.data.tar_scan import scan
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard
from disco_jax.storage.files import status
from disco_jax.storage.urls import WEB, Place, Url, check_scheme

NOTICE = 30.0  # seconds between lines of progress, without a terminal


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("pattern", help="the shards, as in config.data.name")
    parser.add_argument("--out", default="", help="folder or URL of the index; default: beside")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: %(default)s"
    )
    parser.add_argument("--part", default="1/1", help="which part to do, e.g. 3/8; default: all")
    return parser.parse_args()


def index(arguments: argparse.Namespace) -> None:
    """Writes what is missing of the index.

    Raises:
      UserError: if a shard can't be read, or the index can't be written.
    """
    out = str(Path(arguments.out).expanduser().absolute()) if arguments.out else ""
    if check_scheme(arguments.out):
        out = arguments.out
    number, parts = _part(arguments.part)
    shards = [shard for name in arguments.pattern.split("::") for shard in _shards(name)]
    if not out and any(str(shard).startswith(WEB) for shard in shards):
        raise UserError("--out is missing: web servers can't be written to")
    own = shards[number - 1 :: parts]
    done: dict[Place, Entry] = {}
    failed: list[str] = []
    for shard, result in zip(own, _index_all(own, out, arguments.jobs), strict=True):
        if isinstance(result, Entry):
            done[shard] = result
        else:
            failed.append(result)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(own)} shards can't be indexed; the first: {failed[0]}"
        )
    metas = [shard.listed if isinstance(shard, Url) else status(shard) for shard in shards]
    entries = [entry for entry in find_entries(shards, metas, out, done)[0] if entry is not None]
    if len(entries) < len(shards):
        say(
            f"indexed {len(own):,} shards, part {number} of {parts}; the catalog is written once "
            f"all {len(shards):,} are indexed, by the last part or when they are opened"
        )
        return
    places = write_catalogs(shards, entries, out)
    problems = sum((Counter(entry.problems) for entry in entries), Counter())
    say(
        f"indexed {len(shards):,} shards with {sum(entry.samples for entry in entries):,} samples; "
        f"{describe(problems) or 'no problems'}; {', '.join(map(str, places))}"
    )


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part is {text!r}; it must be the number of a part, e.g. 3/8")
    return int(found[1]), int(found[2])


def _shards(name: str) -> list[Place]:
    shards = expand(name)
    if wrong := next((shard for shard in shards if shard.suffix.lower() != ".tar"), None):
        raise UserError(f"{wrong} is not a .tar shard; only shards have an index")
    return [shard if isinstance(shard, Url) else shard.absolute() for shard in shards]


def _index_all(shards: Sequence[Place], out: str, jobs: int) -> Iterator[Entry | str]:
    """Yields the result of `_index_one` for each shard, in order, and tells of the progress."""
    began = told = time.monotonic()
    with progress() as bar:
        task = bar.add_task("", total=len(shards))
        for count, result in enumerate(_results(shards, out, jobs), 1):
            yield result
            bar.advance(task)
            if bar.disable and time.monotonic() - told > NOTICE:
                told = time.monotonic()
                left = (told - began) / count * (len(shards) - count)
                say(f"indexed {count:,} of {len(shards):,} shards; {left:,.0f} s left", sys.stderr)


def _results(shards: Sequence[Place], out: str, jobs: int) -> Iterator[Entry | str]:
    if min(jobs, len(shards)) < 2:
        yield from map(_index_one, shards, repeat(out))
        return
    with workers(min(jobs, len(shards))) as pool:
        try:
            yield from pool.map(_index_one, shards, repeat(out), chunksize=2)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _index_one(shard: Place, out: str) -> Entry | str:
    """Returns a shard's entry, written if necessary, or why it can't be read."""
    sidecar = sidecar_of(shard, out)
    try:
        entry = read_entry(sidecar)
        if entry is not None and is_current(entry, status(shard)):
            return entry
        found = scan(shard)
    except OSError as error:
        return f"{shard}: {error.strerror}"
    try:
        return write_sidecar(sidecar, shard.name, found)
    except OSError as error:
        raise UserError(f"{sidecar} can't be written: {error.strerror}") from error


def main() -> None:
    """Parses the command line and runs the command; a mistake exits with 2."""
    guard(lambda: index(parse_arguments()))


if __name__ == "__main__":
    main()
